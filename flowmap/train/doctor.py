"""One training step of a recipe on its real network, for `flowmap doctor`.

It tries each way of taking the derivative, reports the error of those that fail and the time and memory of the others,
and describes the teacher's samples. The step's data is noise, so that the data need not be there; the teacher's weights
must be.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.prior import build_prior
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import BuiltTeacher, build_teacher
from flowmap.data import Dataset
from flowmap.estimate.dry_run import counted
from flowmap.estimate.module_check import check_prediction
from flowmap.estimate.teacher_check import check_teacher
from flowmap.flow.types import Cond, PathSample
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.objectives import FlowMatching
from flowmap.plan.plan import ResolvedRun, resolve
from flowmap.recipe import Recipe
from flowmap.train.draw import draw_sample
from flowmap.train.module import as_trained

WAYS = ("dual", "difference", "forward")


def examine(recipe: Recipe, *, batch: int, device: torch.device) -> list[str]:
    """The lines that `flowmap doctor` prints; the last one recommends a derivative.

    Raises RecipeError for a recipe that cannot be built.
    """
    if batch < 1:
        raise ValueError(f"--batch: {batch} must be 1 or more")
    run = resolve(recipe)
    teacher = build_teacher(run)
    data = _noise(run, teacher, batch)
    config = student_config(run, data, teacher)
    student = as_trained(build_student(run, config, teacher), recipe).to(device).train()
    if teacher is not None:
        teacher.with_null_conditions({key: value[:1].to(device) for key, value in data.text.items()}).to(device)
    sample = _sample(run, data, device)
    lines = [
        f"{type(student.net).__name__}: {counted(student)}, samples of shape {tuple(config.shape)}, "
        f"batch {batch}, {device}"
    ]
    _teacher_lines(run, teacher, data, device, lines)
    plain = _measured(FlowMatching(), student, None, replace(sample, s=sample.t))
    lines.append(f"plain flow-matching step: {plain[0]:.3g} s, {_mib(plain[1])} of activations")
    if recipe.distillation.derivative is None:
        return [*lines, "this objective takes no derivative of the network"]
    works, objective = [], cast(Any, recipe.distillation)  # a dataclass with this setting
    for way in WAYS:
        try:
            seconds, kept = _measured(replace(objective, derivative=way), student, teacher, sample)
            works.append(way)
            share = kept / max(plain[1], 1)
            lines.append(
                f"derivative {way}: {seconds:.3g} s with the teacher's calls, "
                f"{_mib(kept)} of activations ({share:.2f} of plain)"
            )
        except (NotImplementedError, RuntimeError) as error:
            lines.append(f"derivative {way}: not here: {' '.join(str(error).split())[:300]}")
    return [*lines, f"choose objective.derivative={works[0]}" if works else "no derivative works on this network"]


def _teacher_lines(
    run: ResolvedRun, teacher: BuiltTeacher | None, noise: Dataset, device: torch.device, lines: list[str]
) -> None:
    """Add a description of the teacher's samples, compared with the recipe's data if that is on this machine."""
    try:
        data, compare = (build_data(run), True) if teacher is not None else (noise, False)
    except (RecipeError, OSError):
        data, compare = noise, False
    prior = build_prior(run)
    if teacher is not None and compare:
        teacher.with_null_conditions({key: value.to(device) for key, value in data.empty.items()})
    if compare:
        try:
            check_prediction(run.recipe, teacher, data, device=device, log=lines.append)
        except RecipeError as error:
            lines.append(f"warning: {error}")
    check_teacher(run.recipe, teacher, data, device=device, prior=prior, log=lines.append, compare=compare)


def _noise(run: ResolvedRun, teacher: BuiltTeacher | None, batch: int) -> _Noise:
    """A data set of noise, in the teacher's shape or, without a teacher's network, in that of the recipe's data."""
    if teacher is not None and teacher.network is not None:
        shape, num_classes = teacher.network.config.shape, teacher.network.config.num_classes
    else:
        data = build_data(run)
        shape, num_classes = data.shape, data.num_classes
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, *shape, generator=generator).clamp(-1, 1)
    labels = torch.randint(num_classes, (batch,), generator=generator) if num_classes else None
    net = net_within(
        teacher.network.config.net if teacher is not None and teacher.network is not None else run.recipe.student
    )
    text = example_conditions(net, batch) if isinstance(net, DiffusersModel) else {}
    return _Noise(
        "noise", x0, x0[:0], labels, None if labels is None else labels[:0], num_classes=num_classes, text=text
    )


@dataclass(frozen=True, eq=False)
class _Noise(Dataset):
    """Noise in the place of samples and of their text."""

    text: Mapping[str, Tensor] = field(default_factory=dict)

    def conditions_at(self, places: Tensor) -> Cond:
        return {**super().conditions_at(places), **{key: value[places] for key, value in self.text.items()}}


def _sample(run: ResolvedRun, data: Dataset, device: torch.device) -> PathSample:
    cond = {key: value.to(device) for key, value in data.conditions_at(torch.arange(len(data))).items()}
    prior = build_prior(run)
    prior = prior and prior.to(device)
    return draw_sample(run.recipe, data.train.to(device), cond, torch.Generator(device).manual_seed(0), prior=prior)


def _measured(objective, student: nn.Module, teacher: BuiltTeacher | None, sample: PathSample) -> tuple[float, int]:
    """(seconds of a forward and backward pass, bytes that autograd kept between them).

    The least of two or more passes, about a second of them, after one that is not counted.
    """
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 1):
        student.zero_grad(set_to_none=True)
        storages: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in student.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:  # noqa: B023
                storages[storage.data_ptr()] = storage.nbytes()  # noqa: B023
            return tensor

        _wait(sample.xt)
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(student, teacher and teacher.guided, sample, step=10**9)
        loss.value.backward()
        _wait(sample.xt)
        seconds.append(time.perf_counter() - started)
    student.zero_grad(set_to_none=True)
    return min(seconds[1:]), sum(storages.values())


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"

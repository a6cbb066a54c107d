"""Modules of one's own: their weights, and what is tried with them before anything is trained."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.base.files import file_digest, read_tensors
from flowmap.base.finite import check_finite
from flowmap.base.schema import RecipeError
from flowmap.flow.derivative import value_and_rate
from flowmap.nets.flow_map import FlowMapNet, mismatch
from flowmap.nets.module import Module
from flowmap.nets.module_builders import given_weights
from flowmap.nets.stacked import StackedNet, net_within
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.module_teacher import ModuleTeacher
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.student import Student
from flowmap.teachers.network import NetworkTeacher


def load_module(run: ResolvedRun) -> tuple[NetworkTeacher, Student | None, tuple[nn.Module, ...]]:
    """Return the recipe's teacher of kind module; it is no network if it has no weights, such as a function."""
    slot = run.recipe.teacher
    assert isinstance(slot, ModuleTeacher)
    try:
        net = slot.net.build(slot.shape, arrival=False)
        has_weights = bool(net.model.state_dict())
        if has_weights and not fill(net.model, slot.source):
            raise ValueError("weights: ??? must name the file of the teacher's weights")
    except ValueError as error:
        raise RecipeError(f"{run.name}: teacher.{error}") from error
    flow_map = FlowMapNet(net)
    config = StudentConfig(
        net=slot.net,
        sampler=run.recipe.sampler,
        shape=slot.shape,
        num_classes=slot.classes,
        arrival=False,
        samples=Pixels(clamp=False),
    )
    trainable = next(flow_map.parameters(), None) is not None
    return NetworkTeacher(flow_map), Student(config, flow_map) if trainable else None, (flow_map,)


def check_module(run: ResolvedRun) -> None:
    """Raise RecipeError if the recipe's teacher of kind module cannot be built or called. No weights are read."""
    slot = run.recipe.teacher
    if not isinstance(slot, ModuleTeacher):
        return
    try:
        with torch.device("meta"):
            slot.net.build(slot.shape, arrival=False)
    except ValueError as error:
        raise RecipeError(f"{run.name}: teacher.{error}") from error


def start_module(run: ResolvedRun, flow_map: FlowMapNet) -> None:
    """Fill a student of kind module with the weights that its settings name, if they name any."""
    spec = net_within(run.recipe.student)
    if not isinstance(spec, Module):
        return
    nets: tuple[Any, ...] = flow_map.net.parts if isinstance(flow_map.net, StackedNet) else (flow_map.net,)
    for net in nets:
        fill(net.model, spec)


def fill(model: nn.Module, spec: Module) -> bool:
    """Load the weights that the settings name; False if they name none. ValueErrors start with the setting's name."""
    if spec.digest is not None:
        state = given_weights(spec.digest)
        if state is None:
            what = f"{spec.digest[:12]}... were given in Python and are not in this process"
            raise ValueError(f"digest: the weights {what}; give the module to flowmap.fit again")
    elif spec.weights is not None:
        state = read_weights(Path(spec.weights), spec.sha256)
    else:
        return False
    wanted = model.state_dict()
    if not any(tensor.is_meta for tensor in wanted.values()):
        found = mismatch(wanted, state)
        if found is not None:
            name, wants, has = found
            of = spec.weights or "those given in Python"
            raise ValueError(f"weights: {of}: {name} is {has}, the module {spec.module!r} wants {wants}")
        model.load_state_dict(state)
    return True


def read_weights(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The state dict in that file: safetensors, or what torch's weights-only reader opens. No code is run."""
    if not path.is_file():
        raise ValueError(f"weights: {path}: there is no such file")
    if sha256 is not None and not file_digest(path).startswith(sha256.lower()):
        raise ValueError(f"weights: {path}: is altered: its SHA-256 is {file_digest(path)}, not {sha256}")
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"weights: {path}: is no whole file of weights alone: {first[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        keys = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"weights: {path}: is no state dict of tensors: {keys[:200]}")
    check_finite(state, path)
    return state


def check_derivative(run: ResolvedRun, flow_map: FlowMapNet, config: StudentConfig) -> None:
    """Raise RecipeError if the recipe's way to take a derivative does not work on a student of kind module."""
    way = run.recipe.distillation.derivative
    if not isinstance(net_within(config.net), Module) or way in (None, "difference"):
        return
    x, t = torch.zeros(2, *config.shape), torch.full((2,), 0.5)
    cond = {"class": torch.zeros(2, dtype=torch.int64)} if config.num_classes else {}
    call = lambda x, t: flow_map.mean_velocity(x, t, t / 2, cond)
    try:
        value_and_rate(call, (x, t), (torch.ones_like(x), torch.ones_like(t)), mode=way)
    except (NotImplementedError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"{run.name}: objective.derivative: {way!r} does not go through the student's module: {what}; "
            "set objective.derivative=difference (`flowmap doctor` tries each)"
        ) from error

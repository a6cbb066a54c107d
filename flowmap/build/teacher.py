"""Build a recipe's frozen teacher: its network, and the guidance and limits that wrap it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowmap.base.distributed import is_child
from flowmap.base.schema import RecipeError
from flowmap.build.module import load_module
from flowmap.data import Dataset, Guidance, Independent, TeacherSlot
from flowmap.data.outline import outline_of
from flowmap.flow.clock import TableClock
from flowmap.flow.solver import Euler, uniform_times
from flowmap.flow.types import Cond, Teacher
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import Base, fingerprint
from flowmap.nets.lora_file import add_file, lora_path
from flowmap.nets.precision import hold
from flowmap.nets.pretrained import load_pretrained
from flowmap.objectives import FlowMatching
from flowmap.plan.cards import pairs_teacher, weights_folder
from flowmap.plan.guidance import check_conditions
from flowmap.plan.named_networks import missing_weights
from flowmap.plan.plan import ResolvedRun
from flowmap.plan.requirements import check_start
from flowmap.recipe import Recipe
from flowmap.recipe.settings import Autoguidance, ClassifierFree, FromTeacher
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import load_student
from flowmap.student.snapshots import nearest_snapshot
from flowmap.student.student import Student
from flowmap.teachers.card import Card
from flowmap.teachers.exact import MixtureTeacher
from flowmap.teachers.guidance import Autoguidance as AutoguidedTeacher
from flowmap.teachers.guidance import ClassifierFree as ClassifierFreeTeacher
from flowmap.teachers.guidance import IntervalGuidance, calls_at, network_calls, with_drawn_scales
from flowmap.teachers.limited import Limited as LimitedTeacher
from flowmap.teachers.network import NetworkTeacher


@runtime_checkable
class HasBlocks(Protocol):
    """A network whose blocks can be skipped to make a weak teacher."""

    def without_blocks(self, skip: tuple[int, ...]) -> nn.Module: ...


@runtime_checkable
class KnownDensity(Protocol):
    """The settings of data drawn from a mixture of Gaussians."""

    @property
    def means(self) -> Tensor: ...

    @property
    def std(self) -> float: ...

    @property
    def weights(self) -> Tensor: ...


@dataclass(frozen=True)
class BuiltTeacher:
    """The guided velocity that objectives use and, if the teacher is a network, that network as a student."""

    guided: Teacher
    network: Student | None
    modules: tuple[nn.Module, ...] = ()

    def to(self, device) -> BuiltTeacher:
        """Move the networks and their conditions of an empty text, which no call then copies to the device."""
        for module in self.modules:
            module.to(device)
            assert isinstance(module, FlowMapNet)
            module.with_null_conditions({key: row.to(device) for key, row in module.empty.items()})
        return self

    def with_null_conditions(self, empty: Cond) -> BuiltTeacher:
        """Give the networks the conditions of an empty text, one row each, and return the teacher itself."""
        for module in self.modules:
            assert isinstance(module, FlowMapNet)
            module.with_null_conditions(empty)
        return self

    def solve(self, x1: Tensor, cond: Cond | None, steps: int) -> Tensor:
        """Return the samples that Euler steps along the guided velocity make from x1."""
        return Euler(steps=steps)(lambda x, t: self.guided.velocity(x, t, cond), x1).x

    def in_training(self, slot: TeacherSlot | None) -> Teacher:
        """Return the velocity that the objective sees: that of `slot`'s guidance, with drawn scales, or of none."""
        guidance = None if slot is None else slot.guidance
        return self.guided if guidance is None else self.on_drawn_scales(guidance.scale)

    def on_drawn_scales(self, scale: tuple[float, float]) -> Teacher:
        """Return the guided velocity for training, with guidance scales drawn from that range."""
        if isinstance(self.guided, LimitedTeacher):
            return replace(self.guided, teacher=with_drawn_scales(self.guided.teacher, scale))
        return with_drawn_scales(self.guided, scale)

    @property
    def calls_per_step(self) -> int:
        """The maximum number of network calls per velocity."""
        return network_calls(self.guided)

    def calls(self, steps: int) -> int:
        """Return the network calls that `solve` makes for each sample."""
        guided = self.guided.teacher if isinstance(self.guided, LimitedTeacher) else self.guided
        return sum(calls_at(guided, t) for t in uniform_times(steps)[:-1])


def build_teacher(run: ResolvedRun, data: Dataset | None = None) -> BuiltTeacher | None:
    """Return the recipe's teacher with its guidance, its weights read from the runs that trained it; None without one.

    data: supplies the conditions of an empty text, which guidance without a condition needs.
    """
    if run.recipe.teacher is None:
        return None
    teacher = _same_start(run, _guided(run, run.recipe.teacher))
    return teacher.with_null_conditions({} if data is None else data.empty)


def build_pairs_teacher(run: ResolvedRun, data: Dataset) -> BuiltTeacher:
    """Return the teacher that makes the recipe's pairs; its guided velocity reads the scale as cond["guidance"].

    Raises RecipeError if its samples have another shape than the data.
    """
    recipe = run.recipe
    check_conditions(recipe, outline_of(data))
    alone = run.changed(teacher=pairs_teacher(recipe), coupling=Independent(), objective=FlowMatching())
    built = build_teacher(alone, data)
    if built is None:
        student = load_student(run.finished(run.pairs_teachers[0], "coupling.recipe"))
        built = _same_start(run, BuiltTeacher(NetworkTeacher(student.flow_map), student, (student.flow_map,)))
    if built.network is not None and tuple(built.network.config.shape) != tuple(data.shape):
        theirs = built.network.config.shape
        raise RecipeError(
            f"{recipe.name}: coupling: its teacher's samples are {theirs}, those of the data {data.shape}"
        )
    return built


def _same_start(run: ResolvedRun, teacher: BuiltTeacher) -> BuiltTeacher:
    """Return the teacher; raise RecipeError unless its paths start at the recipe's prior.

    The paths of a teacher that is not a network of flowmap start at N(0, I).
    """
    theirs = None if teacher.network is None else teacher.network.config.prior
    check_start(run, theirs)
    return teacher


def _guided(run: ResolvedRun, slot: TeacherSlot) -> BuiltTeacher:
    built = _before_limits(run, slot)
    if built.network is None or run.cards[0].kind != "diffusers":
        return built
    spec = built.network.config.net
    assert isinstance(spec, DiffusersModel)
    limit = spec.limit()
    if limit is None:
        return built
    clock, _ = spec.clock()
    ends = {"first": clock.t_min, "last": clock.t_max} if isinstance(clock, TableClock) else {}
    return replace(built, guided=LimitedTeacher(built.guided, limit, **ends))


def _before_limits(run: ResolvedRun, slot: TeacherSlot) -> BuiltTeacher:
    card = run.cards[0]
    strong, network, modules = _load(card, run, slot)
    weak, weak_modules = strong, tuple[nn.Module, ...]()
    if isinstance(slot.guidance, Autoguidance):
        weak, weak_modules = _weak(card, slot.guidance, run, network)
    return BuiltTeacher(guided_by(slot.guidance, strong, weak), network, modules + weak_modules)


def guided_by(guidance: Guidance | None, strong: Teacher, weak: Teacher) -> Teacher:
    """Return the velocity that the settings of guidance make of these two; `weak` is for autoguidance alone."""
    guided = strong
    if isinstance(guidance, ClassifierFree):
        guided = ClassifierFreeTeacher(strong, guidance.default, rescale_patch=guidance.rescale_patch)
    if isinstance(guidance, Autoguidance):
        guided = AutoguidedTeacher(strong, weak, default=guidance.default)
    if guidance is None or (guidance.interval == (0.0, 1.0) and not guidance.interval_input):
        return guided
    return IntervalGuidance(guided, *guidance.interval, default=guidance.default)


def teacher_of_networks(recipe: Recipe, networks: Sequence[FlowMapNet], empty: Cond) -> BuiltTeacher:
    """Return the recipe's teacher made of networks that are there already: its own, and that of its weak model.

    empty: the conditions of an empty text, one row each.
    """
    strong, weak = (NetworkTeacher(net) for net in (networks[0], networks[-1]))
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    return BuiltTeacher(guided_by(guidance, strong, weak), None, tuple(networks)).with_null_conditions(empty)


def _load(
    card: Card, run: ResolvedRun, slot: TeacherSlot | None = None
) -> tuple[Teacher, Student | None, tuple[nn.Module, ...]]:
    """Return a card's teacher and its networks, with the LoRA of `slot`."""
    if card.kind == "exact":
        return _exact(card, run), None, ()
    if card.kind == "diffusers":
        return _pretrained(card, run, slot)
    if card.kind == "module":
        return load_module(run)
    if card.kind == "converted" and (line := missing_weights(card)):
        raise RecipeError(f"{run.name}: teacher.card: {line}")
    student = load_student(_trained_folder(card, run) if card.kind == "recipe" else weights_folder(card))
    return NetworkTeacher(student.flow_map), student, (student.flow_map,)


def _exact(card: Card, run: ResolvedRun) -> MixtureTeacher:
    data = run.recipe.data
    if not isinstance(data, KnownDensity):
        raise RecipeError(
            f"{run.name}: teacher.card: {card.name!r} is exact, which needs data of a known density (kind: toy)"
        )
    means = tuple(tuple(row) for row in data.means.tolist())
    return MixtureTeacher(means=means, std=(data.std,), weights=tuple(data.weights.tolist()))


def _pretrained(
    card: Card, run: ResolvedRun, slot: TeacherSlot | None
) -> tuple[Teacher, Student, tuple[nn.Module, ...]]:
    try:
        spec, net = load_pretrained(card.pipeline, card.revision, as_stored=_as_stored(run.recipe))
        spec.check_teacher(tuple(card.shape))
    except ValueError as error:
        raise RecipeError(f"{run.name}: teacher.card: {card.name!r}: {error}") from error
    base = None if slot is None else _with_lora(run, card, slot, net)
    flow_map = FlowMapNet(net)
    if any(p.dtype == torch.bfloat16 for p in net.parameters()):
        hold(flow_map.requires_grad_(False), torch.bfloat16)
    config = StudentConfig(
        net=spec,
        sampler=run.recipe.sampler,
        shape=tuple(card.shape),
        num_classes=card.num_classes,
        arrival=False,
        samples=Pixels(clamp=False),
        base=base,
    )
    return NetworkTeacher(flow_map), Student(config, flow_map), (flow_map,)


def _with_lora(run: ResolvedRun, card: Card, slot: TeacherSlot, net: DiffusersNet) -> Base | None:
    """Add the slot's LoRA to the network, and return what a LoRA student's adapters are relative to; None without one.

    The hash is that of the weights before, which are the same to the bit wherever they are read.
    """
    if slot.lora is None:
        return None
    hashed = run.recipe.lora is not None and not is_child()
    base = Base(card.pipeline, card.revision, fingerprint(net.model) if hashed else "", slot.lora, slot.lora_scale)
    try:
        add_file(net.model, lora_path(slot.lora, "teacher.lora"), slot.lora_scale, "teacher.lora")
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error
    return base


def _as_stored(recipe: Recipe) -> bool:
    """Whether weights in bfloat16 are to stay so: the run rounds them to it, and nothing is fitted or added to them."""
    start, slot = recipe.start, recipe.teacher
    fitted = isinstance(start, FromTeacher) and start.time_embedding is not None
    changed = fitted or (slot is not None and slot.lora is not None)
    return recipe.trainer.frozen_precision == "bf16" and not changed


def _trained_folder(card: Card, run: ResolvedRun) -> Path:
    return run.finished(run.trainer_of(card), "teacher")


def _weak(
    card: Card, guidance: Autoguidance, run: ResolvedRun, network: Student | None
) -> tuple[Teacher, tuple[nn.Module, ...]]:
    """Return the weak teacher of an autoguidance and its networks."""
    if guidance.weak is not None:
        weak, _, modules = _load(run.cards[1], run)
        return weak, modules
    if network is None:
        raise RecipeError(
            f"{run.name}: teacher.guidance: snapshot and skip_blocks need a teacher that is a network of ours"
        )
    if guidance.skip_blocks:
        flow_map = _without_blocks(network, guidance.skip_blocks, run)
    else:
        assert guidance.snapshot is not None  # Autoguidance has checked this.
        # Copied, not built: the state of a LoRA student does not include its base.
        flow_map = copy.deepcopy(network.flow_map)
        flow_map.load_state_dict(nearest_snapshot(_trained_folder(card, run), share=guidance.snapshot))
    return NetworkTeacher(flow_map), (flow_map,)


def _without_blocks(network: Student, skip: tuple[int, ...], run: ResolvedRun) -> FlowMapNet:
    net = network.flow_map.net
    if not isinstance(net, HasBlocks):
        raise RecipeError(f"{run.name}: teacher.guidance.skip_blocks: this teacher's network has no blocks to skip")
    try:
        return FlowMapNet(net.without_blocks(skip))
    except ValueError as error:
        raise RecipeError(f"{run.name}: teacher.guidance.{error}") from error

"""The networks that a run trains, made by their builders on the meta device: shapes and parameters, no weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import nn

from flowmap.build.discriminator import build_discriminator
from flowmap.build.fake_score import build_fake
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import BuiltTeacher
from flowmap.data.outline import DataOutline
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import Base
from flowmap.objectives import Adversarial
from flowmap.plan.named_networks import shipped_net, spec_of
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.kinds import StudentSpec
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student
from flowmap.teachers.card import Card
from flowmap.teachers.network import NetworkTeacher


@dataclass(frozen=True)
class Networks:
    """discriminator: None also if it reads the features of a teacher whose network nothing states."""

    student: FlowMapNet
    fake: FlowMapNet | None
    discriminator: nn.Module | None

    @staticmethod
    def of(run: ResolvedRun, config: StudentConfig) -> Networks:
        """Build the networks. Nothing of the teacher, and of the run that the student starts from, need be here.

        The student is that of `shared_outline`.
        """
        with torch.device("meta"):
            teacher, start = _teacher(run, config), _start(run, config)
            student = build_student(run, config, teacher, start=start)
            _keep((nameless(config), None), student)
            fake = build_fake(run, config, teacher, start=start)
        return Networks(student, fake, _discriminator(run, config, teacher))


def config_without_weights(run: ResolvedRun, data: DataOutline | None) -> StudentConfig | None:
    """Return the student's configuration without weights or samples; None if nothing states its network."""
    recipe = run.recipe
    if run.net is None or data is None:
        return None
    config = student_config(run.changed(student=run.net), data, None)
    if recipe.lora is None:
        return config
    card = run.cards[0]
    return replace(config, lora=recipe.lora, base=Base(card.pipeline, card.revision))


def outline_of_network(config: StudentConfig) -> FlowMapNet:
    """Return a student's network on the meta device, a copy of its own for the caller."""
    return copy.deepcopy(shared_outline(config))


def shared_outline(config: StudentConfig) -> FlowMapNet:
    """Return a student's network on the meta device, which is the same for all callers: none may change it.

    Each distinct network is built once in a process, as far as the last few are kept.
    """
    key = nameless(config), None
    if key not in _BUILT:
        with torch.device("meta"):
            _keep(key, config.build())
    return _BUILT[key]


def frozen_outline(config: StudentConfig, dtype: torch.dtype) -> FlowMapNet:
    """Return the shared network in that precision as a teacher, or samples, use it: in eval mode, nothing trained."""
    key = nameless(config), dtype
    if key not in _BUILT:
        _keep(key, outline_of_network(config).to(dtype).eval().requires_grad_(False))
    return _BUILT[key]


_BUILT: OrderedDict[tuple[StudentConfig, torch.dtype | None], FlowMapNet] = OrderedDict()
MOST = 12  # networks that are kept


def nameless(config: StudentConfig) -> StudentConfig:
    """Return the configuration without what names its run."""
    return replace(config, recipe="", recipe_hash="", step=0)


def _keep(key: tuple[StudentConfig, torch.dtype | None], net: FlowMapNet) -> None:
    """Keep a network that is shared."""
    _BUILT[key] = net.to("meta")  # some libraries make tables with numpy
    while len(_BUILT) > MOST:
        _BUILT.popitem(last=False)


def teacher_configs(run: ResolvedRun, config: StudentConfig) -> list[tuple[Card, StudentConfig]]:
    """Return each card of the guided velocity with the configuration of its network, if something states that."""
    found = []
    for card, spec in zip(run.cards, run.teacher_nets, strict=True):
        if spec is not None:
            num_classes = config.num_classes if card.kind == "recipe" else card.num_classes
            found.append((card, replace(of_teacher(config, spec), num_classes=num_classes)))
    return found


def pairs_config(run: ResolvedRun, config: StudentConfig) -> StudentConfig | None:
    """Return the configuration of the network that makes the run's pairs; None if nothing states it."""
    cards, trained = run.pairs_cards, run.pairs_teachers
    spec = shipped_net(trained[0].net) if trained else spec_of(cards[0]) if cards else None
    return None if spec is None else of_teacher(config, spec)


def of_teacher(config: StudentConfig, spec: StudentSpec) -> StudentConfig:
    """Return the configuration of a teacher with that network, for the student's samples."""
    return replace(config, net=spec, arrival=False, guidance=None, lora=None, base=None)


def _teacher(run: ResolvedRun, config: StudentConfig) -> BuiltTeacher | None:
    """Return the teacher without guidance, if a network is made of it or reads its features; None without one."""
    spec = run.teacher_nets[0] if run.teacher_nets else None
    if spec is None or not (isinstance(run.recipe.start, (FromTeacher, FromRecipe)) or _reads_teacher(run)):
        return None
    plain = of_teacher(config, spec)
    flow_map = outline_of_network(plain)
    return BuiltTeacher(NetworkTeacher(flow_map), Student(plain, flow_map), (flow_map,))


def _start(run: ResolvedRun, config: StudentConfig) -> FlowMapNet | None:
    """Return a network as that of the run from which the student starts, if it starts from one."""
    spec = shipped_net(run.starts[0].net) if isinstance(run.recipe.start, FromRecipe) else None
    return None if spec is None else outline_of_network(of_teacher(config, spec))


def _reads_teacher(run: ResolvedRun) -> bool:
    objective = run.recipe.objective
    return isinstance(objective, Adversarial) and objective.discriminator.trunk == "teacher"


def _discriminator(run: ResolvedRun, config: StudentConfig, teacher: BuiltTeacher | None) -> nn.Module | None:
    if not isinstance(run.recipe.objective, Adversarial) or (_reads_teacher(run) and teacher is None):
        return None
    if teacher is None:
        return build_discriminator(run, config, None).to("meta")
    with torch.device("meta"):  # of the example that the heads are made for
        return build_discriminator(run, config, teacher.to("meta")).to("meta")

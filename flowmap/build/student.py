"""Build a recipe's student: its configuration, and its network with the weights that training starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from flowmap.base.distributed import is_child
from flowmap.base.schema import RecipeError, kind_of
from flowmap.build.module import start_module
from flowmap.build.teacher import BuiltTeacher
from flowmap.build.text import fitted, text_latents
from flowmap.data import Dataset
from flowmap.data.outline import DataOutline, outline_of
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import check_text
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.lora import Base, fingerprint, start_adapters
from flowmap.nets.lora_file import lora_path
from flowmap.nets.module import without_source
from flowmap.nets.precision import KEPT
from flowmap.nets.stacked import Stacked, net_within
from flowmap.nets.unfilled import weights_dropped
from flowmap.plan.cards import lora_card
from flowmap.plan.guidance import check_conditions
from flowmap.plan.named_networks import as_started, stacked
from flowmap.plan.plan import ResolvedRun
from flowmap.plan.provenance import baked_scale
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.config import SHIPPED_AUTOENCODER, ImageLatents, Pixels, StudentConfig, TextLatents
from flowmap.student.config_file import read_config
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import Autoencoder


@runtime_checkable
class HasDropout(Protocol):
    """The settings of a network with dropout, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dropout(self) -> float: ...


def student_config(run: ResolvedRun, data: Dataset | DataOutline, teacher: BuiltTeacher | None) -> StudentConfig:
    """Return the student's configuration: its network, sample shape, conditions and sampler.

    data: the samples, or their outline alone. Raises RecipeError if the network does not match the data, the objective
    or what it starts from.
    """
    recipe, outline = run.recipe, data if isinstance(data, DataOutline) else outline_of(data)
    check_conditions(recipe, outline)
    start = _start(run, teacher)
    net = _net(run, outline, start)
    conditional = recipe.data.conditional
    guidance = recipe.teacher.guidance if recipe.teacher else None
    return StudentConfig(
        net=net,
        sampler=recipe.sampler,
        shape=outline.shape,
        num_classes=outline.num_classes if conditional else None,
        class_names=_class_names(outline, start) if conditional else None,
        arrival=not recipe.objective.diagonal,
        guidance=(*guidance.scale, guidance.default) if guidance else None,
        baked_guidance=baked_scale(run),
        guidance_interval=guidance.interval if guidance and guidance.interval_input else None,
        samples=_samples(run, outline),
        text=recipe.data.text,
        lora=recipe.lora,
        base=_base(run, teacher) if recipe.lora else None,
        prior=run.prior,
        recipe=recipe.name,
        recipe_hash=recipe.hash(),
    )


def build_student(
    run: ResolvedRun,
    config: StudentConfig,
    teacher: BuiltTeacher | None,
    *,
    start: FlowMapNet | None = None,
    share: bool = False,
) -> FlowMapNet:
    """Return the student at step 0.

    Its weights are those that the recipe starts from, else random ones drawn with the recipe's seed. Frozen weights
    under adapters are the teacher's own parameters; all others are trained.

    start: the network of the run that the student starts from, in place of the weights that this run has written.
    share: let the student have the memory of what it starts from, in whose precision it is, until it is sharded.
    """
    recipe, network = run.recipe, None if teacher is None else teacher.network
    with torch.random.fork_rng(devices=[]):
        try:
            if config.lora is not None:
                assert network is not None
                torch.manual_seed(recipe.seed)
                flow_map = config.build(network.flow_map.net)
                flow_map.held = network.flow_map.held
                _start_adapters(run, flow_map)
                return flow_map
            if start is None:
                start = _started_from(run, network)
            if share and (shared := _sharing(run, config, start)) is not None:
                return shared.requires_grad_(True)
            torch.manual_seed(recipe.seed)
            flow_map = config.build()
            if start is not None:
                start_from(flow_map, start)
            start_module(run, flow_map)
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: student: {error}") from error
    return flow_map.requires_grad_(True)


def _start_adapters(run: ResolvedRun, flow_map: FlowMapNet) -> None:
    """Give the adapters the matrices of the recipe's `lora_start`, if any and if they have memory."""
    start = run.recipe.start
    if not isinstance(start, FromTeacher) or start.lora_start is None:
        return
    if not any(p.is_meta for p in flow_map.parameters()):
        start_adapters(flow_map.net, lora_path(start.lora_start, "lora_start"), "lora_start")


def _started_from(run: ResolvedRun, network: Student | None) -> FlowMapNet | None:
    """Return the network whose weights the student starts from, if any."""
    if isinstance(run.recipe.start, FromTeacher):
        assert network is not None
        return network.merged().flow_map
    return load_student(started_folder(run)).merged().flow_map if isinstance(run.recipe.start, FromRecipe) else None


def _sharing(run: ResolvedRun, config: StudentConfig, start: FlowMapNet | None) -> FlowMapNet | None:
    """Return the student in the memory of the network that it starts from.

    None unless it is a pipeline's network, which draws no weights after those of its layers, and has none but branches
    that the other has not.
    """
    if start is None or not isinstance(net_within(config.net), DiffusersModel):
        return None
    torch.manual_seed(run.recipe.seed)
    with weights_dropped(KEPT):
        flow_map = config.build()
    start_from(flow_map, start, share=True)
    return None if any(p.is_meta for p in flow_map.parameters()) else flow_map


def started_folder(run: ResolvedRun) -> Path:
    """Return the student folder that a student of kind from_recipe starts from."""
    return run.finished(run.starts[0], "student.recipe") / "student"


def shipped_autoencoder(run: ResolvedRun) -> Autoencoder | None:
    """Return the autoencoder as the student names it: one that a recipe trained is copied into the student's folder."""
    autoencoder = run.recipe.data.autoencoder
    if autoencoder is None or autoencoder.recipe is None:
        return autoencoder
    return replace(autoencoder, source=SHIPPED_AUTOENCODER, recipe=None)


def _net(run: ResolvedRun, data: DataOutline, start: StudentConfig | None) -> StudentSpec:
    """Return the settings of the student's network, checked against the data, the objective and its start."""
    recipe, net = run.recipe, without_source(run.recipe.student)
    if start is not None:
        net = as_started(recipe, start.net) or start.net
        net = stacked(net) if isinstance(recipe.student, Stacked) else net
        _check_start(run, data, start)
    _check_dropout(run, net)
    if data.sentences is not None:
        net = fitted(run, net, data.sentences)
    if isinstance(net_within(net), DiffusersModel):
        try:
            check_text(net_within(net), data.conditions)
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: {error}") from error
    return net


def _check_start(run: ResolvedRun, data: DataOutline, start: StudentConfig) -> None:
    recipe = run.recipe
    if start.shape != data.shape:
        teacher_name = recipe.teacher.name if recipe.teacher else ""
        origin = recipe.start.recipe if isinstance(recipe.start, FromRecipe) else f"the teacher {teacher_name}"
        raise RecipeError(f"{recipe.name}: data: its samples are {data.shape}, those of {origin} {start.shape}")
    if start.arrival and recipe.objective.diagonal:
        raise RecipeError(
            f"{recipe.name}: student: it starts from a flow map, and this objective trains only the diagonal, t = s"
        )


def _check_dropout(run: ResolvedRun, net: StudentSpec) -> None:
    within, way = net_within(net), run.recipe.distillation.derivative
    if isinstance(within, HasDropout) and within.dropout and way not in (None, "dual"):
        raise RecipeError(
            f"{run.name}: student.dropout: {within.dropout} wants objective.derivative: dual; "
            f"{way!r} would see another mask"
        )


def _samples(run: ResolvedRun, data: DataOutline) -> Pixels | ImageLatents | TextLatents:
    """Return what the student's samples are, and what decodes them."""
    autoencoder = shipped_autoencoder(run)
    if data.sentences is not None:
        return text_latents(run, data.sentences, autoencoder)
    if autoencoder is not None:
        return ImageLatents(autoencoder)
    return Pixels(clamp=len(data.shape) == 3 and run.recipe.data.in_pixels)


def _class_names(data: DataOutline, start: StudentConfig | None) -> tuple[str, ...] | None:
    """Return the data's class names or, if it has none, those of the network that the student starts from."""
    known = start.class_names if start is not None and start.num_classes == data.num_classes else None
    return data.class_names or known


def _start(run: ResolvedRun, teacher: BuiltTeacher | None) -> StudentConfig | None:
    """Return the configuration of what the student starts from, its teacher or another student; None without one."""
    recipe = run.recipe
    if isinstance(recipe.start, FromRecipe):
        return read_config(started_folder(run) / "config.json")
    if not isinstance(recipe.start, FromTeacher):
        return None
    if teacher is None or teacher.network is None:
        raise RecipeError(f"{recipe.name}: student.kind: from_teacher needs a teacher that is a network")
    config = teacher.network.config
    return config if recipe.start.dropout is None else replace(config, net=_with_dropout(config.net, run))


def _with_dropout(net: StudentSpec, run: ResolvedRun) -> StudentSpec:
    """Return the network's settings with the recipe's dropout."""
    recipe = run.recipe
    if not isinstance(net, HasDropout):
        raise RecipeError(f"{recipe.name}: student.dropout: a network of kind {kind_of(net, TABLES)} has none")
    assert isinstance(recipe.start, FromTeacher)
    try:
        return replace(net, dropout=recipe.start.dropout)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: student.dropout: {error}") from error


def _base(run: ResolvedRun, teacher: BuiltTeacher | None) -> Base:
    """Return the source of a LoRA student's frozen weights: the teacher's card, and its LoRA.

    The first process, which writes the student's folder, reads them all for their hash; the others leave it empty.
    """
    card = lora_card(run.recipe)
    assert teacher is not None and teacher.network is not None  # of kind diffusers
    if teacher.network.config.base is not None:
        return teacher.network.config.base
    digest = "" if is_child() else fingerprint(teacher.network.flow_map.net.model)
    return Base(card.pipeline, card.revision, digest)

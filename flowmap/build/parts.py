"""A recipe becomes objects: the one place that joins data, networks and teachers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmap.base.schema import RecipeError, kind_of
from flowmap.build.prior import build_prior
from flowmap.build.text import fitted, text_latents
from flowmap.data import Dataset, Independent, PairedDataset, Pairs, StyledDataset, TeacherSlot, TextDataset
from flowmap.flow.clock import TableClock
from flowmap.flow.solver import Euler
from flowmap.flow.types import Cond, Teacher
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import check_text
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.lora import Base, fingerprint
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.stacked import Stacked, net_within
from flowmap.objectives import FlowMatching
from flowmap.plan.cards import card_of, find_card, lora_card, pairs_teacher, weights_folder
from flowmap.plan.dependencies import pairs_recipes, start_recipes, styles_of
from flowmap.plan.guidance import check_conditions
from flowmap.plan.named_networks import missing_weights, stacked
from flowmap.plan.plan import data_of, pairs_identity, pairs_of, trained_run
from flowmap.plan.provenance import baked_scale
from flowmap.plan.requirements import check_sizes, check_start, shipped_prior
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.recipe.settings import Autoguidance, ClassifierFree, FromRecipe, FromTeacher
from flowmap.student.config import SHIPPED_AUTOENCODER, ImageLatents, Pixels, StudentConfig, TextLatents
from flowmap.student.folder import load_student, read_config
from flowmap.student.snapshots import nearest_snapshot
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import Autoencoder, FrozenAutoencoder
from flowmap.teachers.card import Card
from flowmap.teachers.exact import MixtureTeacher
from flowmap.teachers.guidance import Autoguidance as AutoguidedTeacher
from flowmap.teachers.guidance import ClassifierFree as ClassifierFreeTeacher
from flowmap.teachers.limited import Limited as LimitedTeacher
from flowmap.teachers.network import NetworkTeacher


@dataclass(frozen=True)
class BuiltTeacher:
    """The guided velocity that objectives see, and, where the teacher is a network of ours, that network."""

    guided: Teacher
    network: Student | None
    modules: tuple[nn.Module, ...] = ()

    def to(self, device) -> BuiltTeacher:
        for module in self.modules:
            module.to(device)
        return self

    def with_null_conditions(self, empty: Cond) -> BuiltTeacher:
        """Itself, its networks told the conditions (one row each) of an empty text."""
        for module in self.modules:
            if hasattr(module.net, "empty"):
                module.net.empty = dict(empty)
        return self

    def solve(self, x1: Tensor, cond: Cond | None, steps: int) -> Tensor:
        """Where Euler's steps along the guided velocity take x1."""
        return Euler(steps=steps)(lambda x, t: self.guided.velocity(x, t, cond), x1).x

    @property
    def calls_per_step(self) -> int:
        return getattr(self.guided, "network_calls", 1)


def build_data(recipe: Recipe) -> Dataset:
    """The recipe's data, which has what the recipe's metrics need; RecipeError otherwise."""
    try:
        data = data_of(recipe).build()
        styles = styles_of(recipe)
        data = StyledDataset.of(data, styles) if styles is not None else data
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error
    check_sizes(recipe, data)
    return data


def build_samples(recipe: Recipe, data: Dataset) -> Dataset | PairedDataset:
    """What training reads: the data itself, or the pairs made of it, checked against what the recipe wants."""
    if not isinstance(recipe.coupling, Pairs):
        return data
    try:
        return PairedDataset(Path(pairs_of(recipe).root), data, pairs_identity(recipe), build_prior(recipe))
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error


def build_decoder(recipe: Recipe) -> FrozenAutoencoder | None:
    """What makes pictures of the recipe's latents, where its objective looks at pictures; None where it needs none."""
    if recipe.data.in_pixels or not recipe.distillation.sees_pictures:
        return None
    try:
        return data_of(recipe).autoencoder.load()
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: data.{error}") from error


def build_pairs_teacher(recipe: Recipe, data: Dataset) -> BuiltTeacher:
    """What makes the recipe's pairs; its guided velocity reads the scale as cond["guidance"]. RecipeError for samples of another shape."""
    check_conditions(recipe, data)
    alone = recipe.changed(teacher=pairs_teacher(recipe), coupling=Independent(), objective=FlowMatching())
    built = build_teacher(alone, data)
    if built is None:
        student = load_student(trained_run(pairs_recipes(recipe)[0], recipe, "coupling.recipe"))
        built = _same_start(recipe, BuiltTeacher(NetworkTeacher(student.flow_map), student, (student.flow_map,)))
    if built.network is not None and tuple(built.network.config.shape) != tuple(data.shape):
        raise RecipeError(
            f"{recipe.name}: coupling: its teacher's samples are {built.network.config.shape}, those of the data {data.shape}"
        )
    return built


def build_teacher(recipe: Recipe, data: Dataset | None = None) -> BuiltTeacher | None:
    """The recipe's teacher with its guidance, its weights read from the runs that trained it; None where the recipe has none.

    From the data come the conditions of an empty text, which guidance without a condition needs.
    """
    if recipe.teacher is None:
        return None
    return _same_start(recipe, _guided(recipe, recipe.teacher)).with_null_conditions({} if data is None else data.empty)


def _same_start(recipe: Recipe, teacher: BuiltTeacher) -> BuiltTeacher:
    """The teacher; RecipeError unless its paths start at the recipe's own prior, N(0, I) for teachers that are no networks of ours."""
    theirs = None if teacher.network is None else teacher.network.config.prior
    check_start(recipe, theirs, shipped_prior(recipe))
    return teacher


def _guided(recipe: Recipe, slot: TeacherSlot) -> BuiltTeacher:
    built = _before_limits(recipe, slot)
    if built.network is None or card_of(slot).kind != "diffusers":
        return built
    spec = built.network.config.net
    assert isinstance(spec, DiffusersModel)
    limit = spec.limit()
    if limit is None:
        return built
    clock, _ = spec.clock()
    ends = {"first": clock.t_min, "last": clock.t_max} if isinstance(clock, TableClock) else {}
    return replace(built, guided=LimitedTeacher(built.guided, limit, **ends))


def _before_limits(recipe: Recipe, slot: TeacherSlot) -> BuiltTeacher:
    card = card_of(slot)
    strong, network, modules = _load(card, recipe)
    guidance = slot.guidance
    if isinstance(guidance, ClassifierFree):
        return BuiltTeacher(ClassifierFreeTeacher(strong, default=guidance.default), network, modules)
    if isinstance(guidance, Autoguidance):
        weak, weak_modules = _weak(card, guidance, recipe, network)
        return BuiltTeacher(AutoguidedTeacher(strong, weak, default=guidance.default), network, modules + weak_modules)
    return BuiltTeacher(strong, network, modules)


def _load(card: Card, recipe: Recipe) -> tuple[Teacher, Student | None, tuple[nn.Module, ...]]:
    if card.kind == "exact":
        if not all(hasattr(recipe.data, name) for name in ("means", "std", "weights")):
            raise RecipeError(
                f"{recipe.name}: teacher.card: {card.name!r} is exact, which needs data of a known density (kind: toy)"
            )
        return _exact(recipe.data), None, ()
    if card.kind == "diffusers":
        return _pretrained(card, recipe)
    if card.kind == "converted" and (line := missing_weights(card)):
        raise RecipeError(f"{recipe.name}: teacher.card: {line}")
    student = load_student(trained_folder(card, recipe) if card.kind == "recipe" else weights_folder(card))
    return NetworkTeacher(student.flow_map), student, (student.flow_map,)


def _pretrained(card: Card, recipe: Recipe) -> tuple[Teacher, Student, tuple[nn.Module, ...]]:
    try:
        spec, net = load_pretrained(card.pipeline, card.revision)
        spec.check_teacher(tuple(card.shape))
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: teacher.card: {card.name!r}: {error}") from error
    flow_map = FlowMapNet(net)
    config = StudentConfig(
        net=spec,
        sampler=recipe.sampler,
        shape=tuple(card.shape),
        num_classes=card.num_classes,
        arrival=False,
        samples=Pixels(clamp=False),
    )
    return NetworkTeacher(flow_map), Student(config, flow_map), (flow_map,)


def _exact(data) -> MixtureTeacher:
    means = tuple(tuple(row) for row in data.means.tolist())
    return MixtureTeacher(means=means, std=(data.std,), weights=tuple(data.weights.tolist()))


def trained_folder(card: Card, recipe: Recipe) -> Path:
    assert recipe.teacher is not None
    return trained_run(recipe.named(card.trained_by, recipe.teacher.overrides), recipe, "teacher")


def _weak(
    card: Card, guidance: Autoguidance, recipe: Recipe, network: Student | None
) -> tuple[Teacher, tuple[nn.Module, ...]]:
    if guidance.weak is not None:
        weak, _, modules = _load(find_card(guidance.weak), recipe)
        return weak, modules
    if network is None:
        raise RecipeError(
            f"{recipe.name}: teacher.guidance: snapshot and skip_blocks need a teacher that is a network of ours"
        )
    if guidance.skip_blocks:
        if not hasattr(network.flow_map.net, "without_blocks"):
            raise RecipeError(
                f"{recipe.name}: teacher.guidance.skip_blocks: this teacher's network has no blocks to skip"
            )
        try:
            flow_map = FlowMapNet(network.flow_map.net.without_blocks(guidance.skip_blocks))
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: teacher.guidance.{error}") from error
    else:
        assert guidance.snapshot is not None  # Autoguidance has checked
        flow_map = copy.deepcopy(network.flow_map)  # not built anew: a LoRA student's state leaves its base out
        flow_map.load_state_dict(nearest_snapshot(trained_folder(card, recipe), share=guidance.snapshot))
    return NetworkTeacher(flow_map), (flow_map,)


def student_config(recipe: Recipe, data: Dataset, teacher: BuiltTeacher | None) -> StudentConfig:
    """What the student is: its network, sample shape, conditions and sampler."""
    guidance = recipe.teacher.guidance if recipe.teacher else None
    check_conditions(recipe, data)
    start = _start(recipe, teacher)
    net = recipe.student if start is None else stacked(start.net) if isinstance(recipe.student, Stacked) else start.net
    if start is not None and start.shape != data.shape:
        teacher_name = recipe.teacher.name if recipe.teacher else ""
        origin = recipe.start.recipe if isinstance(recipe.start, FromRecipe) else f"the teacher {teacher_name}"
        raise RecipeError(f"{recipe.name}: data: its samples are {data.shape}, those of {origin} {start.shape}")
    if start is not None and start.arrival and recipe.objective.diagonal:
        raise RecipeError(
            f"{recipe.name}: student: it starts from a flow map, of which this objective trains only the diagonal, t = s"
        )
    if (share := getattr(net_within(net), "dropout", 0.0)) and (way := recipe.distillation.derivative) not in (
        None,
        "dual",
    ):
        raise RecipeError(
            f"{recipe.name}: student.dropout: {share} wants objective.derivative: dual; {way!r} would see another mask"
        )
    if isinstance(data, TextDataset):
        net = fitted(recipe, net, data)
    if isinstance(net_within(net), DiffusersModel):
        try:
            check_text(net_within(net), data.conditions_at(torch.zeros(1, dtype=torch.int64)))
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: {error}") from error
    return StudentConfig(
        net=net,
        sampler=recipe.sampler,
        shape=data.shape,
        num_classes=data.num_classes if recipe.data.conditional else None,
        class_names=_class_names(data, start) if recipe.data.conditional else None,
        arrival=not recipe.objective.diagonal,
        guidance=(*guidance.scale, guidance.default) if guidance else None,
        baked_guidance=baked_scale(recipe),
        samples=_samples(recipe, data),
        text=recipe.data.text,
        lora=recipe.lora,
        base=_base(recipe, teacher) if recipe.lora else None,
        prior=shipped_prior(recipe),
        recipe=recipe.name,
        recipe_hash=recipe.hash(),
    )


def _samples(recipe: Recipe, data: Dataset) -> Pixels | ImageLatents | TextLatents:
    """Return what the student's samples are, and what decodes them."""
    autoencoder = shipped_autoencoder(recipe)
    if isinstance(data, TextDataset):
        return text_latents(recipe, data, autoencoder)
    if autoencoder is not None:
        return ImageLatents(autoencoder)
    return Pixels(clamp=len(data.shape) == 3 and recipe.data.in_pixels)


def _class_names(data: Dataset, start: StudentConfig | None) -> tuple[str, ...] | None:
    """Those of the data, or where it knows none those of the network that the student starts from."""
    known = start.class_names if start is not None and start.num_classes == data.num_classes else None
    return data.class_names or known


def _start(recipe: Recipe, teacher: BuiltTeacher | None) -> StudentConfig | None:
    """What the student starts from: the teacher, or another recipe's student; None where it is built anew."""
    if isinstance(recipe.start, FromRecipe):
        return read_config(started_folder(recipe) / "config.json")
    if not isinstance(recipe.start, FromTeacher):
        return None
    if teacher is None or teacher.network is None:
        raise RecipeError(f"{recipe.name}: student.kind: from_teacher needs a teacher that is a network")
    config = teacher.network.config
    return config if recipe.start.dropout is None else replace(config, net=_dropping(config.net, recipe))


def _dropping(net: StudentSpec, recipe: Recipe) -> StudentSpec:
    """The network's settings with the recipe's dropout."""
    if not hasattr(net, "dropout"):
        raise RecipeError(f"{recipe.name}: student.dropout: a network of kind {kind_of(net, TABLES)} has none")
    assert isinstance(recipe.start, FromTeacher)
    try:
        return replace(net, dropout=recipe.start.dropout)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: student.dropout: {error}") from error


def started_folder(recipe: Recipe) -> Path:
    """The student/ that a student of kind from_recipe starts from."""
    return trained_run(start_recipes(recipe)[0], recipe, "student.recipe") / "student"


def shipped_autoencoder(recipe: Recipe) -> Autoencoder | None:
    """The autoencoder as the student names it: one that a recipe trained is copied into the student's folder."""
    autoencoder = recipe.data.autoencoder
    if autoencoder is None or autoencoder.recipe is None:
        return autoencoder
    return replace(autoencoder, source=SHIPPED_AUTOENCODER, recipe=None)


def _base(recipe: Recipe, teacher: BuiltTeacher | None) -> Base:
    """Where a LoRA student's frozen weights come from: the teacher's card."""
    card = lora_card(recipe)
    assert teacher is not None and teacher.network is not None  # of kind diffusers
    return Base(card.pipeline, card.revision, fingerprint(teacher.network.flow_map.net.model))


def build_student(recipe: Recipe, config: StudentConfig, teacher: BuiltTeacher | None) -> FlowMapNet:
    """The student at step 0: the weights that it starts from where the recipe says so, else random ones from the recipe's seed.

    Frozen weights under adapters are the teacher's own parameters; all others are trained.
    """
    network = None if teacher is None else teacher.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            if config.lora is not None:
                assert network is not None
                return config.build(network.flow_map.net)
            flow_map = config.build()
            if isinstance(recipe.start, FromTeacher):
                assert network is not None
                start_from(flow_map, network.merged().flow_map)
            elif isinstance(recipe.start, FromRecipe):
                start_from(flow_map, load_student(started_folder(recipe)).merged().flow_map)
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: student: {error}") from error
    return flow_map.requires_grad_(True)

"""The kinds that each slot of a recipe may have: TABLES maps a slot to its classes, by their names in YAML."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from flowmap.data import (
    COUPLINGS,
    DATA,
    IMAGE_SOURCES,
    TEXT_SOURCES,
    TOKENIZERS,
    Autoencoder,
    Coupling,
    Guidance,
    ImageSource,
    TeacherSlot,
    TextCoder,
    TextEncoder,
    TextSource,
    Tokenizer,
)  # fmt: skip
from flowmap.data.dataset import Source
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.flow.distance import DISTANCES, Distance
from flowmap.flow.parts import BaseCoupling, BaseObjective, BasePrior, BaseSampler, Part, complete
from flowmap.flow.path import PATHS
from flowmap.flow.prior import CODE_SAMPLERS, PRIORS, CodeSampler
from flowmap.flow.reward import Reward
from flowmap.flow.solver import SOLVERS, Solver
from flowmap.flow.times import TIMES
from flowmap.flow.types import Objective, Path, Prior, RecipeView, Sampler, TimeSampler
from flowmap.metrics import METRICS
from flowmap.metrics import Spec as Metric
from flowmap.metrics.rewards import REWARDS
from flowmap.nets import DISCRIMINATORS, MODULE_CLOCKS, NETS
from flowmap.nets.module_clock import ModuleClock
from flowmap.nets.stacked import NetSpec, Stacked
from flowmap.nets.text_joint import TextCoderSpec
from flowmap.objectives import OBJECTIVES, TERMS
from flowmap.objectives.adversarial import DiscriminatorSpec
from flowmap.objectives.instaflow import PICTURE_DISTANCES, PictureDistance
from flowmap.objectives.language import TextELBOSpec
from flowmap.objectives.lediflow import WEIGHTS, Weight
from flowmap.objectives.matching import Term
from flowmap.objectives.rectified import DISTANCES as RECTIFIED_DISTANCES
from flowmap.objectives.rectified import RectifiedDistance
from flowmap.objectives.uncertainty import TIME_WEIGHTS, TimeWeight
from flowmap.recipe.module_teacher import ModuleTeacher
from flowmap.recipe.settings import (
    Autoguidance,
    BaseStudent,
    ClassifierFree,
    ConstantEMA,
    Embedded,
    FromRecipe,
    FromTeacher,
    PowerEMA,
)
from flowmap.samplers import SAMPLERS
from flowmap.teachers.autoencoder import AUTOENCODERS
from flowmap.teachers.text import TEXT_ENCODERS


class Data(Protocol):
    """The settings of a data set (Source in data/dataset.py); build() makes it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def batch_size(self) -> int: ...

    @property
    def global_batch_size(self) -> int | None: ...
    @property
    def shuffle(self) -> str: ...

    @property
    def conditional(self) -> bool: ...

    @property
    def drop_condition(self) -> float: ...

    @property
    def drop_attribute(self) -> float: ...

    @property
    def in_pixels(self) -> bool: ...

    @property
    def quick(self) -> bool: ...

    @property
    def images(self) -> Any: ...

    @property
    def autoencoder(self) -> Any: ...

    @property
    def text(self) -> Any: ...

    def check(self, recipe: RecipeView) -> None: ...

    def outline(self) -> tuple[tuple[int, ...], int | None] | None: ...

    def build(self) -> Any: ...


class StudentSpec(Protocol):
    """The settings of a student, a dataclass: those of a network (NetSpec), or what its weights start from.

    Its optional members are those of BaseStudent (settings.py); `student_part` reads them.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]


class EMA(Protocol):
    """How weights are averaged; settings.py has the kinds.

    widths: one average is kept for each, and the first ships. kept(width, step): the share of the average that stays
    when the weights of that step are added.
    """

    @property
    def snapshot_every_steps(self) -> int: ...

    @property
    def widths(self) -> tuple[float, ...]: ...

    def kept(self, width: float, step: int) -> float: ...


def student_part(student: Any) -> BaseStudent:
    """The settings of a student, or their class, with the members of BaseStudent; those it lacks get their defaults."""
    complete(student if isinstance(student, type) else type(student), BaseStudent)
    return student


STARTS = {"from_teacher": FromTeacher, "from_recipe": FromRecipe}

TABLES: Mapping[type, Mapping[str, type]] = {
    Data: DATA,
    ImageSource: IMAGE_SOURCES,
    Autoencoder: AUTOENCODERS,
    TextEncoder: TEXT_ENCODERS,
    TextSource: TEXT_SOURCES,
    Tokenizer: TOKENIZERS,
    TextCoder: {"text": TextAutoencoder},
    StudentSpec: ChainMap(NETS, STARTS),  # live: a kind of a user's may be added to NETS
    NetSpec: {
        **STARTS,
        **{kind: net for kind, net in NETS.items() if net is not Stacked and student_part(net).artifact == "student"},
    },
    TextCoderSpec: {"text_vae": NETS["text_vae"]},
    Objective: OBJECTIVES,
    Term: TERMS,
    TextELBOSpec: {"text_elbo": OBJECTIVES["text_elbo"]},
    DiscriminatorSpec: DISCRIMINATORS,
    Distance: DISTANCES,
    RectifiedDistance: RECTIFIED_DISTANCES,
    PictureDistance: PICTURE_DISTANCES,
    Path: PATHS,
    Prior: PRIORS,
    CodeSampler: CODE_SAMPLERS,
    Weight: WEIGHTS,
    TimeWeight: TIME_WEIGHTS,
    Coupling: COUPLINGS,
    Solver: SOLVERS,
    TimeSampler: TIMES,
    Sampler: SAMPLERS,
    Reward: REWARDS,
    Metric: METRICS,
    Guidance: {"classifier_free": ClassifierFree, "autoguidance": Autoguidance, "embedded": Embedded},
    TeacherSlot: {"card": TeacherSlot, "module": ModuleTeacher},
    ModuleClock: MODULE_CLOCKS,
    EMA: {"power": PowerEMA, "constant": ConstantEMA},
}


class _BaseMetric:
    features: ClassVar[str | None] = None


def parts_of(recipe: Any) -> list[Part]:
    """The parts of a recipe that check what they are combined with, in the order of their checks.

    Their classes, and those of the metrics, get the optional members that they lack: a class of a user inherits nothing
    from ours.
    """
    for metric in recipe.metrics:
        complete(type(metric), _BaseMetric)
    teacher = recipe.teacher
    slots = (
        (teacher, Part),
        (recipe.student, BaseStudent),
        (recipe.data, Source),
        (recipe.coupling, BaseCoupling),
        (recipe.prior, BasePrior),
        (None if teacher is None else teacher.guidance, Part),
        (recipe.sampler, BaseSampler),
        (recipe.objective, BaseObjective),
        (recipe.quantize, Part),
    )
    parts = [_completed(part, defaults) for part, defaults in slots if part is not None]
    kept = recipe.objective.distillation  # of an adversarial stage
    return parts if kept is recipe.objective else [*parts, _completed(kept, BaseObjective)]


def _completed(part: Any, defaults: type[Part]) -> Part:
    complete(type(part), defaults)
    return part

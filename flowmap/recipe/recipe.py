"""A recipe names data, teacher, student and objective. This module reads, overrides, checks and writes recipes.

The config is the object: values (path, times, objective, sampler, optimizer) are frozen dataclasses, and __call__ is
their behaviour. Specs (data, student, metrics) have one build(). A slot in YAML is `kind` plus fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path as File
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # what OmegaConf reads with raises its own errors

from flowmap.base.outside import INTERPOLATION, NO_INTERPOLATION, refuse_interpolations
from flowmap.base.ranges import Seed, check_ranges
from flowmap.base.schema import MISSING, RecipeError, added, check_name, construct, kind_of, short_hash, to_plain
from flowmap.data import Coupling, Independent, TeacherSlot
from flowmap.flow.path import Linear
from flowmap.flow.prior import Gaussian
from flowmap.flow.times import Interval
from flowmap.flow.types import Objective, Path, Prior, Sampler, TimeSampler
from flowmap.nets.lora import LoRA
from flowmap.nets.stacked import net_within
from flowmap.recipe.batches import Batches, batches_of, without_split
from flowmap.recipe.composing import composed, find_recipe, is_part, load, merge
from flowmap.recipe.composing import list_recipes as list_recipes  # others take these from here
from flowmap.recipe.composing import shipped as shipped
from flowmap.recipe.kinds import EMA, TABLES, Data, Metric, StudentSpec, parts_of, student_part
from flowmap.recipe.optimizer import AdamW
from flowmap.recipe.plugins import plugins
from flowmap.recipe.settings import Evaluation, Log, PowerEMA, Quantize, Trainer
from flowmap.samplers import Deterministic


@dataclass(frozen=True)
class Recipe:
    """All the settings of a run; `flowmap show --recipe R` prints it with every default."""

    data: Data
    student: StudentSpec
    objective: Objective
    teacher: TeacherSlot | None = None
    name: str = "unnamed"
    seed: Seed = 0
    path: Path = Linear()
    prior: Prior = Gaussian()
    coupling: Coupling = Independent()
    times: TimeSampler = Interval()
    sampler: Sampler = Deterministic()
    metrics: tuple[Metric, ...] = ()
    evaluation: Evaluation = Evaluation()
    optimizer: AdamW = AdamW()
    ema: EMA = PowerEMA()
    trainer: Trainer = Trainer()
    log: Log = Log()
    quantize: Quantize = added(Quantize())

    def __post_init__(self):
        check_ranges(self)
        check_name(self.name, "name")
        parts = parts_of(self)
        batches_of(self.data, self.trainer)  # raises ValueError for a global batch that cannot be split so
        self._check_artifact()
        for part in parts:
            part.check(self)

    @cached_property
    def _read(self) -> dict[tuple[str, tuple[str, ...]], Recipe]:
        """The recipes that this one and those that it names have read, by name and overrides."""
        return {}

    def named(self, name: str | File, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe of that name, on which this one builds. It is read once for this recipe and all that it leads to.

        Raises RecipeError as `read_recipe` does.
        """
        key = (str(name), tuple(overrides))
        if key not in self._read:
            found = self._read[key] = read_recipe(name, overrides)
            found.__dict__["_read"] = self._read  # frozen fields, but what it names is remembered in one place
        return self._read[key]

    def changed(self, **fields: Any) -> Recipe:
        """This recipe with other values in those fields. The recipes that it names are not read again."""
        found = replace(self, **fields)
        found.__dict__["_read"] = self._read
        return found

    @property
    def distillation(self) -> Objective:
        """The objective that compares the student with its teacher: the recipe's, or the one that an adversarial stage
        keeps.
        """
        return self.objective.distillation

    @property
    def key(self) -> str:
        """The key of `distillation`."""
        key, found = "objective", self.objective
        while found is not self.distillation:
            key, found = f"{key}.base", cast(Any, found).base
        return key

    @property
    def start(self) -> StudentSpec:
        """The source of the student's weights: the teacher, another recipe, or a network's settings; of a stack, that
        of both.
        """
        return net_within(self.student)

    @property
    def batches(self) -> Batches:
        """How the samples of an optimizer step are split."""
        return batches_of(self.data, self.trainer)

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained instead of the student's weights, None without any."""
        return student_part(self.student).lora

    def _check_artifact(self) -> None:
        """Raise ValueError where the objective trains another kind of network than the student's."""
        if student_part(self.student).artifact == self.artifact:
            return
        kinds = [kind for kind, net in TABLES[StudentSpec].items() if student_part(net).artifact == self.artifact]
        objective, student = kind_of(self.objective, TABLES), kind_of(self.student, TABLES)
        raise ValueError(
            f"objective: {objective} does not train a student of kind {student}; allowed: {', '.join(kinds)}"
        )

    @property
    def artifact(self) -> str:
        """What the run writes to student/: a student, an autoencoder, a text_autoencoder, a text_joint, or a prior."""
        return self.objective.artifact

    def to_yaml(self) -> str:
        """The resolved recipe as text, with every default. Reading it gives the same recipe."""
        return self._text

    @cached_property
    def _text(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(to_plain(self, TABLES)))

    def hash(self) -> str:
        """Eight hexadecimal digits of all that changes the result, which the settings of `log` do not, nor the devices
        that share a global batch.
        """
        plain = without_retention(without_split(to_plain(self, TABLES, hashed=True)))
        return short_hash(in_old_words({key: value for key, value in plain.items() if key != "log"}))

    def training(self) -> dict[str, Any]:
        """The settings that the trained weights depend on, as plain values; later settings only where they are set.

        Log, sampler, metrics and evaluation are not among them, except that an objective that draws samples depends on
        the sampler, without the steps that are reported. The devices that share a global batch are not among them.
        """
        plain = {
            key: value
            for key, value in without_retention(without_split(to_plain(self, TABLES, hashed=True))).items()
            if key not in ("sampler", "metrics", "evaluation", "log")
        }
        if self.objective.draws_samples or self.distillation.draws_samples:
            sampler = to_plain(self.sampler, TABLES, hashed=True)
            plain["sampler"] = {key: value for key, value in sampler.items() if key != "steps"}
        return plain

    def training_hash(self) -> str:
        """Eight hexadecimal digits of all settings in `training`."""
        return short_hash(in_old_words(self.training()))

    def missing(self) -> list[str]:
        """The keys with the value ???, which must be given before a run."""
        return _missing(to_plain(self, TABLES), "")


RETENTION = ("checkpoint_every_minutes", "keep_checkpoints", "milestone_every_steps")
KEYS = [f.name for f in fields(Recipe)]


def without_retention(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that say which checkpoints are kept: they change no weight."""
    return {**plain, "trainer": {key: value for key, value in plain["trainer"].items() if key not in RETENTION}}


def in_old_words(plain: Any) -> Any:
    """Settings with the names of version 0.1, of which hashes are taken: a renamed setting changes no hash."""
    if isinstance(plain, (list, tuple)):
        return type(plain)(in_old_words(value) for value in plain)
    if not isinstance(plain, Mapping):
        return plain
    learned = plain.get("kind") == "learned"
    words = {"conditioning": "told"} if learned else {}
    return {
        words.get(key, key): "ride" if (key, value) == ("derivative", "dual") else in_old_words(value)
        for key, value in plain.items()
    }


def read_recipe(name: str | File, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path. RecipeError names file, key, value and what is allowed.

    overrides: `key=value`, or `+FILE`, a file of settings merged over the recipe before any key=value.
    """
    path = find_recipe(name)
    if is_part(path):
        raise RecipeError(
            f"{name}: is a part of recipes and none by itself; it goes into `base:` of one, or over one as +{name}"
        )
    plain = composed(path, KEYS)
    for override in (word for word in overrides if word.startswith("+")):
        plain = merge(plain, composed(find_recipe(override[1:]), KEYS))
    plain.setdefault("name", path.stem if path.parent.name in ("recipes", "") else f"{path.parent.name}-{path.stem}")
    settings: Any = {**_defaults(), **plain}
    if values := [word for word in overrides if not word.startswith("+")]:
        config = OmegaConf.create(settings)
        for override in values:
            _override(config, override)
        settings = OmegaConf.to_container(config, resolve=False)
    # lediflow/digits.yaml, as there are several digits.yaml
    file = f"{name}.yaml" if str(name).endswith(path.stem) else path.name
    return recipe_from(settings, file=file)


def _defaults() -> dict[str, Any]:
    """The defaults of slots that a recipe may omit, so that an override may name one of their fields."""
    return {f.name: to_plain(f.default, TABLES) for f in fields(Recipe) if is_dataclass(f.default)}


def recipe_from(plain: Mapping[str, Any], *, file: str) -> Recipe:
    plugins()
    return construct(Recipe, plain, TABLES, file=file)


@dataclass(frozen=True)
class _Sampling:
    sampler: Sampler


def sampler_from(plain: Mapping[str, Any], overrides: Sequence[str]) -> Any:
    """The sampler of these settings and of `key=value` of the command line. RecipeError as for a recipe's."""
    plugins()
    config = OmegaConf.create({"sampler": dict(plain)})
    for override in overrides:
        _override(config, f"sampler.{override}")
    settings: Any = OmegaConf.to_container(config, resolve=False)
    return construct(_Sampling, settings, TABLES, file="command line").sampler


def read_resolved(path: File) -> Recipe:
    """The recipe in a run's or a student's folder."""
    return recipe_from(load(path, KEYS), file=str(path))


def read_plain(path: File) -> dict[str, Any]:
    """The settings in that file as written. RecipeError names the file."""
    return load(path, KEYS)


def _override(config, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"command line: {override!r} is not of the form key=value")
    if INTERPOLATION in override:
        raise RecipeError(f"command line: {key}: {NO_INTERPOLATION}")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        parsed = given["value"]
        refuse_interpolations(parsed, "")
        if key.endswith(".kind") and OmegaConf.select(config, key) != parsed:
            key, parsed = key.removesuffix(".kind"), {"kind": parsed}
            OmegaConf.update(config, key, parsed, merge=False)
        else:
            OmegaConf.update(config, key, parsed, merge=False, force_add=True)
    except (OmegaConfBaseException, YAMLError, ValueError, AssertionError, IndexError, RecursionError) as error:
        raise RecipeError(f"command line: {override!r}: {' '.join(str(error).split()) or 'cannot be read'}") from error


def _missing(node: Any, key: str) -> list[str]:
    if isinstance(node, Mapping):
        return [m for k, v in node.items() for m in _missing(v, f"{key}.{k}" if key else str(k))]
    if isinstance(node, (list, tuple)):
        return [m for i, v in enumerate(node) for m in _missing(v, f"{key}[{i}]")]
    return [key] if node == MISSING else []

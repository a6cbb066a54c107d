"""A recipe names data, teacher, student and objective; here it is read, overridden, checked and written out again.

The config is the object: values (path, times, objective, sampler, optimiser) are frozen dataclasses whose __call__ is the behaviour,
specs (data, student, metrics) have one build().  A slot in YAML is `kind` plus fields.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path as File
from typing import Any, Protocol

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowmap.config import MISSING, RecipeError, construct, to_plain
from flowmap.data import DATA
from flowmap.flow.distance import DISTANCES, Distance
from flowmap.flow.path import PATHS, Linear
from flowmap.flow.prior import PRIORS, Gaussian
from flowmap.flow.times import TIMES, Interval
from flowmap.flow.types import Objective, Path, Prior, Sampler, TimeSampler
from flowmap.metrics import METRICS
from flowmap.nets import NETS
from flowmap.objectives import OBJECTIVES
from flowmap.optimizer import AdamW
from flowmap.samplers import SAMPLERS, Deterministic


class Data(Protocol): ...


class StudentSpec(Protocol): ...


class Metric(Protocol): ...


class Guidance(Protocol): ...


class EMA(Protocol): ...


@dataclass(frozen=True)
class FromTeacher:
    """The student is the teacher's network with its weights, beside silent branches for arrival time and guidance scale."""


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance; scale is the range drawn from in training, default the one that sampling and evaluation use."""

    scale: tuple[float, float] = (1.0, 3.0)
    default: float = 1.5

    def __post_init__(self):
        _check_scale(self.scale, self.default)


@dataclass(frozen=True)
class Autoguidance:
    """v = w v_strong + (1 - w) v_weak; the weak model is one of: another card, an earlier snapshot of the same run (its share of the
    run's steps, in (0, 1)), or the same network with blocks skipped."""

    weak: str | None = None
    snapshot: float | None = None
    skip_blocks: tuple[int, ...] = ()
    scale: tuple[float, float] = (1.0, 3.0)
    default: float = 2.0

    def __post_init__(self):
        _check_scale(self.scale, self.default)
        if sum((self.weak is not None, self.snapshot is not None, bool(self.skip_blocks))) != 1:
            raise ValueError("weak: autoguidance wants exactly one of weak (a card), snapshot (a share of the run) and skip_blocks")
        if self.snapshot is not None and not 0 < self.snapshot < 1:
            raise ValueError(f"snapshot: {self.snapshot} must lie between 0 and 1 (a share of the teacher's steps)")


@dataclass(frozen=True)
class TeacherSlot:
    """A frozen teacher by its card, and the guidance around it; overrides: key=value for the recipes that train it and its weak model."""

    card: str
    guidance: Guidance | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PowerEMA:
    """EDM2's power-function average (arXiv:2312.02696): `std` is relative to the run's length and ships with the student.

    Snapshots of averages with snapshot_stds are kept every snapshot_every_steps (0: none) and can be combined afterwards to any std.
    """

    std: float = 0.05
    snapshot_stds: tuple[float, ...] = (0.05, 0.10)
    snapshot_every_steps: int = 0

    def __post_init__(self):
        for name, stds in (("std", (self.std,)), ("snapshot_stds", self.snapshot_stds)):
            if any(not 0 < std < 0.25 for std in stds):
                raise ValueError(f"{name}: {stds} must lie between 0 and 0.25")


@dataclass(frozen=True)
class ConstantEMA:
    """The ordinary exponential average; decay 0 is no average."""

    decay: float = 0.999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay} must lie in [0, 1)")


@dataclass(frozen=True)
class Trainer:
    """How long and on what: steps are optimiser steps; the batch of data is taken `accumulate` times a step on each of the devices."""

    steps: int = 10_000
    accumulate: int = 1
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32"
    activation_checkpointing: bool = False
    compile: bool = False
    checkpoint_every_steps: int = 500

    def __post_init__(self):
        for name, allowed in (("strategy", ("auto", "ddp", "fsdp")), ("precision", ("32", "bf16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("steps", "accumulate", "devices", "num_nodes", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be 1 or more")


@dataclass(frozen=True)
class Log:
    """What a run shows of itself, and how often in optimiser steps; samples and metrics at 0 only at the end."""

    wandb: bool = True
    project: str = "flowmap"
    every_steps: int = 50
    samples_every_steps: int = 0
    metrics_every_steps: int = 0
    grid_images: int = 64

    def __post_init__(self):
        for name, least in (("every_steps", 1), ("samples_every_steps", 0), ("metrics_every_steps", 0), ("grid_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be {least} or more")


@dataclass(frozen=True)
class Evaluation:
    """The last look at the student: the teacher's row takes teacher_steps Euler steps; all rows start from the same noise, drawn from `seed`."""

    teacher_steps: int = 64
    teacher_extra_steps: tuple[int, ...] = ()
    batch_size: int = 512
    seed: int = 1234

    def __post_init__(self):
        for name in ("teacher_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be 1 or more")
        if any(k < 1 for k in self.teacher_extra_steps):
            raise ValueError(f"teacher_extra_steps: {self.teacher_extra_steps} must be 1 or more each")


@dataclass(frozen=True)
class Recipe:
    """All that a run is made of; `flowmap show --recipe R` prints it with every default."""

    data: Data
    student: StudentSpec
    objective: Objective
    teacher: TeacherSlot | None = None
    name: str = "unnamed"
    seed: int = 0
    path: Path = Linear()
    prior: Prior = Gaussian()
    times: TimeSampler = Interval()
    sampler: Sampler = Deterministic()
    metrics: tuple[Metric, ...] = ()
    evaluation: Evaluation = Evaluation()
    optimizer: AdamW = AdamW()
    ema: EMA = PowerEMA()
    trainer: Trainer = Trainer()
    log: Log = Log()

    def __post_init__(self):
        if self.teacher is not None and not isinstance(self.path, Linear):
            raise ValueError("path: a teacher speaks on the linear path, so a recipe with a teacher wants {kind: linear}")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} must be 0 or more")

    def to_yaml(self) -> str:
        """The resolved recipe as text, every default written out; reading it gives the same recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(to_plain(self, TABLES)))

    def hash(self) -> str:
        """Eight hexadecimal digits that change with anything that changes the result (not with how the run is logged)."""
        plain = {key: value for key, value in to_plain(self, TABLES).items() if key != "log"}
        return hashlib.sha256(repr(plain).encode()).hexdigest()[:8]

    def missing(self) -> list[str]:
        """Keys whose value is ??? and must be given before a run."""
        return _missing(to_plain(self, TABLES), "")


TABLES: Mapping[type, Mapping[str, type]] = {
    Data: DATA,
    StudentSpec: {"from_teacher": FromTeacher, **NETS},
    Objective: OBJECTIVES,
    Distance: DISTANCES,
    Path: PATHS,
    Prior: PRIORS,
    TimeSampler: TIMES,
    Sampler: SAMPLERS,
    Metric: METRICS,
    Guidance: {"classifier_free": ClassifierFree, "autoguidance": Autoguidance},
    EMA: {"power": PowerEMA, "constant": ConstantEMA},
}


def read_recipe(name: str | File, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path, with `key=value` overrides; RecipeError names file, key, value and what is allowed."""
    path = find_recipe(name)
    plain = _with_base(path)
    plain.setdefault("name", path.stem if path.parent.name in ("recipes", "") else f"{path.parent.name}-{path.stem}")
    config = OmegaConf.create({**_defaults(), **plain})
    for override in overrides:
        _override(config, override)
    return recipe_from(_plain(config, path.name), file=path.name)


def _defaults() -> dict[str, Any]:
    """The slots that a recipe may leave out, written out, so that an override may name one field of them."""
    return {f.name: to_plain(f.default, TABLES) for f in fields(Recipe) if is_dataclass(f.default)}


def recipe_from(plain: Mapping[str, Any], *, file: str) -> Recipe:
    return construct(Recipe, plain, TABLES, file=file)


def read_resolved(path: File) -> Recipe:
    """The recipe that a run or a student folder carries."""
    return recipe_from(_load(path), file=str(path))


def shipped(folder: str) -> File:
    """Where the shipped `recipes` or `teachers` lie: inside the package when installed, beside it in a checkout."""
    inside = File(__file__).parent / "shipped" / folder
    return inside if inside.is_dir() else File(__file__).parents[1] / folder


def list_recipes() -> list[str]:
    root = shipped("recipes")
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def find_recipe(name: str | File) -> File:
    """A path that exists, or a shipped recipe's name with or without .yaml."""
    if File(name).is_file():
        return File(name)
    stem = str(name).removesuffix(".yaml")
    path = shipped("recipes") / f"{stem}.yaml"
    if path.is_file():
        return path
    close = difflib.get_close_matches(stem, list_recipes(), n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"recipe: no file and no shipped recipe {str(name)!r}{hint} Shipped: {', '.join(list_recipes())}")


def _with_base(path: File) -> dict:
    plain = _load(path)
    if "base" not in plain:
        return plain
    base_path = path.parent / f"{str(plain['base']).removesuffix('.yaml')}.yaml"
    base_path = base_path if base_path.is_file() else find_recipe(plain["base"])
    base = _load(base_path)
    if base_path.resolve() == path.resolve() or "base" in base:
        raise RecipeError(f"{path.name}: base: {plain['base']!r} has itself a base (or is this file): one level of inheritance is allowed")
    return _merge(base, {key: value for key, value in plain.items() if key != "base"})


def _merge(base: Any, over: Any) -> Any:
    """over on base, mapping by mapping; a slot whose kind changes starts afresh."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or ("kind" in over and over["kind"] != base.get("kind")):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _override(config, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"command line: {override!r} is not of the form key=value")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"]).value
        if key.endswith(".kind") and OmegaConf.select(config, key) != parsed:
            key, parsed = key.removesuffix(".kind"), {"kind": parsed}
            OmegaConf.update(config, key, parsed, merge=False)
        else:
            OmegaConf.update(config, key, parsed, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, AssertionError, IndexError) as error:
        raise RecipeError(f"command line: {override!r}: {str(error).splitlines()[0]}") from error


def _load(path: File) -> dict:
    try:
        plain = _plain(OmegaConf.load(path), str(path))
    except RecipeError:
        raise
    except (OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    except Exception as error:  # PyYAML's own errors; omegaconf re-exports no common class for them
        raise RecipeError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise RecipeError(f"{path}: is not a mapping of settings")
    return plain


def _plain(config, file: str) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{file}: {str(error).splitlines()[0]}") from error


def _missing(node: Any, key: str) -> list[str]:
    if isinstance(node, Mapping):
        return [m for k, v in node.items() for m in _missing(v, f"{key}.{k}" if key else str(k))]
    return [key] if node == MISSING else []


def _check_scale(scale: tuple[float, float], default: float) -> None:
    if not 0 <= scale[0] <= scale[1]:
        raise ValueError(f"scale: {scale} must be an increasing pair of numbers")
    if default < 0:
        raise ValueError(f"default: {default} must be 0 or more")

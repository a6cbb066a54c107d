"""A sweep of W&B over the settings of a recipe: the YAML that `wandb sweep` reads, checked before anything is trained.

W&B's agent runs a command for each run of the sweep. It gives settings as `key=value`, as `flowmap fit` takes them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from flowmap.base.schema import RecipeError, to_plain
from flowmap.data.text.dataset import LENGTH
from flowmap.metrics import MMD, TRAIN, CLIPScore, Control, Frechet, Infilled, Phrase, PrecisionRecall, StyleHit, TagHit
from flowmap.metrics.clip_score import score_key
from flowmap.metrics.direction import HIT, direction
from flowmap.metrics.features import short_name
from flowmap.metrics.reference import HELD_OUT
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe, read_recipe

METHODS = ("bayes", "random", "grid")
RANGE = re.compile(r"([-+.\deE]+)\.\.([-+.\deE]+?)(:log)?")


@dataclass(frozen=True)
class Parameter:
    """A setting of the sweep: `choices`, or a range from `low` to `high`, of whole numbers if both ends are."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def tried(self) -> tuple[Any, ...]:
        """The values that must be allowed: all choices, or both ends."""
        return self.choices or (self.low, self.high)

    @property
    def spec(self) -> dict[str, Any]:
        """Its entry in the file."""
        if self.choices:
            return {"values": list(self.choices)}
        if self.whole:
            return {"distribution": "int_uniform", "min": self.low, "max": self.high}
        name = "log_uniform_values" if self.logarithmic else "uniform"
        return {"distribution": name, "min": float(self.low), "max": float(self.high)}


@dataclass(frozen=True)
class Sweep:
    """The contents of the file, and the settings in words."""

    config: Mapping[str, Any]
    parameters: tuple[Parameter, ...]

    @property
    def text(self) -> str:
        return yaml.safe_dump(dict(self.config), sort_keys=False, width=1000)


def sweep_of(
    recipe: str,
    settings: Sequence[str],
    *,
    metric: str | None = None,
    steps: int | None = None,
    method: str | None = None,
    runs: int | None = None,
    imports: Sequence[str] = (),
) -> Sweep:
    """The sweep of a recipe over the settings that have several values.

    settings: `key=a,b,c` or `key=low..high`, with `:log` behind a range for even draws of the logarithm; `key=value`
    and +FILE are the same in all runs. metric: the name of a figure in metrics.json, by default that of the recipe's
    first distance, or of its first such figure if it measures none, at `steps` steps (default: the fewest of the
    sampler). method: bayes if there is a range, otherwise grid. runs: the number of runs after which the sweep ends.
    Raises ValueError or RecipeError for what a run would refuse.
    """
    parameters = tuple(found for word in settings if (found := _parameter(word)) is not None)
    fixed = [word for word in settings if _parameter(word) is None]
    if not parameters:
        raise ValueError("key=value: no setting has several values; write key=a,b,c or key=low..high")
    if runs is not None and runs < 1:
        raise ValueError(f"--runs: {runs} must be 1 or more")
    read = _checked(recipe, fixed, parameters)
    name = _metric(read, metric, steps)
    method = method or ("grid" if all(one.choices for one in parameters) else "bayes")
    if method not in METHODS:
        raise ValueError(f"--method: {method!r} is not one of {', '.join(METHODS)}")
    if method == "grid" and (ranges := [one.key for one in parameters if not one.choices]):
        raise ValueError(f"--method: grid wants values, and {ranges[0]} is a range; write {ranges[0]}=a,b,c")
    config: dict[str, Any] = {"name": read.name, "project": read.log.project, "program": "flowmap", "method": method}
    goal = "maximize" if direction(name) > 0 else "minimize"
    config["metric"] = {"name": f"metrics/{name}/{_steps(read, steps)}", "goal": goal}
    config["parameters"] = {one.key: one.spec for one in parameters}
    config |= {} if runs is None else {"run_cap": runs}
    config["command"] = _command(recipe, read.name, fixed, imports)
    return Sweep(config, parameters)


def _command(recipe: str, name: str, fixed: Sequence[str], imports: Sequence[str]) -> list[str]:
    """The command of the agent. Each run has a folder of its own, by its id in W&B, which a shell reads."""
    given = [word for one in imports for word in ("--import", one)]
    words = shlex.join(["flowmap", "fit", "--recipe", recipe, *given, *fixed])
    folder = shlex.quote(f"runs/{name}-sweep/")
    return ["${env}", "sh", "-c", f'exec {words} "$@" --out {folder}"$WANDB_RUN_ID"', "flowmap", "${args_no_hyphens}"]


def _parameter(word: str) -> Parameter | None:
    """The setting of the sweep that a word describes; None if it has one value."""
    key, sign, value = word.partition("=")
    if word.startswith("+") or not sign:
        return None
    if found := RANGE.fullmatch(value):
        low, high = (_number(word, end) for end in found.groups()[:2])
        logarithmic = found.group(3) is not None
        if not low < high:
            raise ValueError(f"{word}: a range wants the lower end first")
        if logarithmic and (low <= 0 or isinstance(low, int)):
            raise ValueError(f"{word}: :log wants a range of fractions above 0, such as 1e-4..1e-2")
        return Parameter(key, low=low, high=high, logarithmic=logarithmic)
    try:
        choices = yaml.safe_load(f"[{value}]")
    except yaml.YAMLError:
        return None  # a text with brackets, which is one value
    if not isinstance(choices, list) or len(choices) < 2:
        return None
    if any(one is None for one in choices):
        raise ValueError(f"{word}: null cannot be a value of a sweep: W&B passes it on as the text None")
    return Parameter(key, tuple(map(_read, choices)))


def _read(value: Any) -> Any:
    """A value as YAML gives it; 1e-4, a text in YAML without a point, as the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _number(word: str, text: str) -> float:
    try:
        value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    except ValueError:
        raise ValueError(f"{word}: {text!r} is no number; a range is low..high") from None
    if not math.isfinite(value):
        raise ValueError(f"{word}: {text!r} is not finite")
    return value


def _checked(recipe: str, fixed: Sequence[str], parameters: Sequence[Parameter]) -> Recipe:
    """The recipe with the fixed settings. RecipeError if a value of a parameter is refused by it."""
    read = read_recipe(recipe, fixed)
    if not read.log.wandb:
        raise RecipeError(f"{recipe}: log.wandb: false: a sweep is steered by what its runs log in W&B")
    first = {one.key: f"{one.key}={one.tried[0]}" for one in parameters}
    for one in parameters:
        for value in one.tried:  # the other settings at their first values
            read_recipe(recipe, [*fixed, *(first | {one.key: f"{one.key}={value}"}).values()])
    return read


def _steps(recipe: Recipe, steps: int | None) -> int:
    if steps is not None and steps not in recipe.sampler.steps:
        raise ValueError(f"--steps: {steps} is not one of the recipe's: {', '.join(map(str, recipe.sampler.steps))}")
    return min(recipe.sampler.steps) if steps is None else steps


def _metric(recipe: Recipe, metric: str | None, steps: int | None) -> str:
    """The name of the figure, without its number of steps."""
    _steps(recipe, steps)
    nothing_held_out = to_plain(recipe.data, TABLES).get("held_out") == 0
    attributes = getattr(recipe.data, "attributes", ()) if recipe.data.conditional else ()
    known = lambda spec: _names(spec, attributes)
    with_file = lambda spec: getattr(spec, "reference_of", None) == HELD_OUT
    alone = [nothing_held_out and spec.on_samples and not with_file(spec) for spec in recipe.metrics]
    names = [name + TRAIN * only for spec, only in zip(recipe.metrics, alone, strict=True) for name in known(spec)]
    of_training = [name + TRAIN for spec in recipe.metrics if spec.on_samples for name in known(spec)]
    if not names:
        raise ValueError("--metric: the recipe measures nothing that is known to be better low or high")
    if metric is None:
        return next((name for name in names if direction(name) < 0), names[0])
    found = [name for name in names if name.removesuffix(TRAIN) == metric.removesuffix(TRAIN)]
    if not found:
        raise ValueError(f"--metric: {metric!r} is not one of {', '.join(names)}")
    return metric if metric in (*names, *of_training) else found[0]


def _names(spec: Any, attributes: Sequence[str]) -> Iterator[str]:
    """The names of a metric's figures whose better direction is known. attributes: of the recipe's sentences."""
    if isinstance(spec, (Frechet, MMD)):
        yield spec.key
    elif isinstance(spec, PrecisionRecall):
        yield from (f"{name}_{short_name(spec.features)}" for name in ("precision", "recall"))
    elif isinstance(spec, CLIPScore):
        yield score_key(spec.model)
    elif isinstance(spec, Control):
        yield from ("length_within" if name == LENGTH else f"{name}{HIT}" for name in attributes)
    elif isinstance(spec, TagHit):
        yield from ("tag_hit", "tags_exactly")
    elif isinstance(spec, Phrase):
        yield from ("phrase_hit", "phrase_hit_even")
    elif isinstance(spec, StyleHit):
        yield "style_hit"
    elif isinstance(spec, Infilled):
        yield from ("infilled_bleu", "infilled_rouge_l", "infilled_exactly")

"""What would fit a GPU that a run does not fit: settings that lower its memory, and the memory with each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from flowmap.data import Encoded
from flowmap.estimate.evaluation import EvaluationMemory
from flowmap.estimate.fits import OWN, device_memory, fits, gib_of, measuring_bytes
from flowmap.estimate.memory import Memory
from flowmap.nets.quantized import FORMATS, check_available
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.settings import Quantize

Peaks = tuple[Memory, EvaluationMemory | None]
Changes = dict[str, Any]  # fields of a recipe
AT_ONCE = 16  # samples of an evaluation
TRAINING, MEASURING, BOTH = (True, False), (False, True), (True, True)  # which of the two a setting lowers


@dataclass(frozen=True)
class Option:
    """Settings as a command line has them, the run with them, and its memory while it trains and while it measures."""

    settings: str
    run: ResolvedRun
    training: Memory
    evaluation: EvaluationMemory | None

    def fits(self, there: float) -> tuple[bool, bool]:
        """Whether training and evaluation fit a device of that many bytes."""
        return fits(self.training.total, there), fits(measuring_bytes(self.training, self.evaluation), there)


def smaller_lines(
    run: ResolvedRun, now: Peaks, peaks: Callable[[ResolvedRun], Peaks], memory: float | None
) -> list[str]:
    """Return a table of settings, and which of them fit; nothing where a run fits its device and `memory` is None.

    now: the memory of the run; peaks: that of a run with other settings. memory: of the GPU in GB, None for the run's
    device.
    """
    trainer = run.recipe.trainer
    name, there = device_memory(trainer.accelerator, memory)
    first = Option("as it is", run, *now)
    if memory is None and (trainer.accelerator == "cpu" or all(first.fits(there))):
        return []
    options = list(_options(first, peaks, there))
    lines = [
        f"to fit {name} ({gib_of(there)}, about {gib_of(OWN)} of them CUDA's own), estimated:",
        *_table(options, there),
    ]
    fitting = next((one for one in options if all(one.fits(there))), None)
    if fitting is None:
        lines.append(
            "  none of these fits: split the weights over more GPUs (trainer.strategy=fsdp), or take larger ones"
        )
    elif fitting is not first:
        lines.append(f"  it fits with: {fitting.settings}")
    return lines


def _options(first: Option, peaks: Callable[[ResolvedRun], Peaks], there: float) -> Iterator[Option]:
    """The run as it is, with each format of frozen weights, and from the smallest on with one setting more each time
    until it fits.
    """
    yield first
    formats = [] if all(first.fits(there)) else [one for form in FORMATS if (one := _quantised(first, form, peaks))]
    yield from formats
    best = min([first, *formats], key=lambda one: one.training.total)
    for lowers, change in LEVERS:
        best_fits = best.fits(there)
        if all(best_fits):
            return
        if not any(low and not fit for low, fit in zip(lowers, best_fits, strict=True)):
            continue
        try:
            settings, changes = change(best, there)
            run = best.run.changed(**changes)
        except ValueError:  # nothing to change, or the recipe does not allow it
            continue
        said = settings if best is first else f"{best.settings} {settings}"
        best = Option(said, run, *peaks(run))
        yield best


def _quantised(one: Option, form: str, peaks: Callable[[ResolvedRun], Peaks]) -> Option | None:
    """The run with frozen weights in that format; None if it has none of them, or has a format already."""
    recipe = one.run.recipe
    if recipe.quantize.frozen is not None or recipe.teacher is None or all(c.kind == "exact" for c in one.run.cards):
        return None
    try:
        check_available()
        run = one.run.changed(quantize=Quantize(form))
        return Option(f"quantize.frozen={form}", run, *peaks(run))
    except ValueError:  # no library that does it, or no linear layers
        return None


def _precision(one: Option, there: float) -> tuple[str, Changes]:
    if (trainer := one.run.recipe.trainer).precision == "bf16":
        raise ValueError
    return "trainer.precision=bf16", {"trainer": replace(trainer, precision="bf16")}


def _text(one: Option, there: float) -> tuple[str, Changes]:
    data = one.run.recipe.data
    if not isinstance(data, Encoded) or data.stored_text != "captions":
        raise ValueError
    return "data.stored_text=padded", {"data": replace(data, stored_text="padded")}


def _checkpointing(one: Option, there: float) -> tuple[str, Changes]:
    if (trainer := one.run.recipe.trainer).activation_checkpointing:
        raise ValueError
    return "trainer.activation_checkpointing=true", {"trainer": replace(trainer, activation_checkpointing=True)}


def _micro_batch(one: Option, there: float) -> tuple[str, Changes]:
    """The largest of the halves, quarters and so on of the micro-batch that fits, or 1."""
    data, memory = one.run.recipe.data, one.training
    size = whole = data.batch_size
    if whole < 2:
        raise ValueError
    while size > 1 and (size == whole or not fits(memory.total - memory.activations * (1 - size / whole), there)):
        size //= 2
    return f"data.batch_size={size}", {"data": replace(data, batch_size=size)}


def _drawn_at_once(one: Option, there: float) -> tuple[str, Changes]:
    if (evaluation := one.run.recipe.evaluation).batch_size <= AT_ONCE:
        raise ValueError
    return f"evaluation.batch_size={AT_ONCE}", {"evaluation": replace(evaluation, batch_size=AT_ONCE)}


def _unmeasured(one: Option, there: float) -> tuple[str, Changes]:
    recipe = one.run.recipe
    if not recipe.metrics:
        raise ValueError
    said = "metrics=[]" + " evaluation.captions=null" * (recipe.evaluation.captions is not None)
    return said, {"metrics": (), "evaluation": replace(recipe.evaluation, captions=None)}


LEVERS = (
    (BOTH, _precision),  # weights in half
    (BOTH, _text),  # text encoders off the device
    (TRAINING, _checkpointing),
    (TRAINING, _micro_batch),
    (MEASURING, _drawn_at_once),
    (MEASURING, _unmeasured),  # elsewhere
)
"""What each lowers, and the change: (settings, fields of the recipe); ValueError where there is none."""


def _table(options: list[Option], there: float) -> list[str]:
    rows = [("settings", "frozen", "training", "measuring", "fits")]
    for one in options:
        measuring = "-" if one.evaluation is None else gib_of(measuring_bytes(one.training, one.evaluation))
        rows.append(
            (one.settings, gib_of(one.training.frozen), gib_of(one.training.total), measuring, _said(one, there))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _said(one: Option, there: float) -> str:
    training, measuring = one.fits(there)
    return "yes" if training and measuring else "training" if training else "no"

"""GPU-hours and disk of a run: training, pairs, encoding and evaluation, each hour as a range with its assumptions.

The lower end is what the counted kernels take at a device's limits, the upper end what they take at a sustained rate
(roofline.py). Devices communicate (communication.py) while they compute at the lower end, and not until they have
computed, at half the rate, at the upper end. Reading of data is in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from flowmap.data import Encoded, Guidance, Pairs, TeacherSamples
from flowmap.estimate.communication import Links, Sent, sent_in_a_step
from flowmap.estimate.evaluation import real_samples
from flowmap.estimate.frozen_networks import caption_flops, live_text, picture_networks
from flowmap.estimate.networks import pairs_config, teacher_configs
from flowmap.estimate.roofline import (
    FLOAT32_SHARE,
    TF32_SHARE,
    Counter,
    Device,
    Traffic,
    float32_share,
    forward_traffic,
    step_of,
    sustained,
)
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe import Recipe
from flowmap.recipe.settings import ClassifierFree
from flowmap.student.config import StudentConfig
from flowmap.student.examples import tokens_of
from flowmap.teachers.autoencoder import stable_diffusion_autoencoder

ROWS = 64  # samples of a batch that is priced
CAPTION, TRIMMED = 100, 30  # bytes and tokens of a caption


@dataclass(frozen=True)
class Prices:
    """Device rates between which hours are given, and functions that price the parts of a run."""

    throughput: float = 200.0
    given: set[str] = field(default_factory=set, compare=False)

    def new(self, lines: list[str]) -> list[str]:
        """Return the lines that were not given before: stages share encoded pictures and pairs."""
        found = [line for line in lines if line not in self.given]
        self.given.update(found)
        return found

    @property
    def devices(self) -> tuple[Device, Device]:
        return Device(), sustained(self.throughput)

    @property
    def assumptions(self) -> str:
        (fast, slow), links = self.devices, Links()
        return (
            f"GPU-hours are a range: from {fast.flops / 1e12:g} TFLOP/s in bf16, {fast.bandwidth / 1e12:g} TB/s and "
            f"{fast.kernel_seconds * 1e6:g} us a kernel (an H100's limits) to {self.throughput:g} TFLOP/s "
            f"(--throughput), {slow.bandwidth / 1e12:g} TB/s and {slow.kernel_seconds * 1e6:g} us; float32 products at "
            f"{FLOAT32_SHARE:g} of these rates, of TensorFloat-32 at {TF32_SHARE:g}. A device sends "
            f"{links.within / 1e9:g} GB/s within its node (NVLink) and {links.between / 1e9:g} GB/s to others "
            "(InfiniBand) while it computes, up to half of that "
            "afterwards. Reading from disk is not included"
        )

    def step(
        self, recipe: Recipe, config: StudentConfig, teachers: Sequence[StudentConfig], extra: float = 0.0
    ) -> StepPrice:
        """The traffic of an optimizer step on one device. extra: further FLOPs of a sample, in large products."""
        counted, accumulate = step_of(recipe, config, teachers, self.devices), recipe.batches.accumulate
        parts = counted.parts
        ends = parts["optimizer"] + parts["averages"]
        micro = sum((part for name, part in parts.items() if name not in ("optimizer", "averages")), Traffic())
        if extra:
            half = recipe.trainer.precision == "bf16"
            micro = micro + self.of_flops(
                recipe.data.batch_size * extra, 1.0 if half else float32_share(recipe.trainer)
            )
        if live_text(recipe):
            micro = micro + self.of_flops(recipe.data.batch_size * caption_flops(config), _text_share(recipe))
        return StepPrice(micro.times(accumulate) + ends, sent_in_a_step(recipe.trainer, counted, accumulate))

    def training(
        self, recipe: Recipe, config: StudentConfig, teachers: Sequence[StudentConfig], extra: float = 0.0
    ) -> Traffic:
        """The traffic of all steps on all devices. extra: as for a step."""
        step = self.step(recipe, config, teachers, extra).whole
        return step.times(recipe.trainer.steps * recipe.batches.processes)

    def pairs(self, recipe: Recipe, teacher: StudentConfig) -> Traffic:
        """The traffic of all pairs that the teacher makes."""
        assert isinstance(recipe.coupling, Pairs)
        spec = recipe.coupling
        guidance = None if spec.teacher is None else spec.teacher.guidance
        return self.forward(teacher, recipe).times(solver_calls(spec) * guided_calls(guidance) * spec.num)

    def encoding(self, recipe: Recipe) -> Traffic:
        """The traffic of encoding a picture, in float32; none if pictures are stored as they are."""
        data = recipe.data
        if not isinstance(data, Encoded) or data.autoencoder is None:
            return Traffic()
        return self.autoencoder(data.images.size, decodes=False, half=False).times(2 if data.flip else 1)

    def text(self, config: StudentConfig) -> Traffic:
        """The traffic of encoding a caption, in float32, by the encoders of the network's pipeline."""
        return self.of_flops(caption_flops(config), FLOAT32_SHARE)

    def of_flops(self, flops: float, share: float) -> Traffic:
        return Traffic.of_flops(flops, share, self.devices)

    def forward(self, config: StudentConfig, recipe: Recipe) -> Traffic:
        """The traffic of a forward pass of one sample, in batches."""
        found = forward_traffic(config, ROWS, recipe.trainer.precision == "bf16", self.devices)
        return found.times(1 / ROWS)

    def autoencoder(self, side: int, *, decodes: bool, half: bool) -> Traffic:
        """Encoding or decoding of one picture, as by the autoencoder of Stable Diffusion.

        Without half: in float32, whose convolutions are of TensorFloat-32, as torch has it by default.
        """
        return _autoencoder_traffic(side, decodes, half, self.devices)


@cache
def _autoencoder_traffic(side: int, decodes: bool, half: bool, devices: tuple[Device, Device]) -> Traffic:
    with torch.device("meta"), torch.no_grad():
        net = stable_diffusion_autoencoder()
        counter = Counter(devices, half=half, float32=TF32_SHARE)
        x = torch.zeros(1, 4, side // 8, side // 8) if decodes else torch.zeros(1, 3, side, side)
        with counter:
            net.decode(x) if decodes else net.encode(x).latent_dist.mean
    return counter.found


@dataclass(frozen=True)
class StepPrice:
    """An optimizer step on one device: what it computes and what it sends."""

    computed: Traffic
    sent: Sent

    @property
    def sending(self) -> tuple[float, float]:
        """The seconds of sending, at full and at half the rate."""
        return self.sent.seconds(Links()), self.sent.seconds(Links().halved)

    @property
    def whole(self) -> Traffic:
        fast, slow = self.sending
        found = self.computed
        return replace(found, seconds=max(found.seconds, fast), slow_seconds=found.slow_seconds + slow)

    @property
    def lines(self) -> list[str]:
        """Lines on the time of a step and on communication."""
        found = [f"a step takes {_milliseconds(self.whole.seconds, self.whole.slow_seconds)}"]
        if self.sent.within or self.sent.between:
            each = {"within its node": self.sent.within, "to other nodes": self.sent.between}
            sizes = " and ".join(f"{_counted(size / 1e9)} GB {where}" for where, size in each.items() if size)
            found.append(f"communication: each device sends {sizes} a step, {_milliseconds(*self.sending)}")
        return found


def preparation_lines(run: ResolvedRun, config: StudentConfig, prices: Prices) -> list[str]:
    """Return lines on the GPU-hours and the disk of what is made before a run: encoded pictures, pairs."""
    return [*_encoding(run.recipe, config, prices), *_made(run, config, prices)]


def price_lines(run: ResolvedRun, config: StudentConfig, trained: int, prices: Prices, extra: float = 0.0) -> list[str]:
    """Return lines on the GPU-hours of training and evaluation, and on disk.

    trained: the number of parameters that are trained. extra: the FLOPs of a sample in a step that `step_of` omits.
    """
    recipe, teachers = run.recipe, [one for _, one in teacher_configs(run, config)]
    step = prices.step(recipe, config, teachers, extra)
    processes = recipe.batches.processes
    whole = step.whole.times(recipe.trainer.steps * processes)
    each = "" if processes == 1 else f", {_range(whole.times(1 / processes))} hours on {processes} GPUs"
    lines = [*step.lines, f"{recipe.trainer.steps:,} steps: {hours(whole)}{each}"]
    parts = evaluation_parts(prices, run, config, teachers)
    measured = sum((part for _, part in parts), Traffic())
    if measured.slow_seconds:
        lines.append(f"the last evaluation: {hours(measured)}")
    lines += [f"  {name}: {hours(part)}" for name, part in parts if part.slow_seconds]
    disk = run_bytes(recipe, trained)
    lines.append("disk of the run: " + " + ".join(f"{gib(size)} {name}" for name, size in disk.items()))
    return lines


def _made(run: ResolvedRun, config: StudentConfig, prices: Prices) -> list[str]:
    """Return a line on the samples of the teacher, if they are the data, and one on the pairs."""
    sampled = [(run.sampled, "samples of the teacher")] if isinstance(run.recipe.data, TeacherSamples) else []
    paired = [(run, "pairs")] if isinstance(run.recipe.coupling, Pairs) else []
    lines = []
    for one, what in (*sampled, *paired):
        maker = pairs_config(one, config)
        if maker is not None:
            size = gib(pairs_bytes(one.recipe, config.shape))
            lines.append(f"{one.pairs.num:,} {what}: {hours(prices.pairs(one.recipe, maker))}, {size} on disk")
    return lines


def _text_share(recipe: Recipe) -> float:
    """Return the share of the bf16 rate that products of text encoders reach in the training step."""
    return 1.0 if recipe.trainer.frozen_precision == "bf16" else float32_share(recipe.trainer)


def _encoding(recipe: Recipe, config: StudentConfig, prices: Prices) -> list[str]:
    data = recipe.data
    if not isinstance(data, Encoded) or data.autoencoder is None and data.text is None:
        return []
    pictures, stored = prices.encoding(recipe).times(1e6), gib(1e6 * sample_bytes(recipe, config))
    text = Traffic() if live_text(recipe) else prices.text(config).times(1e6)
    lines = [f"encoding, each million pictures: {hours(pictures + text)}, {stored} on disk"]
    if text.slow_seconds:
        lines.append(f"  their captions: {hours(text)} (float32)")
    return lines


def evaluation_parts(
    prices: Prices, run: ResolvedRun, config: StudentConfig, teachers: Sequence[StudentConfig]
) -> list[tuple[str, Traffic]]:
    """Return the parts of the last evaluation, each with its traffic: samples, decoding, metrics, prompts."""
    recipe = run.recipe
    num = max((spec.num_starts for spec in recipe.metrics), default=0)
    steps, evaluation = recipe.sampler.steps, recipe.evaluation
    calls = sum(recipe.sampler.calls(k) for k in steps)
    found = [
        (f"{num:,} samples of the student, at {_listed(steps)}", prices.forward(config, recipe).times(num * calls))
    ]
    solved = evaluation.teacher_steps, *evaluation.teacher_extra_steps
    if teachers:
        each_step = guided_calls(None if recipe.teacher is None else recipe.teacher.guidance)
        each = sum((prices.forward(one, recipe) for one in teachers), Traffic()).times(each_step)
        name = f"{num:,} samples of the teacher, at {_listed(solved)}{' with guidance' if each_step > 1 else ''}"
        found.append((name, each.times(num * sum(solved))))
    rows = len(steps) + (len(solved) if teachers else 0)
    data = recipe.data
    if isinstance(data, Encoded) and data.autoencoder is not None:
        one = prices.autoencoder(data.images.size, decodes=True, half=recipe.trainer.precision == "bf16")
        found.append((f"decoding of {num * rows:,} samples", one.times(num * rows)))
    real = sum(real_samples(run))
    for name, (net, images) in picture_networks(recipe).items():
        pictures = images * rows + (0 if name == "clip_score" else real)
        found.append((f"{name} of {pictures:,} pictures", prices.of_flops(net.flops, FLOAT32_SHARE).times(pictures)))
    if evaluation.captions is not None:
        found.append((f"text encoders of {num * rows:,} prompts", prices.text(config).times(num * rows)))
    return found


def _listed(steps: Sequence[int]) -> str:
    return f"{', '.join(map(str, steps))} step{'s' * (tuple(steps) != (1,))}"


def _milliseconds(fast: float, slow: float) -> str:
    return f"{_counted(1e3 * fast)} to {_counted(1e3 * slow)} ms"


def gib(size: float) -> str:
    return f"{_counted(size / 2**30)} GiB"


def _counted(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def solver_calls(spec: Pairs) -> int:
    """The velocity calls of the solver for one pair."""
    return spec.solver(lambda x, t: torch.zeros_like(x), torch.zeros(1, 1)).calls


def guided_calls(guidance: Guidance | None) -> float:
    """The mean number of calls of the teacher's own network per velocity, over even times."""
    if not isinstance(guidance, ClassifierFree):
        return 1.0
    low, high = guidance.interval
    return 1 + high - low


def hours(found: Traffic) -> str:
    """The range of GPU-hours."""
    return f"{_range(found)} GPU-hours"


def _range(found: Traffic) -> str:
    return f"{_counted(found.seconds / 3600)} to {_counted(found.slow_seconds / 3600)}"


def pairs_bytes(recipe: Recipe, shape: tuple[int, ...]) -> float:
    """The bytes on disk of the recipe's pairs."""
    assert isinstance(recipe.coupling, Pairs)
    spec = recipe.coupling
    pictures = recipe.data.in_pixels and len(shape) == 3
    width = getattr(torch, spec.stored_dtype(pictures)).itemsize
    numbers = float(torch.Size(shape).numel())
    return spec.num * (numbers * width + 24) + spec.num_inverted * 2 * numbers


def sample_bytes(recipe: Recipe, config: StudentConfig) -> float:
    """The bytes on disk of one encoded picture with its caption."""
    data = recipe.data
    assert isinstance(data, Encoded)
    width = 1 if data.autoencoder is None else 2
    latents = float(torch.Size(config.shape).numel()) * width * (2 if data.flip else 1)
    net = net_within(config.net)
    if config.text is None or not isinstance(net, DiffusersModel):
        return latents
    if data.stored_text == "captions":
        return latents + CAPTION
    tokens = tokens_of(net.network, config.text)
    text = example_conditions(net, 1, tokens if data.stored_text == "padded" else min(tokens, TRIMMED))
    return latents + sum(value.numel() * (2 if value.is_floating_point() else 1) for value in text.values())


def run_bytes(recipe: Recipe, trained: int) -> dict[str, float]:
    """The bytes on disk of a run: checkpoint, student, and snapshots of averages."""
    widths, every = len(recipe.ema.widths), recipe.ema.snapshot_every_steps
    snapshots = recipe.trainer.steps // every * widths if every else 0
    found = {
        "checkpoint": 4.0 * trained * (3 + widths),
        "student": 4.0 * trained,
        "snapshots": 4.0 * trained * snapshots,
    }
    return {name: size for name, size in found.items() if size}

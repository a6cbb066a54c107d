"""GPU-hours and disk of a run: training, pairs, encoding and evaluation, each hour as a range with its assumptions.

The lower end is what the counted kernels take at a device's limits, the upper end what they take at a sustained rate
(roofline.py). Communication between devices and reading of data are in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowmap.data import Encoded, Pairs
from flowmap.estimate.networks import pairs_config, teacher_configs
from flowmap.estimate.roofline import Counter, Device, Traffic, forward_traffic, step_traffic, sustained
from flowmap.metrics import Spec
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
# Parameters of the text encoders of each network; they are priced at 2 FLOPs a parameter and token.
ENCODERS = {
    "UNet2DConditionModel": 0.12e9,
    "SD3Transformer2DModel": 5.6e9,
    "FluxTransformer2DModel": 4.9e9,
    "SanaTransformer2DModel": 2.6e9,
    "PixArtTransformer2DModel": 4.8e9,
}


@dataclass(frozen=True)
class Prices:
    """Device rates between which hours are given, and functions that price the parts of a run."""

    throughput: float = 200.0

    @property
    def devices(self) -> tuple[Device, Device]:
        return Device(), sustained(self.throughput)

    @property
    def assumptions(self) -> str:
        fast, slow = self.devices
        return (
            f"GPU-hours are a range: from {fast.flops / 1e12:g} TFLOP/s in bf16, {fast.bandwidth / 1e12:g} TB/s and "
            f"{fast.kernel_seconds * 1e6:g} us a kernel to {self.throughput:g} TFLOP/s, {slow.bandwidth / 1e12:g} TB/s "
            f"and {slow.kernel_seconds * 1e6:g} us; without communication and reading"
        )

    def training(self, recipe: Recipe, config: StudentConfig, teachers: Sequence[StudentConfig]) -> Traffic:
        """The traffic of all steps on all devices."""
        trainer = recipe.trainer
        parts = step_traffic(recipe, config, teachers, self.devices)
        ends = parts["optimizer"] + parts["averages"]
        micro = sum((part for name, part in parts.items() if name not in ("optimizer", "averages")), Traffic())
        step = micro.times(recipe.batches.accumulate) + ends
        return step.times(trainer.steps * recipe.batches.processes)

    def pairs(self, recipe: Recipe, teacher: StudentConfig) -> Traffic:
        """The traffic of all pairs that the teacher makes."""
        assert isinstance(recipe.coupling, Pairs)
        spec = recipe.coupling
        guidance = None if spec.teacher is None else spec.teacher.guidance
        calls = solver_calls(spec) * (2 if guidance is not None and isinstance(guidance, ClassifierFree) else 1)
        return self._forward(teacher, recipe).times(calls * spec.num / ROWS)

    def evaluation(
        self, recipe: Recipe, config: StudentConfig, teachers: Sequence[StudentConfig], metrics: Sequence[Spec]
    ) -> Traffic:
        """The traffic of drawing the samples of the last evaluation, and of decoding them."""
        num = max((spec.num_starts for spec in metrics), default=0)
        sampler, evaluation = recipe.sampler, recipe.evaluation
        student = self._forward(config, recipe).times(num / ROWS)
        found = student.times(sum(sampler.calls(k) for k in sampler.steps))
        rows = len(sampler.steps)
        if teachers:
            steps = evaluation.teacher_steps + sum(evaluation.teacher_extra_steps)
            twice = recipe.teacher is not None and isinstance(recipe.teacher.guidance, ClassifierFree)
            for one in teachers:
                found = found + self._forward(one, recipe).times((2 if twice else 1) * steps * num / ROWS)
            rows += 1 + len(evaluation.teacher_extra_steps)
        return found + self._decoding(recipe).times(num * rows)

    def encoding(self, recipe: Recipe, config: StudentConfig) -> Traffic | None:
        """The traffic of encoding a picture and its caption; None if pictures are stored as they are."""
        data = recipe.data
        if not isinstance(data, Encoded) or data.autoencoder is None and data.text is None:
            return None
        found = Traffic() if data.autoencoder is None else self._autoencoder(data.images.size, decodes=False)
        return found.times(2 if data.flip else 1) + self._text(config)

    def _forward(self, config: StudentConfig, recipe: Recipe) -> Traffic:
        return forward_traffic(config, ROWS, recipe.trainer.precision == "bf16", self.devices)

    def _decoding(self, recipe: Recipe) -> Traffic:
        data = recipe.data
        latents = isinstance(data, Encoded) and data.autoencoder is not None
        return self._autoencoder(data.images.size, decodes=True) if latents else Traffic()

    def _autoencoder(self, side: int, decodes: bool) -> Traffic:
        """Encoding or decoding of one picture, as by the autoencoder of Stable Diffusion."""
        with torch.device("meta"), torch.no_grad():
            net = stable_diffusion_autoencoder()
            counter = Counter(self.devices, half=True)
            x = torch.zeros(1, 4, side // 8, side // 8) if decodes else torch.zeros(1, 3, side, side)
            with counter:
                net.decode(x) if decodes else net.encode(x).latent_dist.mean
        return counter.found

    def _text(self, config: StudentConfig) -> Traffic:
        """The encoding of one caption, by the encoders of the network's pipeline."""
        net = net_within(config.net)
        if config.text is None or not isinstance(net, DiffusersModel):
            return Traffic()
        flops = 2 * ENCODERS.get(net.network, 0) * tokens_of(net.network, config.text)
        return Traffic(1, flops, 0, *(flops / one.flops for one in self.devices))


def price_lines(run: ResolvedRun, config: StudentConfig, trained: int, prices: Prices) -> list[str]:
    """Return lines on the GPU-hours of training, pairs, encoding and evaluation, and on disk.

    trained: the number of parameters that are trained.
    """
    recipe, teachers = run.recipe, [one for _, one in teacher_configs(run, config)]
    lines = [f"{recipe.trainer.steps} steps: {hours(prices.training(recipe, config, teachers))}"]
    if isinstance(recipe.coupling, Pairs) and (maker := pairs_config(run, config)) is not None:
        size = gib(pairs_bytes(recipe, config.shape))
        lines.append(f"{run.pairs.num} pairs: {hours(prices.pairs(recipe, maker))}, {size} on disk")
    if (encoding := prices.encoding(recipe, config)) is not None:
        size = gib(1e6 * sample_bytes(recipe, config))
        lines.append(f"encoding, each million pictures: {hours(encoding.times(1e6))}, {size} on disk")
    lines.append(f"the last evaluation: {hours(prices.evaluation(recipe, config, teachers, recipe.metrics))}")
    disk = run_bytes(recipe, trained)
    lines.append("disk: " + " + ".join(f"{gib(size)} {name}" for name, size in disk.items()))
    return lines


def gib(size: float) -> str:
    return f"{_counted(size / 2**30)} GiB"


def _counted(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def solver_calls(spec: Pairs) -> int:
    """The velocity calls of the solver for one pair."""
    return spec.solver(lambda x, t: torch.zeros_like(x), torch.zeros(1, 1)).calls


def hours(found: Traffic) -> str:
    """The range of GPU-hours."""
    return f"{_counted(found.seconds / 3600)} to {_counted(found.slow_seconds / 3600)} GPU-hours"


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
    text = example_conditions(net, 1, tokens_of(net.network, config.text))
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

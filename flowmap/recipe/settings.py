"""The settings of a recipe other than its mathematics: teacher and guidance, averages, trainer, log, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from flowmap.base.ranges import (
    Batch,
    BelowOne,
    Calls,
    Count,
    CountFromZero,
    Depth,
    FromZero,
    InsideOne,
    Range,
    Seed,
    Share,
    Side,
    check_ranges,
)  # fmt: skip
from flowmap.base.schema import added
from flowmap.flow.averaging import exponent_from_std, power_beta
from flowmap.flow.parts import Part
from flowmap.flow.types import RecipeView
from flowmap.nets.lora import LoRA
from flowmap.nets.policy import Points
from flowmap.nets.quantized import FORMATS


class BaseStudent(Part):
    """The optional members of a student's settings, with their defaults.

    artifact                  what a run of it writes to student/, as flow/types.py describes it for objectives
    takes_extra_conditions    the network takes conditions other than class and guidance
    attends_to_tokens         they may be rows of tokens
    holds_constants           the network has constants that no file of weights has, so it must be built with memory
    lora                      the adapters that are trained instead of its weights
    """

    artifact: ClassVar[str] = "student"
    takes_extra_conditions: ClassVar[bool] = False
    attends_to_tokens: ClassVar[bool] = False
    holds_constants: ClassVar[bool] = False

    @property
    def lora(self) -> LoRA | None:
        return None


@dataclass(frozen=True)
class FromTeacher(BaseStudent):
    """The student is the teacher's network with its weights, plus branches for arrival time and guidance that start at
    zero.

    lora: train adapters and branches, and freeze the weights (a teacher of kind diffusers only); `{}` is all defaults.
    lora_start: a LoRA of at most lora.rank that the adapters start from: a file, a folder, or a hub id.
    dropout: that of the student's network in training, where it has such a setting (EDM's and EDM2's); null keeps the
    teacher's. time_embedding: "t" replaces the teacher's embedding of log-sigma or of 1,000 t by one of t, fitted to it
    (EDM2's and diffusers' networks; nets/time_embedding.py); null keeps the teacher's. arrival_blocks: the number of
    last blocks that see the arrival time, of a DiT; null for all. points: the number of outputs, each of which starts
    as the teacher's, of a DiT or an MLP; two or more are a policy, for objective pi_flow; null for one.
    """

    lora: LoRA | None = None
    dropout: BelowOne | None = None
    time_embedding: str | None = added(None)
    arrival_blocks: Depth | None = added(None)
    points: Points | None = added(None)
    lora_start: str | None = added(None)

    def __post_init__(self):
        check_ranges(self)
        _check_time_embedding(self.time_embedding)

    def check(self, recipe: RecipeView) -> None:
        if self.lora is None:
            if self.lora_start is not None:
                raise ValueError(f"student.lora_start: {self.lora_start!r} wants student.lora, the adapters")
            return
        if self.time_embedding is not None:
            what = "a LoRA student keeps its teacher's frozen time embedding; leave it out"
            raise ValueError(f"student.time_embedding: {what}")
        if recipe.trainer.frozen_precision != recipe.trainer.precision == "32":
            what = f"{recipe.trainer.teacher_precision!r} wants trainer.precision: bf16"
            raise ValueError(f"trainer.teacher_precision: {what} with a LoRA student, which has the teacher's weights")
        derivative = recipe.distillation.derivative
        if self.lora.dropout and derivative not in (None, "dual"):
            what = f"{self.lora.dropout} wants objective.derivative: dual; {derivative!r} would see another mask"
            raise ValueError(f"student.lora.dropout: {what}")


@dataclass(frozen=True)
class FromRecipe(BaseStudent):
    """The student starts from the averaged weights of another recipe's student; new branches start at zero.

    time_embedding: as of from_teacher; null keeps that of the other student.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    time_embedding: str | None = added(None)

    def __post_init__(self):
        _check_time_embedding(self.time_embedding)


@dataclass(frozen=True)
class ClassifierFree(Part):
    """Classifier-free guidance. scale: the range that training draws from. default: the scale of sampling and
    evaluation. interval: the times t, of 0 data to 1 noise, where guidance acts; elsewhere the scale is 1.
    interval_input: the student takes an interval within it as an input, in which guidance acts (improved MeanFlow,
    arXiv:2512.02012), its ends uniform in the two halves of `interval`. rescale_patch: patches of that side keep the
    norm of the conditional velocity, as in QwenImage's pipeline (2).
    """

    scale: tuple[FromZero, FromZero] = (1.0, 3.0)
    default: FromZero = 1.5
    interval: tuple[Share, Share] = added((0.0, 1.0))
    interval_input: bool = added(False)
    rescale_patch: Side | None = added(None)

    def __post_init__(self):
        check_ranges(self)
        _check_guidance(self.scale, self.interval)

    def check(self, recipe: RecipeView) -> None:
        if recipe.prior.learned:
            raise ValueError(
                "teacher.guidance: classifier_free wants conditions, and flows that start at a learned prior have none"
            )


@dataclass(frozen=True)
class Autoguidance(Part):
    """v = w v_strong + (1 - w) v_weak. The weak model is one of: another card, an earlier snapshot of the same run (at
    a share of its steps, in (0, 1)), or the same network with some blocks skipped. The other settings are as of
    classifier_free.
    """

    weak: str | None = None
    snapshot: InsideOne | None = None
    skip_blocks: tuple[Annotated[int, Range(0, 1000)], ...] = ()
    scale: tuple[FromZero, FromZero] = (1.0, 3.0)
    default: FromZero = 2.0
    interval: tuple[Share, Share] = added((0.0, 1.0))
    interval_input: bool = added(False)

    def __post_init__(self):
        check_ranges(self)
        _check_guidance(self.scale, self.interval)
        if sum((self.weak is not None, self.snapshot is not None, bool(self.skip_blocks))) != 1:
            raise ValueError(
                "weak: autoguidance wants exactly one of weak (a card), snapshot (a share of the run) and skip_blocks"
            )


@dataclass(frozen=True)
class Embedded(Part):
    """The guidance of a model that was distilled to take the scale as an input (FLUX.1-dev). scale, default, interval:
    as of classifier_free.
    """

    scale: tuple[FromZero, FromZero] = (1.0, 5.0)
    default: FromZero = 3.5
    interval: tuple[Share, Share] = added((0.0, 1.0))
    interval_input: ClassVar[bool] = False  # no network that such a student has takes one

    def __post_init__(self):
        check_ranges(self)
        _check_guidance(self.scale, self.interval)


@dataclass(frozen=True)
class PowerEMA:
    """EDM2's power-function average (arXiv:2312.02696). std: relative to the run's length; this average ships with the
    student.

    Averages with snapshot_stds are saved every snapshot_every_steps (0: never) and can be combined afterwards to any
    std.
    """

    std: Annotated[float, Range(0, 0.25, above=True, below=True)] = 0.05
    snapshot_stds: tuple[Annotated[float, Range(0, 0.25, above=True, below=True)], ...] = (0.05, 0.10)
    snapshot_every_steps: CountFromZero = 0

    def __post_init__(self):
        check_ranges(self)

    @property
    def widths(self) -> tuple[float, ...]:
        extra = self.snapshot_stds if self.snapshot_every_steps else ()
        return tuple(dict.fromkeys((self.std, *extra)))

    def kept(self, width: float, step: int) -> float:
        return power_beta(step, exponent_from_std(width))


@dataclass(frozen=True)
class ConstantEMA:
    """The ordinary exponential average; decay 0 is no average. A short run is not held back by its start."""

    decay: BelowOne = 0.999
    snapshot_every_steps: ClassVar[int] = 0

    def __post_init__(self):
        check_ranges(self)

    @property
    def widths(self) -> tuple[float, ...]:
        return (self.decay,)

    def kept(self, width: float, step: int) -> float:
        return min(width, step / (step + 9))


@dataclass(frozen=True)
class Trainer:
    """The length of a run and its hardware. steps: optimizer steps, each of `accumulate` batches on each device.

    compile: whether networks are compiled, and the derivative with them; `auto`: if the run is long enough to pay for
    it, 5,000 micro-batches, on a CPU 50,000 for a network without equal blocks (train/compiling.py). What cannot be
    compiled runs as it is, and the log says so; `cuda_graphs`: also record kernels as CUDA graphs, on CUDA alone.
    accumulate: with data.global_batch_size it follows from it, and may be left out. check_finite_every_steps: losses
    and gradients are checked on the device in every step, and the host reads the result so often; before anything is
    saved it always does. tf32: whether float32 matrix products on a GPU are of TensorFloat-32 while training.
    channels_last: the memory format of convolutions; null for channels_last on a GPU where most weights are kernels.
    teacher_precision: of the weights of frozen networks (the teacher, its weak model, the base of adapters, the text
    encoders of data.stored_text: captions); `auto` is that of `precision`. shard_size: with fsdp, the number of devices
    that weights are split over, each such group with a copy of all; null for the devices of a node, or all devices if
    nodes have one each.

    checkpoint_every_minutes: also save a checkpoint when the last one is that old. keep_checkpoints: the newest ones
    that are kept, last.ckpt among them. milestone_every_steps: checkpoints of these steps are saved and kept (0: none).
    workers: threads that read batches ahead, for each device; null: up to 2 if samples are read from disk for a GPU,
    otherwise none. Any number gives the same batches.
    """

    steps: Count = 10_000
    accumulate: Annotated[int, Range(1, 1_000_000)] = 1
    accelerator: str = "auto"
    devices: Annotated[int, Range(1, 1_000_000)] = 1
    num_nodes: Annotated[int, Range(1, 1_000_000)] = 1
    strategy: str = "auto"
    precision: str = "32"
    activation_checkpointing: bool = False
    compile: bool | str = False
    checkpoint_every_steps: Count = 500
    check_finite_every_steps: Count = added(1)
    tf32: bool = added(True)
    channels_last: bool | None = added(None)
    teacher_precision: str = added("auto")
    checkpoint_every_minutes: Annotated[float, Range(0, 1_000_000, above=True)] | None = added(None)
    keep_checkpoints: Annotated[int, Range(1, 1_000_000)] = added(1)
    milestone_every_steps: CountFromZero = added(0)
    shard_size: Count | None = added(None)
    workers: Annotated[int, Range(0, 256)] | None = added(None, hashed=False)

    def __post_init__(self):
        check_ranges(self)
        accelerators = ("auto", "cpu", "gpu", "cuda", "mps")
        for name, allowed in (
            ("accelerator", accelerators),
            ("strategy", ("auto", "ddp", "fsdp")),
            ("precision", ("32", "bf16")),
            ("compile", (True, False, "auto", "cuda_graphs")),
            ("teacher_precision", ("auto", "32", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(one if isinstance(one, str) else str(one).lower() for one in allowed)
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {choices}")

        if self.compile == "cuda_graphs":
            self._check_cuda_graphs()
        devices = self.devices * self.num_nodes
        if self.shard_size is not None and (self.strategy != "fsdp" or devices % self.shard_size):
            what = f"must divide the number of devices, {devices}, of a run with strategy fsdp"
            raise ValueError(f"shard_size: {self.shard_size} {what}")

    def _check_cuda_graphs(self) -> None:
        """Raise ValueError where kernels cannot be replayed in the memory in which they were recorded."""
        if self.strategy == "fsdp":
            what = "does not go with strategy fsdp, which gathers weights into new memory"
            raise ValueError(f"compile: cuda_graphs {what}")
        if self.accelerator in ("cpu", "mps"):
            raise ValueError(f"compile: cuda_graphs wants a CUDA device, and accelerator is {self.accelerator}")

    @property
    def shards(self) -> int:
        """The number of devices that weights are split over with fsdp."""
        automatic = self.devices if self.devices > 1 else self.num_nodes
        return automatic if self.shard_size is None else self.shard_size

    @property
    def frozen_precision(self) -> str:
        """The precision of frozen weights: "32" or "bf16"."""
        return self.precision if self.teacher_precision == "auto" else self.teacher_precision


@dataclass(frozen=True)
class Quantize(Part):
    """Weights in fewer bits than 16. frozen: the format of frozen weights, `int8` or `nf4`; null for that of
    trainer.teacher_precision.

    Frozen weights are those of the teacher and of a LoRA student's base. Linear layers of at least 4,096 weights in
    blocks are quantised when the run starts, others are not. The student's folder has adapters as always, and names
    the whole base.
    """

    frozen: str | None = None

    def __post_init__(self):
        if self.frozen not in (None, *FORMATS):
            raise ValueError(f"frozen: {self.frozen!r} is not one of {', '.join(FORMATS)}, null")

    def check(self, recipe: RecipeView) -> None:
        if self.frozen is not None and recipe.teacher is None:
            what = "wants frozen weights, and this recipe has neither a teacher nor a LoRA student"
            raise ValueError(f"quantize.frozen: {self.frozen!r} {what}")


@dataclass(frozen=True)
class Log:
    """What a run logs, and how often in optimizer steps; 0 for samples and metrics at the end only.

    metrics_images: the most images of a metric while training, in W&B and log.csv as metrics_of_<images>; null for as
    many as at the end. metrics_steps: the step counts that are measured while training; empty for all of the sampler's.
    table_samples: of the samples that are drawn, so many are also rows of a W&B table, each with the same noise and
    condition at every step; 0 for no table.
    """

    wandb: bool = True
    project: str = "flowmap"
    every_steps: Count = 50
    samples_every_steps: CountFromZero = 0
    metrics_every_steps: CountFromZero = 0
    grid_images: Annotated[int, Range(1, 10_000)] = 64
    metrics_images: Count | None = added(None)
    metrics_steps: tuple[Calls, ...] = added(())
    table_samples: CountFromZero = added(8, hashed=False)

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class Evaluation:
    """The final evaluation: all rows start from the same noise, drawn from `seed`. The teacher takes teacher_steps
    Euler steps.

    classes: of generated samples, "data" for the frequencies of the held-out samples (of the training samples if there
    are none), "uniform" for equal ones. captions: a file with the captions of generated samples, one a line or COCO's
    captions_*.json, of which each picture's first is used; they are taken in a fixed random order. Without it they are
    those of the held-out samples.
    """

    teacher_steps: Calls = 64
    teacher_extra_steps: tuple[Calls, ...] = ()
    batch_size: Batch = 512
    seed: Seed = 1234
    classes: str = "data"
    captions: str | None = added(None)

    def __post_init__(self):
        check_ranges(self)
        if self.classes not in ("data", "uniform"):
            raise ValueError(f"classes: {self.classes!r} is not one of data, uniform")


def _check_time_embedding(value: str | None) -> None:
    if value not in (None, "t"):
        raise ValueError(f"time_embedding: {value!r} is not one of t, null")


def _check_guidance(scale: tuple[float, float], interval: tuple[float, float]) -> None:
    if not scale[0] <= scale[1]:
        raise ValueError(f"scale: {scale} must be an increasing pair of numbers")
    if not interval[0] < interval[1]:
        raise ValueError(f"interval: {interval} must be two rising times in [0, 1] (0 data, 1 noise)")

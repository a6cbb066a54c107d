"""What the kernels of a training step cost on a device, counted on the meta device by running the real step.

Each kernel takes the largest of FLOPs over the device's rate, bytes over its bandwidth, and the time of an empty
kernel. Networks of the library diffusers are counted in the recipe's precision; networks of flowmap in float32, with
half the bytes for bf16. Time on the host, communication and what a compiler fuses are not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from flowmap.build.teacher import teacher_of_networks
from flowmap.estimate.attention import fused_attention
from flowmap.estimate.calls import WARM, without_networks
from flowmap.estimate.flops import flops_of
from flowmap.estimate.networks import frozen_outline, nameless, outline_of_network
from flowmap.estimate.remembered import Mode, remembered, tensors_in
from flowmap.flow.types import Cond, Teacher
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.edm2 import fold_filters
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.stacked import net_within
from flowmap.nets.uncertainty import with_uncertainty
from flowmap.recipe import Recipe
from flowmap.recipe.settings import Trainer
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of, empty_of

VIEWS = frozenset(
    "view _unsafe_view permute transpose t expand select slice unsqueeze squeeze split chunk unbind detach alias "
    "as_strided split_with_sizes narrow lift_fresh diagonal _reshape_alias empty empty_like new_empty empty_strided "
    "new_empty_strided is_same_size sym_size".split()
)  # operations that move no bytes
FLOAT32_SHARE, CONVOLUTION_SHARE = 0.1, 0.75  # the rates of float32 products and of convolutions
TF32_SHARE = 0.5  # that of products in TensorFloat-32


@dataclass(frozen=True)
class Device:
    """A device's rates. The defaults are those of an H100 that reaches about half of its dense bf16 peak."""

    flops: float = 450e12  # FLOP/s of bf16 matrix products
    bandwidth: float = 2.7e12  # bytes/s
    kernel_seconds: float = 2e-6  # an empty kernel

    def seconds(self, flops: float, size: float, share: float) -> float:
        """The seconds of a kernel whose products run at that share of the bf16 rate."""
        return max(flops / (self.flops * share), size / self.bandwidth, self.kernel_seconds)


def sustained(throughput: float) -> Device:
    """A device at that many TFLOP/s, half the bandwidth, and 12 microseconds of the host for each kernel."""
    return Device(throughput * 1e12, bandwidth=Device.bandwidth / 2, kernel_seconds=12e-6)


def float32_share(trainer: Trainer) -> float:
    """Return the share of the bf16 rate that float32 products reach in a training step."""
    return TF32_SHARE if trainer.tf32 else FLOAT32_SHARE


@dataclass
class Traffic:
    """Kernels with their FLOPs and the bytes that they read and write.

    seconds: at a device's limits. slow_seconds: on a sustained device.
    """

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    slow_seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.kernels + other.kernels,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.slow_seconds + other.slow_seconds,
        )

    @staticmethod
    def of_flops(flops: float, share: float, devices: Sequence[Device]) -> Traffic:
        """The traffic of so many FLOPs in large products at that share of the bf16 rate."""
        return Traffic(0, flops, 0, *(flops / (one.flops * share) for one in devices))

    def times(self, count: float) -> Traffic:
        """The traffic of so many of these."""
        sizes = (self.flops, self.bytes, self.seconds, self.slow_seconds)
        return Traffic(round(self.kernels * count), *(size * count for size in sizes))


@dataclass
class Counter(Mode):
    """Adds each kernel that runs under it to `found`. half: float32 stands for bf16. float32: the share of the bf16
    rate that products in float32 reach.
    """

    devices: tuple[Device, Device]
    half: bool = False
    float32: float = FLOAT32_SHARE
    found: Traffic = field(default_factory=Traffic)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function._overloadpacket
        name = packet.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:  # a number read from the device: any will do
            return False if args[0].dtype == torch.bool else args[0].dtype.is_floating_point and 0.5 or 1
        out = remembered(function, args, kwargs)
        if name not in VIEWS:
            self._count(packet, args, kwargs, out)
        return out

    def _count(self, packet, args, kwargs, out) -> None:
        tensors = tensors_in(args, kwargs, out)
        if not any(x.is_meta for x in tensors):
            return  # on the host
        size = sum(_bytes_of(x) for x in tensors) * (0.5 if self.half else 1)
        flops = flops_of(packet, args, kwargs, out)
        share = 1.0
        if not self.half and tensors and tensors[0].dtype not in (torch.bfloat16, torch.float16):
            share *= self.float32
        if "convolution" in packet.__name__:
            share *= CONVOLUTION_SHARE
        fast, slow = self.devices
        self.found.kernels += 1
        self.found.flops += flops
        self.found.bytes += size
        self.found.seconds += fast.seconds(flops, size, share)
        self.found.slow_seconds += slow.seconds(flops, size, share)


def _bytes_of(x: Tensor) -> int:
    """The bytes of the tensor's memory that an operation on it touches; an expanded dimension is read once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


class Timed:
    """A teacher whose calls are counted apart from those of the student."""

    def __init__(self, teacher: Teacher, counter: Counter):
        self.teacher, self.counter, self.found = teacher, counter, Traffic()

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        before, self.counter.found = self.counter.found, Traffic()
        out = self.teacher.velocity(x, t, cond)
        self.found, self.counter.found = self.found + self.counter.found, before
        return out


@dataclass(frozen=True)
class Step:
    """One micro-batch after warm-up, with an optimizer step.

    parts: the traffic of teacher, student, backward, optimizer and averages. student, teachers: the networks.
    student_calls, teacher_calls: how often the networks run, the latter of each teacher. student_graded: the calls of
    the student that have a backward pass.
    """

    parts: dict[str, Traffic]
    student: FlowMapNet
    teachers: list[FlowMapNet]
    student_calls: int
    student_graded: int
    teacher_calls: list[int]


def step_traffic(
    recipe: Recipe,
    config: StudentConfig,
    teachers: Sequence[StudentConfig],
    devices: tuple[Device, Device] = (Device(), sustained(200)),
) -> dict[str, Traffic]:
    """Return the traffic of the parts of `step_of`."""
    return step_of(recipe, config, teachers, devices).parts


def step_of(
    recipe: Recipe, config: StudentConfig, teachers: Sequence[StudentConfig], devices: tuple[Device, Device]
) -> Step:
    """Take one micro-batch after warm-up, and count its kernels and the calls of its networks.

    config: the student's. teachers: those of the teacher and of its weak model. Only the distillation of an
    adversarial objective is counted, and no network of a perceptual distance. Raises NotImplementedError for an
    operation that the meta device lacks.
    """
    batch, half = recipe.data.batch_size, recipe.trainer.precision == "bf16"
    counter = Counter(devices, float32=float32_share(recipe.trainer))
    wide = _dtype(config, half)
    student = outline_of_network(config).to(wide)
    frozen = [copy.deepcopy(frozen_outline(one, _dtype(one, half))) for one in teachers]
    for net in frozen:
        fold_filters(net)
    counter.half = half and wide == torch.float32
    with torch.device("meta"):
        student.train().checkpoint_activations(recipe.trainer.activation_checkpointing)
        if config.lora is None:
            student.requires_grad_(True)
        if recipe.distillation.learns_weight:
            student = with_uncertainty(student, recipe.seed)
        cond = {key: _as(value, wide) for key, value in conditions_of(config, batch).items()}
        x0, x1 = (torch.zeros(batch, *config.shape, dtype=wide) for _ in range(2))
        t, s = recipe.times(batch, device=torch.device("cpu"), generator=torch.Generator("cpu"))
        sample = recipe.path.sample(x0, x1, t.to("meta"), s.to("meta"), cond or None)
    sample = replace(sample, place=torch.arange(batch), still=t <= s)  # what the host knows of a batch
    built = teacher_of_networks(recipe, frozen, empty_of(cond)) if frozen else None
    teacher = None if built is None else Timed(built.in_training(recipe.teacher), counter)
    with _Calls(student) as calls, ExitStack() as stack, fused_attention():
        of_teachers = [stack.enter_context(_Calls(net)) for net in frozen]
        with counter:
            loss = without_networks(recipe.distillation)(student, teacher, sample, WARM).value
        forward, counter.found = counter.found, Traffic()
        with counter:
            loss.backward()
    found = {"teacher": teacher.found if teacher is not None else Traffic(), "student": forward}
    parts = found | {"backward": counter.found} | _updates(recipe, student, devices)
    return Step(parts, student, frozen, calls.count, calls.graded, [one.count for one in of_teachers])


class _Calls:
    """Counts the calls of a network within it."""

    def __init__(self, net: FlowMapNet):
        self.net, self.count, self.graded = net.net, 0, 0

    def __enter__(self) -> _Calls:
        self.hook = self.net.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _add(self, *unused: object) -> None:
        self.count += 1
        self.graded += torch.is_grad_enabled()


def _updates(recipe: Recipe, student: FlowMapNet, devices: tuple[Device, Device]) -> dict[str, Traffic]:
    """Return the traffic of the optimizer and of the averages, each one kernel that is bound by bandwidth."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    moments = 7 * 4 * trained  # read weight, gradient and two moments; write weight and moments
    averages = len(recipe.ema.widths) * 3 * 4 * trained
    sizes = {"optimizer": moments, "averages": averages}
    return {name: Traffic(1, 0, size, *(size / one.bandwidth for one in devices)) for name, size in sizes.items()}


def forward_traffic(
    config: StudentConfig, rows: int, half: bool, devices: tuple[Device, Device] = (Device(), sustained(200))
) -> Traffic:
    """Return the traffic of one forward pass without a graph, of a batch of so many rows."""
    return _forward_traffic(nameless(config), rows, half, devices)


@cache
def _forward_traffic(config: StudentConfig, rows: int, half: bool, devices: tuple[Device, Device]) -> Traffic:
    wide = _dtype(config, half)
    net, counter = frozen_outline(config, wide), Counter(devices, half and wide == torch.float32)
    with torch.device("meta"), fused_attention(), torch.no_grad():
        cond = {key: _as(value, wide) for key, value in conditions_of(config, rows).items()}
        x, t = torch.zeros(rows, *config.shape, dtype=wide), torch.zeros(rows)
        with counter:
            net.net(x, t, t, cond)
    return counter.found


def _dtype(config: StudentConfig, half: bool) -> torch.dtype:
    """bf16 for networks of diffusers in bf16, float32 for all others: ours convert themselves what they need."""
    return torch.bfloat16 if half and isinstance(net_within(config.net), DiffusersModel) else torch.float32


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.to("meta")
    return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value

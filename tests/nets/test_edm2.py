"""The EDM2 U-Net: sizes as published, output as in the original implementation, and the dual forward works."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowmap.build.frozen import hold_frozen
from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.nets.edm2 import EDM2, Conv, blend, fold_filters, joined, silu, unit
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.preconditioning import SIGMA_MAX
from flowmap.recipe import read_recipe
from tests.support import parity

SMALL = EDM2(channels=32, multipliers=(1, 2, 4), num_blocks=2, attention_at=(8, 4))
SHAPE = (3, 16, 16)


@pytest.mark.parametrize(
    ("preset", "millions"), [("XS", 125), ("S", 280), ("M", 498), ("L", 777), ("XL", 1119), ("XXL", 1523)]
)
def test_parameter_counts_are_the_published_ones(preset, millions):
    """Table 2 of arXiv:2312.02696, without the 128 weights of the training loss's own head."""
    with torch.device("meta"):
        net = EDM2(preset=preset).build((4, 64, 64), num_classes=1000, arrival=False)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def filled(net):
    """Weights by a formula, so that the original implementation can be given the same."""
    for i, (name, tensor) in enumerate(sorted(net.state_dict().items())):
        generator = torch.Generator().manual_seed(i)
        tensor.copy_(
            torch.full_like(tensor, 0.7) if name.endswith("gain") else torch.randn(tensor.shape, generator=generator)
        )
    return net.eval()


# (x - D) / t at indices 0, 100, ..., 700: D is the original denoiser (float32 inside), computed once with `filled`
# weights and these inputs
ORIGINAL = [
    [0.01587, -0.35998, 0.09184, 1.38787, 1.09841, 0.85207, -2.35661, -1.50037],
    [0.09700, -0.50531, 0.35813, 1.69674, 0.75226, 0.79443, 2.10676, 1.20029],
    [0.45351, -1.74944, 1.73281, 2.29237, 0.29434, -1.18597, 1.00563, 1.93678],
    [0.21981, -0.79062, 1.20365, 0.72102, -0.68257, 0.93397, -2.92994, 0.24832],
]


def inputs():
    generator = torch.Generator().manual_seed(99)
    return (
        torch.randn(4, *SHAPE, generator=generator),
        torch.tensor([0.01, 0.3, 0.7, 0.98]),
        torch.tensor([0, 3, 9, -1]),
    )


def test_the_output_is_the_original_implementations():
    net = filled(SMALL.build(SHAPE, num_classes=10, arrival=False))
    x, t, label = inputs()
    with torch.no_grad():
        out = net(x, t, t, {"class": label})
    torch.testing.assert_close(out.flatten(1)[:, 0:701:100], torch.tensor(ORIGINAL), rtol=1e-3, atol=1e-3)


def from_its_teacher(std=0.0):
    """The student at step 0 against its teacher, with random weights in its arrival branch: see parity.at_start."""
    teacher = FlowMapNet(filled(SMALL.build(SHAPE, num_classes=10, arrival=False)))
    student = FlowMapNet(SMALL.build(SHAPE, num_classes=10, arrival=True, guidance=True)).eval()
    start_from(student, teacher)
    if std:
        torch.nn.init.normal_(student.net.arrival.out.weight, std=std)
    x, t, label = inputs()
    return parity.at_start(
        student, teacher, x, t, 0.3 * t, {"class": label, "guidance": torch.tensor([1.0, 2.0, 3.0, 1.5])}
    )


def test_a_student_starts_as_its_teacher():
    assert from_its_teacher() == 0 < from_its_teacher(std=1.0)


def from_its_scheduler():
    """Euler with our velocity against diffusers' EDM scheduler, guidance on: see parity.of_edm_steps."""
    net, (x, _, label) = filled(SMALL.build(SHAPE, num_classes=10, arrival=False)), inputs()
    return parity.of_edm_steps(net, net.unet, x, label.clamp(min=0), guidance=2.5)


def test_euler_on_the_schedulers_grid_is_the_scheduler():
    assert from_its_scheduler() < 1e-4


def test_it_is_finite_and_steady_at_both_ends():
    net = filled(SMALL.build(SHAPE, num_classes=10, arrival=False))
    x, _, label = inputs()
    ends = torch.tensor([0.0, 0.0, 1.0, 1.0])
    last = SIGMA_MAX / (1 + SIGMA_MAX)
    with torch.no_grad():
        assert net(x, ends, ends, {"class": label}).isfinite().all()
        near, at = (net(x, torch.full((4,), t), torch.full((4,), t), {"class": label}) for t in (last, 1.0))
    assert (near - at).abs().max() < 0.1 * at.abs().max()


def from_the_reference_tangent():
    """The dual tangents against torch.func.jvp, float64: see parity.of_rates."""
    net = FlowMapNet(filled(SMALL.build(SHAPE, num_classes=10, arrival=True, guidance=True))).double()
    x, t, label = inputs()
    x, t, v = (
        x.double(),
        t.double(),
        torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    s, cond = 0.3 * t, {"class": label, "guidance": torch.ones(4).double()}
    rates = lambda mode: (
        eulerian_derivative(net, x, t, s, v, cond, mode=mode)[1],
        lagrangian_derivative(net, x, t, s, cond, mode=mode)[1],
    )
    return parity.of_rates(rates("dual"), rates("forward"))


def test_the_tangent_rides():
    assert from_the_reference_tangent() < 1e-9


def test_every_operation_keeps_the_magnitude():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 32, 16, 16, generator=generator)
    for out in (silu(a), blend(a, b, 0.3), joined(a, b), joined(a, b[:, :8]), unit(3 * a, 1)):
        assert abs(float(out.square().mean().sqrt()) - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "XXXL"}, "preset: 'XXXL'"),
        ({"channels": 0}, "channels: 0"),
        ({"multipliers": ()}, "multipliers"),
        ({"sigma_data": 0.0}, "sigma"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        EDM2(**settings)
    with pytest.raises(ValueError, match="do not halve"):
        EDM2().build((3, 12, 12))


class Norms(TorchDispatchMode):
    """Counts the norms that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.linalg_vector_norm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_frozen_teacher_normalises_its_weights_once_and_its_velocity_is_the_same(precision):
    teacher = FlowMapNet(filled(SMALL.build(SHAPE, num_classes=10, arrival=False)))
    student = copy.deepcopy(teacher)
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    hold_frozen(read_recipe("digits", [f"trainer.precision={precision}"]), [frozen], student)
    x, t, label = inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with Norms() as before:
            expected = teacher.velocity(x, t, {"class": label})
        with Norms() as after:
            assert torch.equal(frozen.velocity(x, t, {"class": label}), expected)
        hold_frozen(read_recipe("digits"), [frozen], student)  # a second time changes nothing
        assert torch.equal(frozen.velocity(x, t, {"class": label}), expected)
    layers = sum(isinstance(module, Conv) for module in teacher.modules())
    assert before.count - after.count == layers > 20
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters(), strict=True))
    fold_filters(student)
    assert not any(module.folded for module in student.modules() if isinstance(module, Conv))

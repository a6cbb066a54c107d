"""Rectified flow on pairs: zero at the exact velocity of straight pairs, descends to it from both sides.

It equals its formulas by hand.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowmap.flow.distance import PseudoHuber, Squared
from flowmap.flow.path import Linear
from flowmap.objectives import OBJECTIVES
from flowmap.objectives.perceptual import EfficientNetLite0, RandomConv, check_name, distance_by
from flowmap.objectives.rectified import LPIPSHuber, Rectified
from tests.support.oracle import GAUSSIAN, draw
from tests.support.straight import NET, Refuses, StraightStudent, drawn, loose, one_sided, pair

PLAIN = [Squared(), PseudoHuber(), PseudoHuber(0.02)]
LPIPS = [LPIPSHuber(net=NET), LPIPSHuber(net=NET, weight="inverse_time", scale=0.01)]
distances = pytest.mark.parametrize(
    "distance", PLAIN + LPIPS, ids=["squared", "huber", "huber .02", "lpips", "lpips / t"]
)


class Nearly(nn.Module):
    """The exact velocity of straight pairs, times scale, plus shift."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.exact = StraightStudent()
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def mean_velocity(self, x, t, s, cond=None):
        self.asked = (x, t, s, cond)
        return self.scale * self.exact.mean_velocity(x, t, s) + self.shift


def by_hand(distance, velocity, sample):
    """(B,), one sample at a time."""
    found = []
    for v, x0, x1, t, xt in zip(velocity, sample.x0, sample.x1, sample.t, sample.xt, strict=True):
        gap = (v - (x1 - x0)).square()
        if isinstance(distance, Squared):
            found.append(gap.sum() / gap.numel())
            continue
        k = distance.scale * gap.numel()
        huber = (torch.sqrt(gap.sum() + k * k) - k) / gap.numel()
        if isinstance(distance, PseudoHuber):
            found.append(huber)
            continue
        a, b = (F.interpolate(x[None].float(), (224, 224), mode="bilinear", antialias=True) for x in (xt - t * v, x0))
        found.append((1 - t) * huber + (1 / t if distance.weight == "inverse_time" else 1) * one_sided(a, b)[0])
    return torch.stack(found)


def gradient(student, sample, distance):
    return torch.stack(
        torch.autograd.grad(Rectified(distance)(student, None, sample, 0).value, [student.scale, student.shift])
    )


@distances
def test_zero_at_the_exact_velocity_and_towards_it_from_both_sides(distance):
    loss = Rectified(distance)(Nearly(), None, drawn(), 0)
    assert loss.value.abs() < 1e-12
    assert gradient(Nearly(), drawn(), distance).abs().max() < 1e-5  # pictures are looked at in float32
    for sign in (+1, -1):
        assert sign * gradient(Nearly(scale=1 + 0.02 * sign), drawn(), distance)[0] > 1e-4
        assert sign * gradient(Nearly(shift=0.02 * sign), drawn(), distance)[1] > 1e-4


@distances
def test_value_and_log_are_those_of_the_formula_by_hand(distance):
    for sample in (loose(), drawn()):
        student = Nearly(scale=0.6, shift=0.2)
        loss = Rectified(distance)(student, Refuses(), sample, 0)
        velocity = student.mean_velocity(sample.xt, sample.t, sample.t).detach()
        expected = by_hand(distance, velocity, sample)
        torch.testing.assert_close(loss.logs["error"].double(), expected.double(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loss.value.detach().double(), expected.double().mean(), rtol=1e-5, atol=1e-7)
        assert loss.logs["error"].shape == (5,) and not loss.logs["error"].requires_grad


@distances
def test_the_gradient_is_the_slope_of_the_value(distance):
    sample, h = loose(), 1e-2 if isinstance(distance, LPIPSHuber) else 1e-5
    value = lambda scale, shift: Rectified(distance)(Nearly(scale, shift), None, sample, 0).value.detach()
    slopes = (value(0.6 + h, 0.2) - value(0.6 - h, 0.2), value(0.6, 0.2 + h) - value(0.6, 0.2 - h))
    torch.testing.assert_close(
        gradient(Nearly(0.6, 0.2), sample, distance), torch.stack(slopes) / (2 * h), rtol=2e-3, atol=1e-6
    )


@distances
def test_the_student_is_asked_on_the_diagonal_with_its_condition_and_nobody_else_is(distance):
    cond = {"class": torch.tensor([0, 1, -1, 2, 1])}
    sample, student = drawn(cond=cond), Nearly(scale=1.1)
    Rectified(distance)(student, Refuses(), sample, 0)
    x, t, s, seen = student.asked
    assert torch.equal(x, sample.xt) and torch.equal(t, sample.t) and torch.equal(s, sample.t) and seen is cond
    assert Rectified.diagonal and OBJECTIVES["rectified"] is Rectified


@distances
def test_a_permutation_of_the_batch_changes_nothing(distance):
    sample, order = loose(), torch.tensor([3, 0, 4, 2, 1])
    shuffled = Linear().sample(*(getattr(sample, name)[order] for name in ("x0", "x1", "t", "s")))
    a, b = (Rectified(distance)(Nearly(scale=1.1), None, given, 0) for given in (sample, shuffled))
    torch.testing.assert_close(a.value, b.value)
    torch.testing.assert_close(a.logs["error"][order], b.logs["error"])


def test_the_weight_at_the_end_stays_finite():
    x0, x1 = pair()
    sample = Linear().sample(x0, x1, torch.zeros(5), torch.zeros(5))
    assert torch.isfinite(Rectified(LPIPS[1])(Nearly(scale=0.5), None, sample, 0).value)


def test_grey_pictures_are_looked_at_in_colour_and_points_are_refused():
    grey = draw(5, 1, 4, 6)
    torch.testing.assert_close(
        distance_by(NET, grey, 0.5 * grey),
        distance_by(NET, grey.expand(-1, 3, -1, -1), 0.5 * grey.expand(-1, 3, -1, -1)),
    )
    with pytest.raises(ValueError, match="needs pictures"):
        distance_by(NET, draw(5, 2), draw(5, 2))


def test_mistakes_are_named(monkeypatch, tmp_path):
    for wrong in ("lpip", "module:", ":name"):
        with pytest.raises(ValueError, match="net: .* is not one of lpips"):
            check_name(wrong)
    with pytest.raises(ValueError, match="weight: 't'"):
        LPIPSHuber(weight="t")
    with pytest.raises(ValueError, match="cannot be imported"):
        distance_by("tests.support.straight:nothing", draw(), draw())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="vgg16-397923af.pth; none are downloaded"):
        distance_by("lpips", draw(), draw())


def test_lpips_takes_its_trunk_from_the_release_file_and_its_heads_from_the_package(monkeypatch, tmp_path):
    import flowmap.base.torchvision_shim

    flowmap.base.torchvision_shim.install()
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    trunk = alexnet(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(trunk.state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    a, b = draw(2, 3, 8, 8).clamp(-1, 1).float(), draw(2, 3, 8, 8, seed=1).clamp(-1, 1).float()
    found = distance_by("lpips_alex", a.requires_grad_(), b)
    assert found.shape == (2,) and (found > 0).all() and distance_by("lpips_alex", b, b).abs().max() < 1e-6
    assert torch.autograd.grad(found.sum(), a)[0].abs().sum() > 0
    from flowmap.objectives.perceptual import perceptual

    inner = perceptual("lpips_alex", a.device).net.net
    torch.testing.assert_close(inner.state_dict()["slice2.3.weight"], trunk.state_dict()["features.3.weight"])


@pytest.mark.slow
def test_a_packaged_network_is_a_distance_with_a_gradient():
    pytest.importorskip("efficientnet_lite_pytorch")
    net = EfficientNetLite0().eval()
    assert len(net.features(torch.zeros(1, 3, 224, 224))) == 5
    a, b = draw(2, 3, 16, 16).clamp(-1, 1).float(), draw(2, 3, 16, 16, seed=1).clamp(-1, 1).float()
    found = distance_by("efficientnet_lite0", a.requires_grad_(), b)
    assert (found > 0).all() and torch.equal(distance_by("efficientnet_lite0", b, b), torch.zeros(2))
    assert torch.autograd.grad(found.sum(), a)[0].abs().sum() > 0


def test_the_exact_pairs_are_those_of_the_exact_flow():
    x0, x1 = pair()
    torch.testing.assert_close(GAUSSIAN.flow_map(x1, torch.ones(5).double(), torch.zeros(5).double()), x0)


def test_random_convolutions_are_the_same_everywhere_and_take_pictures_as_they_are():
    a, b = torch.rand(3, 1, 8, 8) * 2 - 1, torch.rand(3, 1, 8, 8) * 2 - 1
    found = distance_by("random_conv", a.requires_grad_(), b)
    assert found.shape == (3,) and bool((found > 0).all())
    assert float(distance_by("random_conv", b, b).abs().max()) == 0
    found.sum().backward()
    assert bool(a.grad.isfinite().all()) and float(a.grad.abs().sum()) > 0
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(RandomConv()(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)), found)
    assert torch.equal(torch.get_rng_state(), state)

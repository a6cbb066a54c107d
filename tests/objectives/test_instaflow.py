"""One-step distillation: zero at the exact map of the pairs, descends to it from both sides, equals its formula.

A network learns it.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowmap.flow.path import Linear
from flowmap.flow.types import broadcast_time
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import OBJECTIVES, Endpoint
from flowmap.objectives.instaflow import PICTURE_DISTANCES, Network, Pictures
from flowmap.objectives.rectified import LPIPSHuber, Rectified
from tests.support.oracle import GAUSSIAN, ExactStudent, draw, draw_times
from tests.support.straight import NET, Refuses, drawn, loose, one_sided

SEES = {"network": Network(NET), "pictures": Pictures()}
OBJECTS = {
    "squared": Endpoint(),
    **{name: Endpoint(seen, 0, 0.25) for name, seen in SEES.items()},
    "alone": Endpoint(Pictures()),
}
objectives = pytest.mark.parametrize("objective", OBJECTS.values(), ids=OBJECTS)


class Nearly(nn.Module):
    """The exact flow map of Gaussian data, its mean velocity times scale, plus shift."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.exact = ExactStudent(GAUSSIAN)
        self.scale, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (scale, shift))

    def forward(self, x, t, s, cond=None):
        self.asked = (x, t, s, cond)
        return x + broadcast_time(s - t, x) * (self.scale * self.exact.mean_velocity(x, t, s) + self.shift)


class Decoded(Nearly):
    """Its samples are latents: their pictures have every entry doubled, and squared beside it."""

    def pictures(self, x):
        return torch.cat([2 * x, x.square()], -1)


def by_hand(objective, student, sample, pictures):
    """(B,), one sample at a time."""
    found = []
    for x0, x1 in zip(sample.x0, sample.x1, strict=True):
        arrival = student(x1[None], torch.ones(1).double(), torch.zeros(1).double())[0].detach()
        error = (arrival - x0).square().mean()
        if objective.perceptual is not None:
            a, b = (pictures(x[None]) for x in (arrival, x0))
            if isinstance(objective.perceptual, Network):
                a, b = (F.interpolate(x.float(), (224, 224), mode="bilinear", antialias=True) for x in (a, b))
                seen = one_sided(a, b)[0]
            else:
                seen = (a - b).square().mean()
            error = objective.squared * error + (1 - objective.squared) * seen
        found.append(error)
    return torch.stack(found)


def gradient(student, sample, objective):
    return torch.stack(torch.autograd.grad(objective(student, None, sample, 0).value, [student.scale, student.shift]))


@objectives
@pytest.mark.parametrize("kind", [Nearly, Decoded])
def test_zero_at_the_exact_map_and_towards_it_from_both_sides(objective, kind):
    assert objective(kind(), None, drawn(), 0).value.abs() < 1e-12
    assert gradient(kind(), drawn(), objective).abs().max() < 1e-5  # pictures are looked at in float32
    for sign in (+1, -1):
        assert sign * gradient(kind(scale=1 + 0.02 * sign), drawn(), objective)[0] > 1e-4
        assert sign * -gradient(kind(shift=-0.02 * sign), drawn(), objective)[1] > 1e-4


@objectives
@pytest.mark.parametrize("kind", [Nearly, Decoded])
def test_the_value_is_that_of_the_formula_by_hand(objective, kind):
    student, sample = kind(scale=0.6, shift=0.2), loose()
    loss = objective(student, Refuses(), sample, 0)
    expected = by_hand(objective, student, sample, getattr(student, "pictures", lambda x: x)).mean()
    torch.testing.assert_close(loss.value.detach().double(), expected.double(), rtol=1e-5, atol=1e-7)
    squared = by_hand(Endpoint(), student, sample, None).mean()
    torch.testing.assert_close(loss.logs["squared"].double(), squared, rtol=1e-5, atol=1e-7)
    assert set(loss.logs) == ({"squared"} if objective.perceptual is None else {"squared", "perceptual"})
    assert not any(log.requires_grad for log in loss.logs.values())


@objectives
def test_the_gradient_is_the_slope_of_the_value(objective):
    sample, h = loose(), 1e-2 if isinstance(objective.perceptual, Network) else 1e-5
    value = lambda scale, shift: objective(Decoded(scale, shift), None, sample, 0).value.detach()
    slopes = (value(0.6 + h, 0.2) - value(0.6 - h, 0.2), value(0.6, 0.2 + h) - value(0.6, 0.2 - h))
    torch.testing.assert_close(
        gradient(Decoded(0.6, 0.2), sample, objective), torch.stack(slopes) / (2 * h), rtol=2e-3, atol=1e-6
    )


def test_before_its_step_the_perceptual_distance_plays_no_part():
    objective, student, sample = Endpoint(Pictures(), 7), Decoded(0.6, 0.2), loose()
    plain = Endpoint()(student, None, sample, 0).value
    assert torch.equal(objective(student, None, sample, 6).value, plain)
    torch.testing.assert_close(
        objective(student, None, sample, 7).value, by_hand(objective, student, sample, student.pictures).mean()
    )


@objectives
def test_the_student_is_asked_once_from_the_noise_to_the_data_with_its_condition(objective):
    cond = {"class": torch.tensor([0, 1, -1, 2, 1])}
    sample, student = drawn(cond=cond), Nearly(scale=1.1)
    objective(student, Refuses(), sample, 0)
    x, t, s, seen = student.asked
    assert (
        torch.equal(x, sample.x1)
        and torch.equal(t, torch.ones(5).double())
        and torch.equal(s, torch.zeros(5).double())
        and seen is cond
    )
    assert OBJECTIVES["endpoint"] is Endpoint and set(PICTURE_DISTANCES) == {"network", "pictures"}


@objectives
def test_times_and_the_order_of_the_batch_change_nothing(objective):
    sample, order = loose(), torch.tensor([3, 0, 4, 2, 1])
    t, s = draw_times(seed=9)
    shuffled = Linear().sample(sample.x0[order], sample.x1[order], t, s)
    a, b = (objective(Nearly(scale=1.1), None, given, 0).value for given in (sample, shuffled))
    torch.testing.assert_close(a, b)


def test_descending_it_trains_a_small_net():
    torch.manual_seed(0)
    student = FlowMapNet(MLP(width=32, depth=1).build((2,), arrival=False))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    errors = []
    for step in range(200):
        x1 = draw(64, 2, seed=step, dtype=torch.float32)
        x0 = GAUSSIAN.mean[0] + GAUSSIAN.std * x1
        loss = Endpoint(Pictures(), 100)(student, None, Linear().sample(x0, x1, torch.rand(64), torch.zeros(64)), step)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        errors.append(float(loss.logs["squared"]))
    assert sum(errors[-5:]) < 0.02 * sum(errors[:5])


def test_a_flow_map_decodes_where_training_says_so_and_no_copy_or_state_has_it():
    student = FlowMapNet(MLP(width=8, depth=1).build((2,)))
    x = draw(5, 2)
    names = set(student.state_dict())
    assert student.pictures(x) is x
    student.decode = lambda z: 3 * z
    assert torch.equal(student.pictures(x), 3 * x) and set(student.state_dict()) == names


def test_lpips_huber_looks_at_what_latents_decode_to():
    class Latent(nn.Module):
        def mean_velocity(self, x, t, s, cond=None):
            return 0.3 * x

        def pictures(self, x):
            return torch.cat([2 * x, x.square()], -1)

    sample, student = loose(), Latent()
    distance = LPIPSHuber(net=NET)
    guess = sample.xt - broadcast_time(sample.t, sample.xt) * 0.3 * sample.xt
    huber = (1 - sample.t) * Rectified()(student, None, sample, 0).logs["error"]
    seen = Network(NET)(student.pictures(guess), student.pictures(sample.x0))
    torch.testing.assert_close(
        Rectified(distance)(student, None, sample, 0).logs["error"].double(),
        huber.double() + seen.double(),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"perceptual": Pictures(), "perceptual_after_steps": -1}, "perceptual_after_steps: -1 must be 0 or more"),
        ({"perceptual": Pictures(), "squared": 1.5}, "squared: 1.5 must lie in"),
        ({"perceptual_after_steps": 3}, "have no effect without"),
        ({"squared": 0.5}, "have no effect without"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Endpoint(**settings)
    with pytest.raises(ValueError, match="net: 'lpip' is not one of"):
        Network("lpip")

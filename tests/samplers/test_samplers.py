import math

import pytest
import torch

from flowmap.samplers import SAMPLERS
from flowmap.samplers.deterministic import Deterministic
from flowmap.samplers.gamma import Gamma
from tests.support.oracle import GAUSSIAN, SHAPE, ExactStudent, draw, seeded


class Recorder:
    """A student that remembers what it was asked."""

    def __init__(self, student):
        self.student, self.calls = student, []

    def __call__(self, x, t, s, cond=None):
        self.calls.append((x, t, s, cond))
        return self.student(x, t, s, cond)


def exact(x):
    return GAUSSIAN.flow_map(x, torch.ones(len(x), dtype=x.dtype), torch.zeros(len(x), dtype=x.dtype))


@pytest.mark.parametrize(
    "grid", [{}, {"grid": "shifted", "shift": 3.0}, {"grid": "rho"}, {"middle": (0.8, 0.1)}], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_deterministic_on_the_exact_map_does_not_depend_on_the_steps(steps, grid):
    x1, student = draw(), Recorder(ExactStudent())
    cond = {"guidance": torch.rand(5)}
    torch.testing.assert_close(Deterministic(**grid)(student, x1, cond, steps=steps), exact(x1))
    assert len(student.calls) == steps and all(call[3] is cond for call in student.calls)


def test_few_steps_of_a_flow_map_with_an_error_get_better():
    """methods.md section 1: with a 2 % error in F the std's error falls with more steps."""
    x1, errors = draw(), []
    for steps in (1, 4, 16, 64):
        x0 = Deterministic()(ExactStudent(scale=1.02), x1, steps=steps)
        errors.append(float((x0 - exact(x1)).norm()))
    assert errors[0] > errors[1] > errors[3]


def test_gamma_zero_is_deterministic_to_the_bit():
    x1 = draw(dtype=torch.float32)
    for steps in (1, 2, 3, 7):
        state = seeded(1)
        ours = Gamma(gamma=0.0)(ExactStudent(), x1, steps=steps, generator=state)
        assert torch.equal(ours, Deterministic()(ExactStudent(), x1, steps=steps))
        assert torch.equal(state.get_state(), seeded(1).get_state())


def test_gamma_one_goes_to_zero_and_back():
    x1, student = draw(), Recorder(ExactStudent())
    x0 = Gamma(gamma=1.0)(student, x1, steps=3, generator=seeded(4))
    noise, x = seeded(4), x1
    for t, s in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        ones = torch.ones(5, dtype=torch.float64)
        x = (1 - s) * GAUSSIAN.flow_map(x, t * ones, 0 * ones)
        if s > 0:
            x = x + s * torch.randn(SHAPE, generator=noise).double()
    torch.testing.assert_close(x0, x)
    assert all((s == 0).all() for _, _, s, _ in student.calls)


def test_arrival_times_are_ctms():
    student = Recorder(ExactStudent())
    Gamma(gamma=0.6, middle=(0.5,))(student, draw(), steps=2, generator=seeded())
    # sigma(0.5) = 1, sigma~ = sqrt(1 - 0.36) = 0.8, s~ = 0.8 / 1.8
    torch.testing.assert_close(student.calls[0][2], torch.full((5,), 0.8 / 1.8, dtype=torch.float64))
    assert (student.calls[1][1] == 0.5).all() and (student.calls[1][2] == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_every_step_has_the_marginal_of_the_path(gamma):
    x1, student = torch.randn(40_000, 1, generator=seeded(1), dtype=torch.float64), Recorder(ExactStudent())
    x0 = Gamma(gamma=gamma)(student, x1, steps=4, generator=seeded(2))
    for x, t in [(call[0], call[1][0]) for call in student.calls] + [(x0, torch.tensor(0.0, dtype=torch.float64))]:
        mean, std = (1 - t) * 0.7, math.hypot((1 - t) * 0.4, t)
        assert abs(float(x.mean()) - float(mean)) < 5 * std / 200  # 5 standard errors
        assert abs(float(x.std()) - std) < 5 * std / 280


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_the_marginal_in_closed_form(gamma):
    """The exact map is linear: the variance of a step is that of its slope, from a pair of inputs, plus the noise."""
    c, m, s = 0.4, 0.7, 0.35
    student = Recorder(ExactStudent())
    inputs = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    Gamma(gamma=gamma, middle=(s,))(student, inputs, steps=2, generator=seeded(3))
    noise = gamma * s * (torch.randn(2, 1, generator=seeded(3)).double() if gamma else 0)
    kept = student.calls[1][0] - noise
    variance = float(kept[1] - kept[0]) ** 2 + (gamma * s) ** 2  # x1 has mean 0 and variance 1
    assert abs(variance - ((1 - s) ** 2 * c**2 + s**2)) < 1e-12 and abs(float(kept[0]) - (1 - s) * m) < 1e-12


def test_below_one_t_max_scales_the_noise():
    student = Recorder(ExactStudent())
    x1 = draw()
    Deterministic(t_max=0.9)(student, x1, steps=2)
    torch.testing.assert_close(student.calls[0][0], 0.9 * x1)
    assert (student.calls[0][1] == 0.9).all() and (student.calls[0][2] == 0.45).all()


def test_times_are_float32_for_a_half_precision_state():
    student = Recorder(lambda x, t, s, cond: x)
    out = Gamma()(student, draw().bfloat16(), steps=2, generator=seeded())
    assert (
        out.dtype == torch.bfloat16 and student.calls[1][1].dtype == torch.float32 and student.calls[1][1].shape == (5,)
    )


REQUIRED = {"tilted": {"reward": lambda x, cond: x.flatten(1).sum(1)}}


def make(kind: str):
    return SAMPLERS[kind](**REQUIRED.get(kind, {}))


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_below_one_are_refused(kind, steps):
    sampler = make(kind)
    with pytest.raises(ValueError, match="steps is"):
        sampler(ExactStudent(), draw(), steps=steps)


@pytest.mark.parametrize("sampler", [*map(make, SAMPLERS), Gamma(gamma=0.0)], ids=[*SAMPLERS, "gamma 0"])
def test_a_sampler_states_whether_it_draws(sampler):
    one, other = (sampler(ExactStudent(), draw(), steps=3, generator=seeded(i)) for i in range(2))
    assert sampler.draws != torch.equal(one, other)


def test_gamma_is_between_zero_and_one():
    with pytest.raises(ValueError, match="gamma: 1.1 must lie in"):
        Gamma(gamma=1.1)

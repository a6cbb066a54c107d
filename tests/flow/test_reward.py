"""Weights of particles: systematic resampling is unbiased and as even as it can be; rewards of a wrong shape."""

import pytest
import torch

from flowmap.flow.draws import RowGenerator
from flowmap.flow.reward import effective, resampled, rewards_of, uniform_rows
from tests.support.oracle import draw, seeded


def test_a_particle_is_drawn_as_often_as_its_weight_says():
    weights = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    points = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    counts = torch.zeros(2, 4)
    for u in points:
        places = resampled(weights.log(), u.expand(2, 1), 10)
        found = torch.stack([(places == j).sum(1) for j in range(4)], 1)
        assert ((found - 10 * weights).abs() < 1 + 1e-9).all(), "at most one away from its share"
        counts += found / len(points)
    torch.testing.assert_close(counts, 10 * weights.float(), atol=0.02, rtol=0)


def test_the_effective_number_is_between_one_and_all():
    log_weights = torch.tensor([[3.0] * 4, [0, -1e30, -1e30, -1e30], [0, 0, -1e30, -1e30]], dtype=torch.float64)
    torch.testing.assert_close(effective(log_weights), torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))


def test_uniform_draws_are_of_their_row():
    generator = RowGenerator("rows", torch.arange(5))
    whole = uniform_rows(5, 3, torch.device("cpu"), generator)
    part = uniform_rows(2, 3, torch.device("cpu"), RowGenerator("rows", torch.arange(5)).at(torch.tensor([3, 1])))
    assert torch.equal(whole[[3, 1]], part) and whole.unique().numel() == 15
    assert uniform_rows(5, 3, torch.device("cpu"), seeded()).shape == (5, 3)


@pytest.mark.parametrize("wrong", [lambda x, cond: x.mean(), lambda x, cond: x, lambda x, cond: 1.0])
def test_a_reward_is_one_number_a_sample(wrong):
    with pytest.raises(ValueError, match="reward: returns .* for 5 samples; wants a tensor of 5 numbers"):
        rewards_of(wrong, None, draw(), None)


def test_latents_are_decoded_first():
    class Student:
        def pictures(self, x):
            return 2 * x

    x = draw()
    found = rewards_of(lambda x, cond: x.flatten(1).sum(1) + cond["class"], Student(), x, {"class": torch.ones(5)})
    torch.testing.assert_close(found, 2 * x.flatten(1).sum(1) + 1)

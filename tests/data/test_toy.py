"""The ring's points have the means, spread and weights that it states."""

import pytest
import torch

from flowmap.data import Toy


def test_points_follow_the_stated_mixture():
    spec = Toy(num_modes=5, radius=2.0, std=0.3, points=50_000)
    data = spec.build()
    assert (
        data.shape == (2,)
        and data.train.shape == (50_000, 2)
        and data.held_out.shape == (10_000, 2)
        and data.num_classes == 5
    )
    for k in range(5):
        own = data.train[data.labels == k].double()
        assert abs(len(own) / 50_000 - spec.weights[k].item()) < 0.01  # five standard errors
        assert torch.allclose(own.mean(0), spec.means[k], atol=0.015)  # five standard errors: 5 * 0.3 / 100
        assert torch.allclose(own.T.cov(), 0.09 * torch.eye(2, dtype=torch.float64), atol=0.007)


def test_means_lie_on_the_circle():
    spec = Toy(num_modes=7, radius=3.0)
    assert torch.allclose(spec.means.norm(dim=1), torch.full((7,), 3.0, dtype=torch.float64))
    assert spec.means.sum(0).abs().max() < 1e-12 and abs(spec.weights.sum() - 1) < 1e-12
    assert Toy(num_modes=1, radius=0.0).means.tolist() == [[0.0, 0.0]]


def test_seed_decides():
    a, b, c = Toy(points=50).build(), Toy(points=50).build(), Toy(points=50, seed=1).build()
    assert a.train.equal(b.train) and a.labels.equal(b.labels) and not a.train.equal(c.train)


@pytest.mark.parametrize(("key", "value"), [("num_modes", 0), ("points", 3), ("std", 0.0)])
def test_refuses(key, value):
    with pytest.raises(ValueError, match=f"{key}: {value} must be"):
        Toy(**{key: value})

"""The lexicographic step: closed forms, and that the first loss wins."""

import pytest
import torch

from flowmap.flow.barrier import barrier, barrier_weight, lexicographic


def test_the_weight_is_the_formula():
    first, second = (
        [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])],
        [torch.tensor([-1.0, 2.0]), torch.tensor([[-2.0]])],
    )
    assert float(barrier_weight(first, second, 5.0)) == pytest.approx((5 - (-3 - 8)) / 25)
    assert float(barrier_weight(first, [-one for one in second], 5.0)) == 0  # they agree already
    assert float(barrier_weight([torch.zeros(2)], [torch.ones(2)], 1.0)) == 0


def test_the_direction_goes_down_the_first_by_at_least_phi_and_changes_the_second_no_more_than_needed():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, f = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
        phi = barrier([g], least=0.0, value=1.0, alpha=0.3)
        (d,) = lexicographic([g], [f], phi)
        assert float(d @ g) >= float(phi) - 1e-12
        if float(f @ g) >= float(phi):
            assert torch.equal(d, f)
        else:
            assert float(d @ g) == pytest.approx(float(phi))  # on the boundary: the nearest allowed point


def test_the_barrier_is_the_smaller_of_its_two():
    g = [torch.full((4,), 2.0)]
    assert float(barrier(g, least=1.0, value=3.0, alpha=0.5, beta=1.0)) == 1.0
    assert float(barrier(g, least=1.0, value=300.0, alpha=0.5, beta=0.25)) == 4.0


def test_it_ends_at_the_best_of_the_second_among_the_minima_of_the_first():
    """g = x^2, f = (x - 1)^2 + (y - 1)^2: the lexicographic optimum is (0, 1), that of the sum (1/2, 1)."""
    p = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for _ in range(400):
        x, y = p
        first, second = torch.stack([2 * x, 0 * y]), torch.stack([2 * (x - 1), 2 * (y - 1)])
        p = p - 0.05 * lexicographic([first], [second], barrier([first], least=0.0, value=x * x))[0]
    assert abs(float(p[0])) < 0.06 and abs(float(p[1]) - 1) < 1e-3

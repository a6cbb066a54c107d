"""Shares: within one sample of the exact number up to any step, exact where that is whole, and independent."""

from fractions import Fraction

import pytest
import torch

from flowmap.flow.shares import called_on, evenly, fraction, taken

SHARES = [0.0, 0.05, 0.15, 0.2, 0.25, 1 / 3, 0.75, 0.8, 0.123456, 1.0]


@pytest.mark.parametrize("turned", [None, 1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_a_share_holds_to_within_one_sample_and_exactly_where_it_is_whole(share, turned):
    for start in (0, 10**9):
        count = torch.arange(start, start + 6000)
        chosen, before = evenly(count, share, turned=turned), taken(count, share, turned=turned)
        assert torch.equal(chosen.long(), taken(count + 1, share, turned=turned) - before)
        assert float((before - count.double() * share).abs().max()) < 1 + 1e-6  # 10^9 times a float's rounding
    whole = fraction(share).denominator
    if whole < 1000:
        counts = evenly(torch.arange(50 * whole), share, turned=turned).view(50, whole).sum(1)
        assert counts.tolist() == [fraction(share).numerator] * 50


def test_a_share_is_the_fraction_that_was_meant():
    assert (
        fraction(0.15) == Fraction(3, 20)
        and fraction(1 / 3) == Fraction(1, 3)
        and fraction(Fraction(4, 17)) == Fraction(4, 17)
    )


@pytest.mark.parametrize("share", [0.25, 0.05, 0.2])
@pytest.mark.parametrize("other", [0.25, 0.5, 0.05, 0.75])
def test_a_share_that_is_turned_has_its_part_of_another(share, other):
    """Of the same period they would else be one and the same, or have no sample in common."""
    n = 40_000
    place = torch.arange(n)
    first, second = evenly(place, share), evenly(place, other, turned=1)
    assert abs(int((first & second).sum()) / n - share * other) < 4 * (share * other / n) ** 0.5
    third = evenly(taken(place, other, turned=1), 0.5, turned=2)  # half of the second's
    assert int((second & third).sum()) == n * other / 2
    assert abs(int((first & second & third).sum()) / n - share * other / 2) < 4 * (share * other / 2 / n) ** 0.5


def test_the_network_is_called_on_the_rows_that_there_are():
    rows = torch.tensor([False, True, False, True])
    cpu = torch.device("cpu")
    assert called_on(rows, None, cpu).places.tolist() == [1, 3] and called_on(rows & False, None, cpu) is None

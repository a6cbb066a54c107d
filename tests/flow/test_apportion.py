"""Classes follow the law of given counts to within one sample, and about every first part of them does."""

import pytest
import torch

from flowmap.flow.apportion import apportioned


@pytest.mark.parametrize("counts", [[95, 5], [1, 1, 1], [60, 0, 30, 10], [997, 2, 1], [3, 5, 7, 11]])
@pytest.mark.parametrize("num", [1, 7, 40, 501])
def test_classes_follow_the_law_and_so_does_every_first_part(counts, num):
    counts = torch.tensor(counts)
    found, law = apportioned(counts, num), counts / counts.sum()
    assert found.shape == (num,) and found.dtype == torch.int64
    for part in range(1, num + 1):
        off = (torch.bincount(found[:part], minlength=len(counts)) - law * part).abs()
        assert off.max() < (1 if part == num else 2), (
            part,
            off,
        )  # the quota rule for all; for a part at most one sample more


def test_equal_counts_give_classes_in_turn():
    assert torch.equal(apportioned(torch.full((10,), 30), 2000), torch.arange(2000) % 10)


def test_nothing_counted_is_an_error():
    for counts in ([0, 0], [3, -1]):
        with pytest.raises(ValueError, match="counts: .* must be 0 or more each, and not all 0"):
            apportioned(torch.tensor(counts), 5)

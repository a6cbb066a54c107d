"""Precision sees samples off the data, recall sees data without samples, and neither sees the other's fault."""

import pytest
import torch
from torch import nn

from flowmap.metrics.precision_recall import PrecisionRecallScore


def blob(seed, centre, n=150):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + centre


def score(real, fake, k=3):
    metric = PrecisionRecallScore(nn.Identity(), k)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    found = metric.compute()
    return found["precision"].item(), found["recall"].item()


def test_identical_and_far_sets():
    real = blob(0, 0.0)
    assert score(real, real) == (1.0, 1.0)
    assert score(real, real + 100) == (0.0, 0.0)


def test_dropped_mode_costs_recall_alone():
    real = torch.cat([blob(0, 0.0), blob(1, 100.0)])
    precision, recall = score(real, blob(2, 0.0))
    assert precision > 0.75 and 0.35 < recall < 0.5  # the half that is there is found up to the tails
    assert score(blob(2, 0.0), real) == (recall, precision)  # exchanged sets exchange the two


def test_made_up_mode_costs_precision_alone():
    precision, recall = score(blob(0, 0.0), torch.cat([blob(2, 0.0), blob(1, 100.0)]))
    assert 0.35 < precision < 0.5 and recall > 0.75


def test_by_hand_on_a_line():
    """k = 1 on 0, 1, 3: radii 1, 1, 2, so the balls cover [-1, 5]; on 2, 9: radii 7, 7, so [-5, 16] is covered."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [9.0]])
    assert score(real, fake, k=1) == (0.5, 1.0)


def test_batches_order_and_scale_do_not_matter():
    real, fake = blob(0, 0.0), blob(1, 0.7)
    metric = PrecisionRecallScore(nn.Identity(), 3)
    metric.chunk = 11
    for part in real.flip(0).split(13):
        metric.update(2 * part, real=True)
    for part in fake.split(5):
        metric.update(2 * part, real=False)
    found = metric.compute()
    assert (found["precision"].item(), found["recall"].item()) == score(real, fake)


def test_reset_keeps_the_reference_and_few_samples_are_refused():
    metric = PrecisionRecallScore(nn.Identity(), 3)
    metric.update(blob(0, 0.0), real=True)
    with pytest.raises(ValueError, match="more than 3 fake samples, got 0"):
        metric.compute()
    metric.update(blob(1, 9.0), real=False)
    metric.compute()
    metric.reset()
    metric.update(blob(0, 0.0), real=False)
    assert metric.compute()["precision"] == 1

"""AYF's two residuals in one batch: each row has one of them, and the mean is over all rows."""

import pytest
import torch

from flowmap.objectives import AYFEMD, AYFLMD, OBJECTIVES, AYFMixed
from tests.objectives.nearly import WEAK, bent, chosen, drawn, gradients, same, still_and_towards
from tests.oracle import GAUSSIAN, draw_times

SETTINGS = {"warmup_steps": 10, "r_max": 0.9, "norm": "rms", "c": 0.3}


def mixed(**cond):
    t, s = draw_times()
    return drawn(s=torch.where(torch.tensor([False, True, False, False, True]), t, s), **cond)


@pytest.mark.parametrize(("share", "lagrangian"), [(0.4, (2, 4)), (0.2, (4,)), (0.0, ()), (1.0, (0, 1, 2, 3, 4))])
def test_it_is_the_mean_of_its_rows_each_by_its_own_identity(share, lagrangian):
    sample, student = mixed(guidance=torch.linspace(1, 3, 5).double()), bent(guidance=True)
    objective = AYFMixed(**SETTINGS, lagrangian=share)
    kinds = [(AYFLMD if i in lagrangian else AYFEMD)(**SETTINGS) for i in range(5)]
    rows = [chosen(sample, torch.tensor([i])) for i in range(5)]
    alone = [kind(student, WEAK, row, 6) for kind, row in zip(kinds, rows, strict=True)]
    loss = objective(student, WEAK, sample, 6)
    torch.testing.assert_close(loss.value, torch.stack([one.value for one in alone]).mean())
    for key in ("residual_norm", "tangent_norm"):
        torch.testing.assert_close(loss.logs[key], torch.cat([one.logs[key] for one in alone]))
    assert float(loss.logs["tangent_weight"]) == pytest.approx(0.6)
    each = [gradients(kind, student, WEAK, row, 6) for kind, row in zip(kinds, rows, strict=True)]
    same(gradients(objective, student, WEAK, sample, 6), [torch.stack(g).mean(0) for g in zip(*each, strict=True)], 1e-8)


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(norm):
    objective = AYFMixed(warmup_steps=0, r_max=1.0, norm=norm, lagrangian=0.4)
    still_and_towards(objective, GAUSSIAN, drawn(), accuracy=1e-10)


def test_a_share_outside_the_batch_is_refused():
    with pytest.raises(ValueError, match="lagrangian"):
        AYFMixed(lagrangian=1.5)
    with pytest.raises(ValueError, match="norm"):
        AYFMixed(norm="l1")
    with pytest.raises(ValueError, match="teacher"):
        AYFMixed()(bent(), None, drawn(), 0)
    assert OBJECTIVES["ayf_mixed"] is AYFMixed

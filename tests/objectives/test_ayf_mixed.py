"""AYF's two residuals in one batch: each row has one of them, and the mean is over all rows."""

from dataclasses import replace

import pytest
import torch

from flowmap.flow.times import Mixture
from flowmap.flow.types import broadcast_time
from flowmap.objectives import AYFEMD, AYFLMD, OBJECTIVES, AYFMixed
from tests.objectives.nearly import (
    MIXTURE,
    WEAK,
    Nearly,
    Watched,
    bent,
    chosen,
    drawn,
    gradients,
    same,
    slopes,
    still_and_towards,
)
from tests.support.oracle import GAUSSIAN, SHAPE, draw_times

SETTINGS = {"warmup_steps": 10, "r_max": 0.9, "norm": "rms", "c": 0.3}


def mixed(**cond):
    t, s = draw_times()
    return drawn(s=torch.where(torch.tensor([False, True, False, False, True]), t, s), **cond)


@pytest.mark.parametrize("share", [0.4, 0.2, 0.0, 1.0])
def test_it_is_the_mean_of_its_rows_each_by_its_own_identity(share):
    sample, student = mixed(guidance=torch.linspace(1, 3, 5).double()), bent(guidance=True)
    objective = AYFMixed(**SETTINGS, lagrangian=share)
    lagrangian = objective.rows(sample.places(6))[0].nonzero().flatten().tolist()
    assert len(lagrangian) == 5 * share
    kinds = [(AYFLMD if i in lagrangian else AYFEMD)(**SETTINGS) for i in range(5)]
    rows = [chosen(sample, torch.tensor([i])) for i in range(5)]
    alone = [kind(student, WEAK, row, 6) for kind, row in zip(kinds, rows, strict=True)]
    loss = objective(student, WEAK, sample, 6)
    torch.testing.assert_close(loss.value, torch.stack([one.value for one in alone]).mean())
    for key in ("residual_norm", "tangent_norm"):
        torch.testing.assert_close(loss.logs[key], torch.cat([one.logs[key] for one in alone]))
    assert float(loss.logs["tangent_weight"]) == pytest.approx(0.6)
    each = [gradients(kind, student, WEAK, row, 6) for kind, row in zip(kinds, rows, strict=True)]
    same(
        gradients(objective, student, WEAK, sample, 6), [torch.stack(g).mean(0) for g in zip(*each, strict=True)], 1e-8
    )


@pytest.mark.parametrize("n", [1, 3, 8])
def test_shares_hold_over_steps_where_a_batch_is_too_small_for_them(n):
    objective, steps = AYFMixed(lagrangian=0.25, own_lagrangian=0.5, own_eulerian=0.2), 160 // n
    masks = [objective.rows(torch.arange(step * n, (step + 1) * n)) for step in range(steps)]
    chosen, own = (torch.cat([mask[i] for mask in masks]) for i in range(2))
    lagrangian = int(chosen.sum())
    found, expected = (
        (lagrangian, int((own & chosen).sum()), int((own & ~chosen).sum())),
        (40 if n != 3 else 39, lagrangian / 2, (~chosen).sum() / 5),
    )
    assert all(abs(a - b) < (1 if n == 3 else 1e-9) for a, b in zip(found, expected, strict=True))
    assert n != 8 or all(int(mask[0].sum()) == 2 for mask in masks)


def test_its_shares_have_their_part_of_every_kind_of_times():
    objective, law = AYFMixed(lagrangian=0.25, own_lagrangian=0.5), Mixture(one_step=0.25, diagonal=0.25)
    place = torch.arange(8000)
    chosen, own = objective.rows(place)
    for kind in law.members(place):
        assert int(kind.sum()) == 2000
        assert (
            abs(int((kind & chosen).sum()) - 500) < 4 * 375**0.5
            and abs(int((kind & chosen & own).sum()) - 250) < 4 * 219**0.5
        )


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_still_at_the_exact_map_and_towards_it_from_both_sides(norm):
    objective = AYFMixed(warmup_steps=0, r_max=1.0, norm=norm, lagrangian=0.4)
    still_and_towards(objective, GAUSSIAN, drawn(), accuracy=1e-10)


OWN = [
    (0.4, 0.5, 1 / 3, 2),
    (0.4, 1.0, 0.0, 2),
    (0.0, 0.0, 1.0, 5),
    (1.0, 0.4, 0.0, 2),
]  # the three shares, and how many depart from own states


@pytest.mark.parametrize(("share", "own_lagrangian", "own_eulerian", "count"), OWN)
def test_rows_on_own_states_are_those_of_a_sample_drawn_where_the_student_arrives(
    share, own_lagrangian, own_eulerian, count
):
    sample, student, teacher = mixed(guidance=torch.linspace(1, 3, 5).double()), bent(guidance=True), Watched(WEAK)
    path, reached = sample.xt.clone(), student(sample.x1, torch.ones(5).double(), sample.t, sample.cond).detach()
    objective = AYFMixed(**SETTINGS, lagrangian=share, own_lagrangian=own_lagrangian, own_eulerian=own_eulerian)
    lagrangian, own = objective.rows(sample.places(6))
    assert (int(lagrangian.sum()), int(own.sum())) == (5 * share, count)
    there = replace(sample, xt=torch.where(broadcast_time(own, path), reached, path))
    loss, by_hand = (
        objective(student, teacher, sample, 6),
        AYFMixed(**SETTINGS, lagrangian=share)(student, teacher, there, 6),
    )
    torch.testing.assert_close(loss.value, by_hand.value)
    torch.testing.assert_close(loss.logs["residual_norm"], by_hand.logs["residual_norm"])
    same(
        gradients(objective, student, teacher, sample, 6),
        gradients(AYFMixed(**SETTINGS, lagrangian=share), student, teacher, there, 6),
    )
    assert torch.equal(sample.xt, path)


@pytest.mark.parametrize("lagrangian", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("teacher", "shape", "accuracy"), [(GAUSSIAN, SHAPE, 1e-10), (MIXTURE, (5, 2), 1e-5)], ids=["gaussian", "mixture"]
)
def test_on_own_states_it_is_still_at_the_exact_map_and_towards_it(teacher, shape, accuracy, lagrangian):
    objective = AYFMixed(
        warmup_steps=0, r_max=1.0, norm="none", lagrangian=lagrangian, own_lagrangian=1.0, own_eulerian=1.0
    )
    still_and_towards(objective, teacher, drawn(shape), accuracy=accuracy)


def test_descent_on_own_states_returns_to_the_exact_map_from_either_side():
    sample, objective = (
        drawn(),
        AYFMixed(warmup_steps=0, r_max=1.0, norm="none", lagrangian=0.4, own_lagrangian=1.0, own_eulerian=1.0),
    )
    for sign in (+1, -1):
        student, gaps = Nearly(GAUSSIAN, scale=1 + 0.02 * sign), [0.02]
        for _ in range(4):
            by_scale, _ = slopes(objective, student, GAUSSIAN, sample)
            with torch.no_grad():
                student.scale -= 0.2 * by_scale / 72
            gaps.append(sign * (float(student.scale.detach()) - 1))
        assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 0.019


def test_the_own_state_at_the_noise_is_the_noise():
    ones = torch.ones(5).double()
    sample, student = drawn(t=ones, s=0 * ones), bent()
    settings = {"warmup_steps": 0, "lagrangian": 0.4}
    own = gradients(AYFMixed(**settings, own_lagrangian=1.0, own_eulerian=1.0), student, WEAK, sample)
    same(own, gradients(AYFMixed(**settings), student, WEAK, sample))


def test_a_share_outside_the_batch_is_refused():
    with pytest.raises(ValueError, match="lagrangian"):
        AYFMixed(lagrangian=1.5)
    for name in ("own_lagrangian", "own_eulerian"):
        with pytest.raises(ValueError, match=name):
            AYFMixed(**{name: -0.1})
    with pytest.raises(ValueError, match="norm"):
        AYFMixed(norm="l1")
    with pytest.raises(ValueError, match="objective.lagrangian: 0.25 needs a teacher"):
        AYFMixed()(bent(), None, drawn(), 0)
    with pytest.raises(ValueError, match="own_eulerian.*teacher"):
        AYFMixed(lagrangian=0.0, own_eulerian=0.5)(bent(), None, drawn(), 0)
    AYFMixed(lagrangian=0.0)(bent(), None, drawn(), 0)
    assert OBJECTIVES["ayf_mixed"] is AYFMixed

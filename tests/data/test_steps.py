"""The laws of batch order: epochs are permutations, and resuming needs no replay.

A split over ranks does not change a step.
"""

from itertools import chain, islice

import pytest

from flowmap.data import StepBatches

SIZES = [(10, 5), (13, 4), (7, 3), (3, 8)]  # even, uneven, batches larger than an epoch


@pytest.mark.parametrize(("samples", "batch"), SIZES)
def test_each_epoch_is_a_permutation_and_no_batch_is_short(samples, batch):
    lists = list(islice(StepBatches(samples, batch, seed=1), 3 * samples))
    assert all(len(one) == batch for one in lists)
    stream = list(chain.from_iterable(lists))
    epochs = [stream[e * samples : (e + 1) * samples] for e in range(3 * batch)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # and not always the same one


@pytest.mark.parametrize(("samples", "batch"), SIZES)
@pytest.mark.parametrize("start", [1, 5, 17])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(samples, batch, start):
    keys = {"seed": 2, "num_steps": 25, "rank": 1, "world": 2, "accumulate": 3}
    whole = list(StepBatches(samples, batch, **keys))
    rest = StepBatches(samples, batch, start_step=start, **keys)
    assert list(rest) == whole[3 * start :] and len(rest) == len(whole) - 3 * start
    assert list(rest) == list(rest)  # every iteration begins at start_step


@pytest.mark.parametrize(("world", "accumulate"), [(1, 6), (2, 3), (3, 2), (6, 1), (1, 1)])
def test_a_step_is_the_same_samples_however_it_is_split(world, accumulate):
    batch = 12 // (world * accumulate)
    whole = StepBatches(31, 12, seed=3)
    ranks = [StepBatches(31, batch, seed=3, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    for step in range(9):
        split = [ranks[r].indices(step, a) for a in range(accumulate) for r in range(world)]
        assert list(chain.from_iterable(split)) == whole.indices(step)


def test_any_step_can_be_asked_in_any_order():
    steps = StepBatches(11, 4, seed=4)
    forth = [steps.indices(k) for k in range(20)]
    back = [steps.indices(k) for k in reversed(range(20))]
    assert forth == back[::-1]


def test_seed_decides():
    assert StepBatches(50, 50, seed=0).indices(0) == StepBatches(50, 50, seed=0).indices(0)
    assert StepBatches(50, 50, seed=0).indices(0) != StepBatches(50, 50, seed=1).indices(0)
    assert StepBatches(50, 50, seed=0).indices(1) != StepBatches(50, 50, seed=1).indices(
        0
    )  # seeds are not shifted epochs


def test_refuses():
    with pytest.raises(ValueError, match="batch_size is 0"):
        StepBatches(10, 0, seed=0)
    with pytest.raises(ValueError, match="rank is 2"):
        StepBatches(10, 1, seed=0, rank=2, world=2)
    with pytest.raises(TypeError, match="never ends"):
        len(StepBatches(10, 1, seed=0))

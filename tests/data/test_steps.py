"""The laws of batch order: epochs are permutations, and resuming needs no replay.

A split over ranks does not change a step.
"""

from itertools import chain, islice

import pytest

from flowmap.data import StepBatches, order
from flowmap.data.order import BlockOrder

SIZES = [(10, 5), (13, 4), (7, 3), (3, 8)]  # even, uneven, batches larger than an epoch
ORDERS = pytest.mark.parametrize("shuffle", ["global", "blocks"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of two samples, mixed within two blocks: 13 samples are 4 windows, the last one of a sample."""
    monkeypatch.setattr(order, "BLOCK", 2)
    monkeypatch.setattr(order, "WINDOW", 2)


@ORDERS
@pytest.mark.parametrize(("samples", "batch"), SIZES)
def test_each_epoch_is_a_permutation_and_no_batch_is_short(samples, batch, shuffle):
    lists = list(islice(StepBatches(samples, batch, seed=1, shuffle=shuffle), 3 * samples))
    assert all(len(one) == batch for one in lists)
    stream = list(chain.from_iterable(lists))
    epochs = [stream[e * samples : (e + 1) * samples] for e in range(3 * batch)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # and not always the same one


@ORDERS
@pytest.mark.parametrize(("samples", "batch"), SIZES)
@pytest.mark.parametrize("start", [1, 5, 17])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(samples, batch, start, shuffle):
    keys = {"seed": 2, "num_steps": 25, "rank": 1, "world": 2, "accumulate": 3, "shuffle": shuffle}
    whole = list(StepBatches(samples, batch, **keys))
    rest = StepBatches(samples, batch, start_step=start, **keys)
    assert list(rest) == whole[3 * start :] and len(rest) == len(whole) - 3 * start
    assert list(rest) == list(rest)  # every iteration begins at start_step


@ORDERS
@pytest.mark.parametrize(("world", "accumulate"), [(1, 6), (2, 3), (3, 2), (6, 1), (1, 1)])
def test_a_step_is_the_same_samples_however_it_is_split(world, accumulate, shuffle):
    batch = 12 // (world * accumulate)
    whole = StepBatches(31, 12, seed=3, shuffle=shuffle)
    split = {"world": world, "accumulate": accumulate, "shuffle": shuffle}
    ranks = [StepBatches(31, batch, seed=3, rank=r, **split) for r in range(world)]
    for step in range(9):
        split = [ranks[r].indices(step, a) for a in range(accumulate) for r in range(world)]
        assert list(chain.from_iterable(split)) == whole.indices(step)


@ORDERS
def test_any_step_can_be_asked_in_any_order(shuffle):
    steps = StepBatches(11, 4, seed=4, shuffle=shuffle)
    forth = [steps.indices(k) for k in range(20)]
    back = [steps.indices(k) for k in reversed(range(20))]
    assert forth == back[::-1]


@pytest.mark.parametrize("samples", [13, 40, 41])
def test_blocks_are_read_within_windows(samples):
    """Of 2 samples, 2 at once: each window of an epoch is two whole blocks, mixed; other ones in the next epoch."""
    found = BlockOrder(samples, seed=0)
    epochs = [found(epoch, 0) for epoch in range(2)]
    for epoch in range(2):
        read, place = [], 0
        while place < samples:
            window = found(epoch, place)
            read.append(sorted(window.tolist()))
            place += len(window)
        blocks = [{i // 2 for i in window} for window in read]
        assert all(len(one) <= 2 for one in blocks) and sum(map(len, blocks)) == -(-samples // 2)
        epochs[epoch] = blocks
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0], key=min)


def test_samples_of_a_window_are_mixed_and_blocks_anywhere(monkeypatch):
    """Neighbours in the order are of different blocks, and the first window has blocks of the whole data set."""
    monkeypatch.setattr(order, "BLOCK", 16)
    monkeypatch.setattr(order, "WINDOW", 16)
    first = BlockOrder(10_000, seed=0)(0, 0)
    assert len(first) == 256 and sorted(first.tolist()) != first.tolist()
    assert (first.diff().abs() < 16).float().mean() < 0.15, "of 16 blocks, a sixteenth by chance"
    assert 3500 < first.double().mean() < 6500, "16 blocks at random: 5,000 with a deviation of 720"


def test_data_of_one_window_are_permuted_as_a_whole(monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 8)
    monkeypatch.setattr(order, "WINDOW", 4)
    assert len(BlockOrder(31, seed=0)(0, 0)) == 31


def test_the_order_of_all_is_what_it_was():
    """Runs of earlier versions go on with it."""
    assert StepBatches(10, 10, seed=0).indices(0) == [7, 0, 9, 2, 1, 3, 8, 4, 6, 5]
    assert StepBatches(10, 10, seed=0, shuffle="blocks").indices(0) != [7, 0, 9, 2, 1, 3, 8, 4, 6, 5]


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

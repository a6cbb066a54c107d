"""The samples of a step are a function of (seed, step, rank), so that a resumed run continues bit-equal without saved
state.
"""

from __future__ import annotations

from collections.abc import Iterator

from flowmap.data.order import ORDERS


def first_place(step: int, micro: int, *, batch_size: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> int:
    """The number of samples of the run before the first of that micro-batch, with batch_size for each micro-batch and
    rank.
    """
    return ((step * accumulate + micro) * world + rank) * batch_size


class StepBatches:
    """The index lists of steps start_step, start_step + 1, ...: a `batch_sampler` for DataLoader, one list per
    micro-batch.

    All epochs' permutations (order.py), one after another, form an endless stream. Step k reads places k G to (k + 1) G
    of it, with G = batch_size * accumulate * world; micro-batch a of rank r reads batch_size places from k G + (a world
    + r) batch_size on. Hence no sample comes twice within an epoch, batches cross the ends of epochs and are never
    short, a later start needs no replay, and a step has the same samples however G is split over ranks and
    micro-batches. It ends before step `num_steps`; with None it never ends (and has no len). It shards by rank itself:
    under Lightning set use_distributed_sampler=False. shuffle: that of data, "global" or "blocks".
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        shuffle: str = "global",
    ):
        for key, value in {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "world": world,
            "accumulate": accumulate,
        }.items():
            if value < 1:
                raise ValueError(f"{key} is {value}; 1 or more is allowed")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; 0 .. {world - 1} are allowed")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self._order = ORDERS[shuffle](num_samples, seed)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            for micro in range(self.accumulate):
                yield self.indices(step, micro)
            step += 1

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("StepBatches without num_steps never ends")
        return max(0, self.num_steps - self.start_step) * self.accumulate

    def indices(self, step: int, micro: int = 0) -> list[int]:
        """The samples of one micro-batch of this rank."""
        split = {"batch_size": self.batch_size, "rank": self.rank, "world": self.world, "accumulate": self.accumulate}
        place = first_place(step, micro, **split)
        end, found = place + self.batch_size, []
        while place < end:
            epoch, offset = divmod(place, self.num_samples)
            part = self._order(epoch, offset)[: end - place].tolist()
            found += part
            place += len(part)
        return found

"""Decode pictures in several threads while earlier ones are used; their order stays that of the source.

PIL decodes and scales without Python's lock, so that threads use all cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from flowmap.base.distributed import num_cores
from flowmap.data.sources import ImageSource, Item

MAX_THREADS = 8  # of each process: a node has one for each device
Place = TypeVar("Place")
Found = TypeVar("Found")


def read_ahead(images: ImageSource, start: int, stop: int, batch_size: int) -> Iterator[list[Item]]:
    """Yield the items at positions start .. stop in lists of batch_size.

    A stream is read by a single thread, as it has its items in turn.
    """
    if images.length() is None:
        items = images.items(start, stop)
        batches = in_order(lambda at: list(islice(items, batch_size)), range(start, stop, batch_size), 1)
    else:
        read = lambda at: list(images.items(at, min(at + batch_size, stop)))
        batches = in_order(read, range(start, stop, batch_size))
    for batch in batches:
        if not batch:  # the source ends here
            return
        yield batch


def in_order(read: Callable[[Place], Found], places: Iterable[Place], threads: int | None = None) -> Iterator[Found]:
    """Yield read(place) for each place in turn, read by threads, at most two places a thread ahead.

    threads: by default one for each core.
    """
    threads = threads or min(MAX_THREADS, num_cores())
    coming: deque[Future[Found]] = deque()
    left = iter(places)
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            coming += [pool.submit(read, place) for place in islice(left, 2 * threads - len(coming))]
            if not coming:
                return
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Decode pictures in several threads while earlier ones are used; their order stays that of the source.

PIL decodes and scales without Python's lock, so that threads use all cores.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, Generic, TypeVar

from flowmap.base.distributed import num_cores
from flowmap.data.sources import ImageSource, Item

MAX_THREADS = 8  # of each process: a node has one for each device
GRACE_S = 2.0  # for the reads that are under way when a loop over them ends
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
    readers = Readers(read, threads)
    try:
        while True:
            coming += [readers.submit(place) for place in islice(left, 2 * threads - len(coming))]
            if not coming:
                return
            yield coming.popleft().result()
    finally:
        readers.end()


class Readers(Generic[Place, Found]):
    """Threads that read places. The end of the process waits at most GRACE_S for them.

    Those of an executor would be joined for as long as a read takes: for ever, on a network disk that hangs. `end` lets
    each thread finish its read and no other; it is called at the end of the process too, as a thread that Python stops
    within C++ code aborts the process.
    """

    def __init__(self, read: Callable[[Place], Found], threads: int):
        self._waiting: SimpleQueue[tuple[Place, Future[Found]] | None] = SimpleQueue()
        stopped = Event()
        given = (read, self._waiting, stopped)  # not self, which could then not be collected
        running = [Thread(target=_work, args=given, daemon=True, name=f"reader-{i}") for i in range(threads)]
        self.end = weakref.finalize(self, _end, self._waiting, stopped, running)
        for thread in running:
            thread.start()

    def submit(self, place: Place) -> Future[Found]:
        future: Future[Found] = Future()
        self._waiting.put((place, future))
        return future


def _work(read: Callable[[Place], Found], waiting: SimpleQueue[Any], stopped: Event) -> None:
    while (task := waiting.get()) is not None and not stopped.is_set():
        place, future = task
        try:
            future.set_result(read(place))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)
        del task, future  # and with them the batch


def _end(waiting: SimpleQueue[Any], stopped: Event, running: list[Thread]) -> None:
    stopped.set()
    until = time.monotonic() + GRACE_S
    for _ in running:
        waiting.put(None)
    for thread in running:
        if thread is not current_thread():  # which the garbage collector may run in
            thread.join(max(0.0, until - time.monotonic()))

"""The processes of one command agree on what to do, before torch.distributed is set up and between its groups.

Every process runs the same code. What depends on files is decided by the first process (`decide`), so that no two
disagree because a file appeared meanwhile; `wait` lets all finish a part. Both go through a TCP store. A thread in each
process shows the others that it is alive, and ends it if another one has failed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from flowmap.base import preempt
from flowmap.base.distributed import BOTH
from flowmap.base.files import MINUTE
from flowmap.base.launch import Launch, launch_of, start_others

DEADLINE = "FLOWMAP_DEADLINE_MINUTES"
BEAT, POLL = 2.0, 0.05  # seconds between two signs of life, and between two questions to the store
GRACE = 30.0  # seconds that a process has to end by itself after another one has failed


class ProcessFailed(RuntimeError):
    """Another process of the command has failed or ended, or shows no sign of life."""


def deadline() -> float:
    """Seconds without a sign of life after which a process is taken for dead."""
    text = os.environ.get(DEADLINE, "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ValueError(f"{DEADLINE}: {text!r} must be a number of minutes above 0")
    return 60 * minutes


class Team:
    """This process among those of its command. With one process, every method is as good as a plain call."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.store: distributed.Store | None = None
        self._asked, self._groups, self._ending = 0, 0, threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}

    @property
    def first(self) -> bool:
        return self.launch.first

    def start(self, devices: int, nodes: int = 1) -> None:
        """Be `devices` x `nodes` processes: start the others on this machine unless a launcher has, and join them."""
        if self.launch.by in ("", "nodes") and self.launch.world == 1 and devices * nodes > 1:
            self.launch = start_others(self.launch, devices, nodes, ended=self._child_ended)
        self.join()

    def join(self) -> None:
        """Connect to the other processes, if there are any."""
        if self.launch.world == 1 or self.store is not None:
            return
        theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has the store
        store = distributed.TCPStore(
            self.launch.address,
            self.launch.port,
            is_master=self.first and not theirs,
            timeout=timedelta(seconds=deadline()),
            wait_for_workers=False,
            multi_tenant=not theirs,
        )
        self.store = distributed.PrefixStore(f"flowmap/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        watch = threading.Thread(target=self._watch, daemon=True, name="flowmap-team")
        watch.start()
        atexit.register(watch.join, 2 * BEAT)
        atexit.register(self._ending.set)  # the last registered is called first

    def decide(self, compute: Callable[[], Any]) -> Any:
        """The value that the first process computes, in every process: a JSON value."""
        if self.store is None:
            return compute()
        self._asked += 1
        key = f"decision/{self._asked}"
        if self.first:
            self.store.set(key, json.dumps(compute()))
        store = self.store
        self._until(lambda: store.check([key]), lambda: [0])
        return json.loads(store.get(key))

    def wait(self, waiting: Callable[[int], None] = lambda missing: None) -> None:
        """Return once every process has called it. waiting: called once a minute with the number of the missing."""
        if self.store is None:
            return
        self._asked += 1
        arrived, left = f"arrived/{self._asked}", f"left/{self._asked}"
        self._count(arrived)
        self._until(lambda: not self._missing(arrived), lambda: self._missing(arrived), waiting)
        self._count(left)
        until = time.monotonic() + GRACE / 2
        while self.first and self._missing(left):  # the store may end with the first process
            if time.monotonic() > until:
                self._until(lambda: not self._missing(left), lambda: self._missing(left), waiting)
            time.sleep(POLL)  # one that has left and failed meanwhile is heard of at the next wait

    def _count(self, key: str) -> None:
        """Let the others know that this process has come so far."""
        assert self.store is not None
        self.store.set(f"{key}/{self.launch.rank}", "")
        self.store.add(key, 1)

    def _missing(self, key: str) -> list[int]:
        """The processes that have not counted themselves."""
        assert self.store is not None
        store, world = self.store, self.launch.world
        if store.add(key, 0) == world:
            return []
        return [rank for rank in range(world) if not store.check([f"{key}/{rank}"])]

    @contextmanager
    def failing(self, code: Callable[[BaseException], int]) -> Iterator[None]:
        """Let the other processes know of an exception that ends this one.

        An error of torch because another process has failed becomes ProcessFailed with that one's message.
        """
        try:
            yield
        except BaseException as error:
            if self.store is None or isinstance(error, ProcessFailed):
                raise
            first = self._publish(code(error), " ".join(str(error).split()) or type(error).__name__)
            if isinstance(error, preempt.Preempted):
                self._let_first_end()
            if first is not None and (type(error) is RuntimeError or isinstance(error, distributed.DistError)):
                raise ProcessFailed(first) from error
            raise

    @contextmanager
    def group(self, size: int, device: str) -> Iterator[bool]:
        """A torch.distributed group of the first `size` processes; yields whether this one is a member.

        A group of one is none. The collectives run on CPU tensors (gloo) and, on GPUs, on CUDA tensors (nccl).
        """
        member = self.launch.rank < size
        self._groups += 1
        if self.store is None or size == 1 or not member:
            yield member
            return
        if distributed.is_initialized():
            distributed.destroy_process_group()
        cuda = torch.device(device) if device.startswith("cuda") else None
        if cuda is not None:
            torch.cuda.set_device(cuda)
        distributed.init_process_group(
            "gloo" if cuda is None else BOTH,
            store=distributed.PrefixStore(f"group/{self._groups}", self.store),
            rank=self.launch.rank,
            world_size=size,
            timeout=timedelta(seconds=max(deadline(), 1800)),
            device_id=cuda,
        )
        yield True
        distributed.destroy_process_group()  # after an exception the others may not be there: the process ends soon

    # ------------------------------------------------------------- signs of life

    def _until(
        self,
        ready: Callable[[], bool],
        missing: Callable[[], list[int]],
        waiting: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Poll until ready(). Raises ProcessFailed if a process that is missing failed or shows no sign of life."""
        said = time.monotonic()
        self._beats.clear()
        try:
            while not ready():
                if (failed := self._failure()) is not None:
                    raise ProcessFailed(failed[1])
                if time.monotonic() - said > MINUTE:
                    said = time.monotonic()
                    waiting(len(missing()))
                self._check_alive(missing())
                time.sleep(POLL)
        except distributed.DistError as error:  # the store ends with the first process, or with torchrun
            raise ProcessFailed("the first process has ended") from error

    def _check_alive(self, ranks: list[int]) -> None:
        assert self.store is not None
        for rank in ranks:
            beat = self.store.add(f"beat/{rank}", 0)
            last, since = self._beats.get(rank, (-1, 0.0))
            if beat != last:
                self._beats[rank] = beat, time.monotonic()
            elif time.monotonic() - since > deadline():
                raise ProcessFailed(
                    f"process {rank} shows no sign of life for {deadline() / 60:.3g} minutes ({DEADLINE})"
                )

    def _publish(self, code: int, line: str) -> str | None:
        """Make that the failure of the command, or return the message of the process that failed before this one."""
        assert self.store is not None
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set("failure", json.dumps([code, f"process {self.launch.rank}: {line}"]))
                return None
            return json.loads(self.store.get("failure"))[1]
        except distributed.DistError:
            return "the first process has ended"

    def _let_first_end(self) -> None:
        """End after the first process, which closes the logs: srun kills the others when one has ended."""
        assert self.store is not None
        try:
            if self.first:
                self.store.set("ended", "")
            until = time.monotonic() + 4 * GRACE
            while not self.first and not self.store.check(["ended"]) and time.monotonic() < until:
                time.sleep(POLL)
        except distributed.DistError:
            pass

    def _failure(self) -> tuple[int, str] | None:
        """Exit status and message of the first process that has failed."""
        assert self.store is not None
        if not self.store.check(["failure"]):
            return None
        code, line = json.loads(self.store.get("failure"))
        return int(code), str(line)

    def _watch(self) -> None:
        """In a thread: show that this process is alive, pass on a request to end, and end if another has failed."""
        assert self.store is not None
        told, failed_at = False, 0.0
        try:
            while not self._ending.wait(BEAT):
                self.store.add(f"beat/{self.launch.rank}", 1)
                if preempt.requested() and not told:
                    told = bool(self.store.add("preempted", 1))
                elif not told and self.store.add("preempted", 0):
                    told = True
                    preempt.pass_on()
                failed = self._failure()
                failed_at = failed_at or (time.monotonic() if failed else 0.0)
                if failed and time.monotonic() - failed_at > self._grace(failed[0]):  # it hangs in a collective
                    self._give_up(*failed)
        except distributed.DistError:  # the first process, which has the store, has ended
            if not self._ending.wait(GRACE):
                os._exit(1)

    def _grace(self, code: int) -> float:
        """Seconds until this process ends; few if it would raise Preempted and cannot: it is inside a collective."""
        if code != preempt.STATUS:
            return GRACE
        return GRACE / 3 if self.first and preempt.open_to_signals() else 4 * GRACE

    def _child_ended(self, status: int) -> None:
        """A process that this one started has failed, and this one does not end by itself."""
        failed = self._failure() if self.store is not None else None
        self._give_up(*(failed or (1, f"a process ended with status {status}")))

    def _give_up(self, code: int, line: str) -> None:
        if self.first:
            print(f"flowmap: {line}", file=sys.stderr, flush=True)
        os._exit(code)


@functools.cache
def the_team() -> Team:
    """The processes of this command."""
    return Team(launch_of(os.environ))

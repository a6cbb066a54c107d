"""Preemption: SIGTERM, SIGUSR1 and SIGUSR2 ask a command to end soon, with its work kept and a status of its own.

During training the request is noted, and the run ends after the step (train/agree.py). Elsewhere it raises Preempted in
the main thread at once, as Ctrl-C raises KeyboardInterrupt: files are written atomically, so what is finished is kept.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STATUS = os.EX_TEMPFAIL  # 75: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(SystemExit):
    """The command was asked to end. Not caught, it ends the program with the status 75."""

    def __init__(self, message: str):
        super().__init__(STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _Request:
    """The signals that `preemptible` handles; the one that has arrived, if any; whether it is held back or raised."""

    ours: tuple[signal.Signals, ...] = ()
    name = ""
    held = 0
    raised = False


def requested() -> bool:
    """Whether a signal asks this process to end."""
    return bool(_Request.name)


def open_to_signals() -> bool:
    """Whether a signal would raise Preempted now, and none has."""
    return bool(_Request.ours) and not _Request.held and not _Request.raised


def handle(number: int, frame: FrameType | None = None) -> None:
    """The handler of the signals. Later ones change nothing, so that they do not interrupt the end."""
    _Request.name = _Request.name or signal.Signals(number).name
    if not _Request.held:
        check()


def check() -> None:
    """Raise Preempted if a signal asks this process to end and it has not been raised yet."""
    if requested() and not _Request.raised:
        end("what is finished is kept")


def end(what: str) -> NoReturn:
    """Raise Preempted; later signals change nothing."""
    _Request.raised = True
    raise Preempted(f"ended by {_Request.name or 'a signal to another process'}; {what}")


def postpone() -> None:
    """The Preempted that was raised has been caught: the caller ends later, by `end`."""
    _Request.raised = False


def pass_on() -> None:
    """Ask this process to end, from another thread: another process of the command was asked."""
    if signal.SIGUSR1 in _Request.ours:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@contextmanager
def preemptible() -> Iterator[None]:
    """Handle the signals that have no handler of the user's. In other threads than the main one it does nothing."""
    if _Request.ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Request.ours = tuple(number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL)
    take()
    try:
        yield
    finally:
        for number in _Request.ours:  # after Preempted the process is about to end: a second signal must not kill it
            signal.signal(number, signal.SIG_IGN if _Request.raised else signal.SIG_DFL)
        _Request.ours, _Request.name, _Request.raised = (), "", False


def take() -> None:
    """Handle the signals of `preemptible` again, after another library (Lightning) has set handlers of its own."""
    for number in _Request.ours:
        signal.signal(number, handle)


@contextmanager
def held() -> Iterator[None]:
    """Only note the request while this context is open."""
    _Request.held += 1
    try:
        yield
    finally:
        _Request.held -= 1


@contextmanager
def released() -> Iterator[None]:
    """Raise Preempted at once also inside `held`: for long work that can be given up."""
    before, _Request.held = _Request.held, 0
    try:
        check()
        yield
    finally:
        _Request.held = before

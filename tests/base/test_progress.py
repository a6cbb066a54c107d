"""Lines of progress: when one is due, what it says, and that a terminal has a bar in their place."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios

import pytest

from flowmap.base.progress import Pace, Progress, duration, on_terminal, paced


class Hands:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (6.6, "0:07"), (268, "4:28"), (3599.6, "1:00:00"), (3723, "1:02:03"), (-1, "0:00")],
)
def test_a_duration_is_in_minutes_and_seconds(seconds, shown):
    assert duration(seconds) == shown


def test_a_line_is_due_once_in_ten_seconds():
    hands = Hands()
    pace = Pace(now=hands)
    found = []
    for _ in range(60):  # a look a second
        hands.at += 1.0
        found.append(pace.due())
    assert [i + 1 for i, due in enumerate(found) if due] == [10, 20, 30, 40, 50, 60]
    assert pace.due(always=True) and not pace.due()


def test_paced_lines_are_dropped_until_one_is_due():
    hands, said = Hands(), []
    log = paced(said.append, Pace(now=hands))
    for second in range(1, 25):
        hands.at += 1.0
        log(f"{second} s")
    assert said == ["10 s", "20 s"]


def test_lines_count_towards_the_total_and_short_work_prints_none():
    hands, said = Hands(), []
    with Progress(898, "evaluating: student 2 steps", said.append, pace=Pace(now=hands)) as count:
        for n in (256, 256, 256, 130):
            hands.at += 6.0
            count(n)
    assert said == [
        "evaluating: student 2 steps, 512/898, 42.7/s, 0:09 left",
        "evaluating: student 2 steps, 898/898, 37.4/s, 0:00 left",
    ]
    with Progress(10, "short", said.append) as count:
        count(10)
    assert len(said) == 2


def test_without_say_nothing_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(10, "silent", None, pace=Pace(pause=0.0)) as count:
        count(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_without_columns_is_none(monkeypatch, columns):
    """tqdm would draw an empty bar there."""
    own, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(own, "rb"), open(other, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert on_terminal() == (columns > 0)


def test_a_terminal_has_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = []
    with Progress(10, "drawing", said.append, pace=Pace(pause=0.0)) as count:
        count(10)
    assert not said and "drawing" in capsys.readouterr().err

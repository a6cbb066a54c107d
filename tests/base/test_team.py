"""The processes of a command agree through a store: three real ones, which a launcher's variables number."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from flowmap.base import preempt
from flowmap.base.launch import Launch, free_port
from flowmap.base.team import GRACE, Team, deadline

SCRIPT = """\
import sys, time
from flowmap.base.team import ProcessFailed, the_team
from flowmap.base import team as module
module.BEAT = 0.1
team = the_team()
team.start(3)
rank = team.launch.rank
module.POLL = 1.5 if rank == 2 else 0.05  # it leaves the wait after process 1 has failed
print("decided", team.decide(lambda: {"by": rank}))
with team.group(2, "cpu") as member:
    print("member", member)
time.sleep(0.3 * rank)
print("arrives", time.monotonic())
team.wait()
print("leaves", time.monotonic())
module.POLL = 0.05
try:
    with team.failing(lambda error: 3):
        if rank == 1:
            raise ValueError("not so")
        team.wait()
except (ProcessFailed, ValueError) as error:
    print(type(error).__name__, error)
print("ends", flush=True)
sys.stdin.read()  # the store is there until every process has heard of the failure
"""


def test_three_processes_decide_wait_and_hear_of_a_failure(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    shared = {**os.environ, "WORLD_SIZE": "3", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(tmp_path / "script.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**shared, "RANK": str(i)}, **pipes) for i in range(3)]
    outs = ["".join(iter(process.stdout.readline, "ends\n")) for process in started]
    for process in started[:2]:
        process.communicate(timeout=60)  # they end though the third one hangs
    started[2].kill()
    started[2].communicate()
    said = [dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line) for out in outs]
    assert [one["decided"] for one in said] == ["{'by': 0}"] * 3
    assert [one["member"] for one in said] == ["True", "True", "False"]
    assert min(float(one["leaves"]) for one in said) >= max(float(one["arrives"]) for one in said)
    assert said[1]["ValueError"] == "not so"
    assert said[0]["ProcessFailed"] == said[2]["ProcessFailed"] == "process 1: not so"


def test_a_process_without_a_sign_of_life_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("FLOWMAP_DEADLINE_MINUTES", "0.01")
    team = Team(Launch("srun", 0, 2, 0, 2, port=free_port()))
    team.join()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"process 1 shows no sign of life for 0.01 minutes"):
        team.wait()
    assert 0.5 < time.monotonic() - started < 20
    team._ending.set()


def test_one_process_is_a_team_that_decides_and_waits_for_nobody(monkeypatch):
    team = Team(Launch())
    team.start(1)
    team.wait()
    assert team.decide(lambda: 3) == 3 and team.store is None
    with team.group(1, "cpu") as member:
        assert member
    with pytest.raises(ValueError, match="trainer.num_nodes: 2 machines want srun or torchrun"):
        team.start(1, 2)
    for text in ("soon", "0", "nan"):
        monkeypatch.setenv("FLOWMAP_DEADLINE_MINUTES", text)
        with pytest.raises(ValueError, match="FLOWMAP_DEADLINE_MINUTES: .* number of minutes above 0"):
            deadline()


def test_the_first_process_does_not_wait_long_inside_a_collective_that_a_preempted_one_has_left():
    """Another process ended at once, as while both measure; a first one that could have done so hangs."""
    first, second = Team(Launch("srun", 0, 2, 0, 2)), Team(Launch("srun", 1, 2, 0, 2))
    assert first._grace(1) == GRACE and first._grace(preempt.STATUS) == 4 * GRACE  # a user's own handlers
    with preempt.preemptible():
        assert first._grace(preempt.STATUS) <= 10 and second._grace(preempt.STATUS) == 4 * GRACE
        with preempt.held():  # it may be saving a checkpoint
            assert first._grace(preempt.STATUS) == 4 * GRACE
        with pytest.raises(preempt.Preempted):
            preempt.end("at step 3")
        assert first._grace(preempt.STATUS) == 4 * GRACE  # it ends, and closes the logs

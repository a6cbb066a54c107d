"""A run that a signal ends saves the step that it is at, exits 75, and goes on to the weights of the whole run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import TINY  # noqa: E402
from test_launchers import ended, flowmap, start, torchrun  # noqa: E402
from test_resume import DIGITS, assert_same_run, trace  # noqa: E402

from flowmap.base import preempt  # noqa: E402
from flowmap.base.preempt import Preempted, preemptible  # noqa: E402
from flowmap.train.checkpoint_file import checkpoint_step  # noqa: E402

STATUS = 75


def train(recipe: str, out: str, where: str, number: int, settings: tuple[str, ...] = ()) -> None:
    """Run the recipe; at that place the process sends itself the signal."""
    torch.set_num_threads(1)
    sys.stderr = open(f"{out}.log", "a", buffering=1)
    import flowmap

    if where:
        _arrange(where, number)
    flowmap.fit(flowmap.read_recipe(recipe, settings), out, resume="auto")


def _arrange(where: str, number: int) -> None:
    from flowmap.evaluation.rows import Rows
    from flowmap.train.callbacks import Keep
    from flowmap.train.module import DistillModule

    kind, _, count = where.partition(" ")
    owner, name = {
        "step": (DistillModule, "training_step"),
        "measuring": (Rows, "student"),
        "saving": (Keep, "keep"),
    }[kind]
    original, left = getattr(owner, name), [int(count or 0)]

    def wrapped(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), number)
        left[0] -= 1
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_process(recipe: Path, out: Path, where: str = "", number: int = signal.SIGTERM, settings: tuple = ()) -> int:
    """The exit status of `train` in a clean process, forked from one that has already imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowmap.train.fit", "flowmap.metrics.frechet", "sklearn.datasets"])
    process = context.Process(target=train, args=(str(recipe), str(out), where, number, settings))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def step_of(run: Path) -> int:
    return checkpoint_step(run / "checkpoints/last.ckpt")


def test_a_run_that_signals_end_three_times_is_the_run_that_was_left_alone(recipe, tmp_path):
    assert in_process(recipe, tmp_path / "whole") == 0
    out = tmp_path / "run"
    for where, number, step in (("step 8", signal.SIGTERM, 9), ("saving 0", signal.SIGUSR1, 13)):
        assert in_process(recipe, out, where, number) == STATUS
        assert step_of(out) == step, (
            "the step of the signal is saved, though it is no multiple of checkpoint_every_steps"
        )
    assert in_process(recipe, out, "measuring", signal.SIGUSR2) == STATUS
    assert step_of(out) == 20 and not (out / "metrics.json").exists()
    assert in_process(recipe, out) == 0 and in_process(recipe, out) == 0
    assert_same_run(tmp_path / "whole", out)
    said = (tmp_path / "run.log").read_text()
    assert "resuming at step 9" in said and "complete in" in said.splitlines()[-1]


def test_measuring_in_the_middle_is_given_up_for_a_checkpoint(recipe, tmp_path):
    often = ("log.metrics_every_steps=4",)
    assert in_process(recipe, tmp_path / "whole", settings=often) == 0
    assert in_process(recipe, tmp_path / "run", "measuring 1", settings=often) == STATUS
    assert 4 <= step_of(tmp_path / "run") <= 8
    assert in_process(recipe, tmp_path / "run", settings=often) == 0
    assert trace(tmp_path / "run")[-1] == trace(tmp_path / "whole")[-1]


def test_signals_are_the_users_where_the_user_handles_them():
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
    with preemptible():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == ["user"] and not preempt.requested()
        with pytest.raises(Preempted, match="ended by SIGUSR2"):
            os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not interrupt the end
    assert Preempted("x").code == STATUS


def test_a_signal_is_noted_while_it_is_held(monkeypatch):
    with preemptible(), preempt.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempt.requested()
        with pytest.raises(Preempted), preempt.released():
            raise AssertionError("released raises at once")
        preempt.postpone()
        assert preempt.requested()
    assert not preempt.requested() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def two_nodes(*arguments) -> list[subprocess.Popen]:
    """Two torchrun agents, as on two machines, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=7"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    return [start([*agent, "-m", "flowmap", *map(str, arguments)]) for _ in range(2)]


STARTS = {
    "torchrun": lambda *words: [torchrun(2, *words)],
    "flowmap": lambda *words: [flowmap(*words)],
    "two nodes": two_nodes,
}


def all_ended(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """The exit status of each and what they wrote to stderr."""
    ends = [ended(process) for process in processes]
    return [code for code, _, _ in ends], "".join(err for _, _, err in ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "strategy"), [("torchrun", "ddp"), ("flowmap", "ddp"), ("flowmap", "fsdp"), ("two nodes", "fsdp")]
)
def test_two_processes_end_after_the_same_step_and_go_on_to_the_same_weights(tmp_path, by, strategy):
    path = tmp_path / "digits.yaml"
    here = "num_nodes: 2" if by == "two nodes" else "devices: 2"
    path.write_text(DIGITS.replace("steps: 12", f"steps: 12, {here}, strategy: {strategy}"))
    codes, err = all_ended(STARTS[by]("fit", "--recipe", path, "--out", tmp_path / "whole"))
    assert set(codes) == {0}, err
    stops = tmp_path / "stops.py"  # one process alone hears of it, in its sixth step
    stops.write_text(
        "import os, signal\nfrom flowmap.train.module import DistillModule\n"
        "original, calls = DistillModule.training_step, iter(range(1000))\n\n"
        "def step(self, *rest):\n    if os.environ.get('RANK') == '1' and next(calls) == 10:\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n    return original(self, *rest)\n\n"
        "DistillModule.training_step = step\n"
    )
    command = ("fit", "--recipe", path, "--out", tmp_path / "run", "--resume", "auto")
    codes, err = all_ended(STARTS[by](*command, "--import", stops))
    assert set(codes) == {STATUS if by == "flowmap" else 1}, err  # torchrun has a status of its own
    assert "flowmap: ended by" in err and "--resume goes on" in err, err
    assert 5 < step_of(tmp_path / "run") < 9
    codes, err = all_ended(STARTS[by](*command))
    assert set(codes) == {0} and "resuming at step" in err, err
    weights = "student/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_that_measure_have_a_checkpoint_of_that_step(tmp_path, strategy):
    """One of two processes hears of the signal while both measure after step 8, when none is due before step 12."""
    path = tmp_path / "digits.yaml"
    path.write_text(DIGITS.replace("steps: 12", f"steps: 12, devices: 2, strategy: {strategy}"))
    often = ("log.metrics_every_steps=4", "trainer.checkpoint_every_steps=12")
    code, _, err = ended(flowmap("fit", "--recipe", path, "--out", tmp_path / "whole", *often))
    assert code == 0, err
    stops = tmp_path / "stops.py"
    stops.write_text(
        "import os, signal\nfrom flowmap.evaluation.rows import Rows\n"
        "original, calls = Rows.student, iter(range(1000))\n\n"
        "def student(self, *rest):\n    if os.environ.get('RANK') == '1' and next(calls) == 1:\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n    return original(self, *rest)\n\n"
        "Rows.student = student\n"
    )
    command = ("fit", "--recipe", path, "--out", tmp_path / "run", "--resume", "auto", *often)
    code, _, err = ended(flowmap(*command, "--import", stops), seconds=110)  # it hangs in no collective
    assert code == STATUS and "flowmap: process 1: ended by" in err, err
    assert "resuming" not in err and step_of(tmp_path / "run") in (4, 8)
    code, _, err = ended(flowmap(*command))
    assert code == 0 and "resuming at step" in err, err
    weights = "student/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_encoding_that_a_signal_ends_keeps_its_shards(tmp_path, monkeypatch, command):
    from PIL import Image
    from test_launchers import TEACHER

    from flowmap.prepare import encode

    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (25 * i, 0, 255 - 25 * i)).save(tmp_path / "pictures" / f"{i}.png")
    recipe = TEACHER.replace(", autoencoder: {recipe: FOLDER/ae.yaml}", "").replace("FOLDER", str(tmp_path))
    (tmp_path / "pixels.yaml").write_text(recipe)
    write, left = encode.write_shard, [2]

    def interrupted(*args):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGUSR1)
        left[0] -= 1
        return write(*args)

    monkeypatch.setattr(encode, "write_shard", interrupted)
    arguments = ("encode", "--recipe", tmp_path / "pixels.yaml", "--out", tmp_path / "encoded")
    code, _, err = command(*arguments)
    assert code == STATUS and err.splitlines()[-1] == "flowmap: ended by SIGUSR1; what is finished is kept"
    assert len(list((tmp_path / "encoded").glob("shard-*.arrow"))) == 2
    code, out, _ = command(*arguments)
    assert code == 0 and "6 samples" in out


def test_wandb_shows_a_preempted_run_as_one(monkeypatch):
    from types import SimpleNamespace

    from flowmap.train.wandb_log import close_wandb

    heard = []
    run = SimpleNamespace(mark_preempting=lambda: heard.append("preempting"))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(run=run, finish=lambda exit_code: heard.append(exit_code))
    )
    close_wandb(STATUS, preempted=True)
    close_wandb(1)
    assert heard == ["preempting", STATUS, 1]

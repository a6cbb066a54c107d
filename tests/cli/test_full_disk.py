"""On a full disk every command that writes ends with one line and exit code 1.

This is so at every byte at which the disk is full, and the files that were there are unchanged.
"""

from __future__ import annotations

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from conftest import bytes_of

from flowmap.base.files import WriteError, write_beside
from flowmap.export import export
from flowmap.nets import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from tests.export.alone import shaken


@contextmanager
def full_disk(size):
    """No file of this process gets longer than `size` bytes: writing fails half-way, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PAIRS = "coupling={kind: pairs, num: 200, shard_items: 100, teacher: {card: exact}, solver: {kind: euler, steps: 2}}"
VERBS = {
    "fit": lambda tiny, run, out: ["fit", "--recipe", tiny, "--out", out],
    "sample": lambda tiny, run, out: ["sample", "--student", run, "--out", out],
    "evaluate": lambda tiny, run, out: ["evaluate", "--student", run, "--steps", 1, "--out", out / "metrics.json"],
    "average": lambda tiny, run, out: ["average", "--run", run, "--std", 0.08, "--out", out],
    "pairs": lambda tiny, run, out: ["pairs", "--recipe", tiny, PAIRS, "--out", out],
    "export to diffusers": lambda tiny, run, out: ["export", "--student", run, "--out", out],
    "export to torch": lambda tiny, run, out: ["export", "--student", run, "--to", "torch", "--out", out],
}


@pytest.mark.parametrize("size", [0, 700, 3000])
@pytest.mark.parametrize("verb", VERBS)
def test_a_command_on_a_full_disk(command, tiny, finished, tmp_path, verb, size):
    before, out = bytes_of(finished), tmp_path / "out"
    with full_disk(size):
        code, printed, err = command(*VERBS[verb](tiny, finished, out))
    lines = [line for line in err.splitlines() if line.startswith("flowmap: ")]
    assert "Traceback" not in err and bytes_of(finished) == before
    assert not list(tmp_path.rglob("*.tmp")), "half-written files stay behind"
    if code == 0:
        assert size and not lines
    else:
        assert code == 1 and len(lines) == 1 and "cannot be written" in lines[0] and str(out) in lines[0], err
        assert "export" not in verb or not out.exists()


def test_a_run_stopped_by_a_full_disk_goes_on(command, tiny, tmp_path):
    settings = ["ema.snapshot_every_steps=0", "ema.snapshot_stds=[]"]
    with full_disk(9000):  # the checkpoint does not fit, smaller files do
        code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", *settings)
    assert code == 1 and "last.ckpt" in err and not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume", *settings)[0] == 0


@pytest.mark.parametrize("to", ["torch", "diffusers"])
def test_an_earlier_export_stays(tmp_path, to):
    student = shaken(
        StudentConfig(MLP(width=32, depth=1), Deterministic(steps=(1,)), (2,), samples=Pixels(clamp=False))
    )
    folder = export(student, tmp_path / "out", to=to)
    before = bytes_of(folder)
    with full_disk(1 << 12), pytest.raises(WriteError, match=f"cannot be written .File too large.*: '{folder}'"):
        export(student, folder, to=to, overwrite=True)
    assert bytes_of(folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_called_so_where_torch_does_not(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr("os.statvfs", lambda path: Full)
    with full_disk(1000), pytest.raises(WriteError, match="No space left on device") as caught:
        write_beside(tmp_path / "x.pt", lambda temporary: torch.save(torch.zeros(5000), temporary))
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())

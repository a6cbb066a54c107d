"""A checkpoint is read byte for byte or refused in one line; those of flowmap 0.1, without a checksum, still resume."""

from __future__ import annotations

import os
import random
import time
import zipfile

import pytest
import torch
from conftest import bytes_of, spoil_average

from flowmap.train.checkpoint_file import SEAL, has_checksum, read_checkpoint, write_checkpoint

WHOLE = {"state_dict": {"w": torch.arange(500.0)}, "global_step": 3, "epoch": 0, "loops": {}, "callbacks": {}}
WHOLE |= {"optimizer_states": [{"m": torch.ones(7)}], "lr_schedulers": [], "pytorch-lightning_version": "2.5"}


@pytest.fixture
def path(tmp_path):
    write_checkpoint(tmp_path / "last.ckpt", WHOLE)
    return tmp_path / "last.ckpt"


def refused(path, *says):
    started = time.perf_counter()
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and all(part in text for part in says), text
    assert time.perf_counter() - started < 10  # nothing hangs


def test_a_round_trip_is_exact_and_others_read_it_too(path):
    assert has_checksum(path)
    for state in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["state_dict"]["w"], WHOLE["state_dict"]["w"]) and state["global_step"] == 3
    assert zipfile.ZipFile(path).testzip() is None


def test_no_flipped_bit_gets_through(path):
    whole, chance = path.read_bytes(), random.Random(0)
    content = len(whole) - SEAL
    for place in [*chance.sample(range(content), 200), *range(content - 2, len(whole))]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled)
        refused(path)
    for size in (0, 1, 100, content // 2, content, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)


def test_a_checkpoint_without_a_checksum_is_read(path):
    torch.save(WHOLE, path)
    assert not has_checksum(path) and torch.equal(read_checkpoint(path)["state_dict"]["w"], WHOLE["state_dict"]["w"])


def deflated(path):
    """A zip bomb: torch would unpack it."""
    with zipfile.ZipFile(path) as whole:
        entries = {one.filename: whole.read(one) for one in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, bytes(1 << 20) if "/data/" in name else content)


def overlapping(path):
    """Another one: many entries that share their bytes."""
    with zipfile.ZipFile(path, "a") as bomb:
        first = next(one for one in bomb.infolist() if "/data/0" in one.filename)
        for i in range(100):
            copy = zipfile.ZipInfo(f"last/data/{i + 10}")
            copy.header_offset, copy.file_size, copy.compress_size, copy.CRC = (
                first.header_offset,
                first.file_size,
                first.file_size,
                first.CRC,
            )
            bomb.filelist.append(copy)
            bomb.NameToInfo[copy.filename] = copy
        bomb._didModify = True


@pytest.mark.parametrize("spoil", [deflated, overlapping])
def test_an_archive_that_unpacks_to_more_than_it_is(path, spoil):
    spoil(path)
    assert path.stat().st_size < 1 << 20
    refused(path, "unpacks to more")


@pytest.mark.parametrize(
    "name", ["state_dict", "global_step", "optimizer_states", "loops", "epoch", "callbacks", "lr_schedulers"]
)
def test_what_is_missing_or_of_another_kind_is_named(path, name):
    write_checkpoint(path, {key: value for key, value in WHOLE.items() if key != name})
    refused(path)
    write_checkpoint(path, WHOLE | {name: "x"})
    refused(path, name)


def test_no_file_of_another_kind_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        refused(tmp_path / name, "not a regular file")
    refused(tmp_path / "nothing", "no such checkpoint")


def without_loops(path):
    state = torch.load(path, weights_only=True)
    del state["loops"]
    torch.save(state, path)


def other_loops(path):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"loops": {"fit_loop": {"state_dict": 3}}}, path)


def other_groups(path):
    state = torch.load(path, weights_only=True)
    state["optimizer_states"][0]["param_groups"] = []
    torch.save(state, path)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


SPOILS = [without_loops, other_loops, other_groups, flipped, deflated, pipe]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_run_is_not_resumed_from_it_and_nothing_is_changed(command, tiny, finished, spoil):
    (finished / "metrics.json").unlink()
    spoil(finished / "checkpoints" / "last.ckpt")
    before = {} if spoil is pipe else bytes_of(finished)
    code, out, err = command("fit", "--recipe", tiny, "--resume", "--out", finished)
    lines = [line for line in err.splitlines() if not line.startswith(("[", "resuming"))]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("flowmap: --resume: ") and "last.ckpt" in lines[0] and "Traceback" not in err
    assert spoil is pipe or bytes_of(finished) == before


def test_a_run_does_not_go_on_with_a_fresh_optimizer(command, tiny, tmp_path, monkeypatch):
    spoil_average(monkeypatch, 0, 8, float("nan"))
    assert command("fit", "--recipe", tiny, "--out", tmp_path / "run")[0] == 1
    monkeypatch.undo()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"optimizer_states": []}, path)
    code, out, err = command("fit", "--recipe", tiny, "--resume", "--out", tmp_path / "run")
    assert (code, out) == (
        2,
        "",
    ) and "cannot be restored: ValueError: optimizer_states: there are 0, this run has 1" in err


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_line(command, tiny, finished):
    (finished / "metrics.json").unlink()
    path = finished / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True), path)
    code, out, err = command("fit", "--recipe", tiny, "--resume", "--out", finished, "trainer.steps=20")
    assert code == 0 and "resuming at step 20, from a checkpoint without a checksum" in err

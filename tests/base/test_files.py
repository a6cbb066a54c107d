"""A file is the old one or the new one, whatever happens while it is written; what is read is checked and never run."""

import errno
import json
import os
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flowmap.base.files import (
    WriteError,
    check_writable,
    only_process,
    read_json,
    read_tensors,
    write_beside,
    write_json,
    write_tensors,
    write_text,
)


def failing(error, half=b"half"):
    def write(path):
        path.write_bytes(half)
        raise error

    return write


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), RuntimeError("PytorchStreamWriter failed writing file"), SafetensorError("I/O")],
)
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.json"
    write_text(path, "old")
    with pytest.raises(WriteError, match="x.json") as caught:
        write_beside(path, failing(error))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
    assert caught.value.errno == (errno.ENOSPC if isinstance(error, OSError) else errno.EIO)


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_beside(path, failing(KeyboardInterrupt()))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_real_full_disk(tmp_path):
    """/dev/full says ENOSPC to every write."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(WriteError, match="No space left"):
        write_beside(tmp_path / "x", lambda temporary: open("/dev/full", "w").write("x" * 100_000))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    write_text(tmp_path / "file", "mine")
    with pytest.raises(WriteError) as caught:
        write_text(tmp_path / "file" / "below", "x")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST) and (tmp_path / "file").read_text() == "mine"


def test_tensors_come_back_and_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"a.b": torch.randn(3, 4), "c": torch.randn(5, 2).T, "d": torch.tensor(1.5, dtype=torch.float64)}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = read_tensors(tmp_path / "one")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_every_truncation_and_many_a_flipped_byte_is_refused_or_read_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="x.safetensors"):
            read_tensors(path)
    for place in range(len(whole) - 48):  # the length and the header
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_tensors(path)
        except ValueError as error:
            assert "x.safetensors" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_lies(tmp_path, header):
    path, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(ValueError, match="x.safetensors"):
        read_tensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + text)
    with pytest.raises(ValueError, match="x.safetensors"):
        read_tensors(path)


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5]}
    for text in ("", "[1]", "{", "\x00"):
        write_text(tmp_path / "x.json", text)
        with pytest.raises(ValueError, match="x.json"):
            read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="no such file"):
        read_json(tmp_path / "y.json")


def test_check_writable_makes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out")
    assert os.listdir(tmp_path) == []
    write_text(tmp_path / "file", "x")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match="--out.*file"):
            check_writable(path, "--out")


def test_a_folder_is_filled_by_one_process_at_a_time(tmp_path):
    with only_process(tmp_path / "run"):
        with pytest.raises(ValueError, match="another flowmap process is filling this folder"):
            with only_process(tmp_path / "run"):
                raise AssertionError
    with only_process(tmp_path / "run"):
        pass


def test_a_lock_is_on_the_folder_that_has_the_name(tmp_path, monkeypatch):
    """The folder is removed, and made again by a third process, between opening it and locking it."""
    import flowmap.base.files as files

    folder, original, left = tmp_path / "run", files.fcntl.flock, [1, 0]

    def replaced(handle, how):
        if left.pop():
            folder.rmdir()
            folder.mkdir()
        original(handle, how)

    left.reverse()
    monkeypatch.setattr(files.fcntl, "flock", replaced)
    with only_process(folder):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another flowmap process"):
            with only_process(folder):
                raise AssertionError


def test_folders_made_for_a_lock_alone_are_removed_again(tmp_path):
    with only_process(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    with only_process(tmp_path / "a" / "b"):
        write_text(tmp_path / "a" / "b" / "x", "x")
    (tmp_path / "empty").mkdir()
    with only_process(tmp_path / "empty"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]


def test_who_waits_for_a_folder_says_so_once_a_minute(tmp_path, monkeypatch):
    import flowmap.base.files as files

    now, said = [0.0], []
    holder = only_process(tmp_path / "run")
    holder.__enter__()

    def sleep(seconds):
        now[0] += seconds
        if now[0] >= 150:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(files.time, "sleep", sleep)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    with only_process(tmp_path / "run", lambda: said.append(now[0])):
        assert said == [0.0, 60.0, 120.0] and now[0] == 150

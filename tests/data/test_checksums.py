"""A flipped byte in any file of an encoding or of pairs is detected, on opening and by --verify.

An unchanged file is read once.
"""

import json
import os

import pytest

from flowmap.base.files import file_digest
from flowmap.data import checksums
from flowmap.data.checksums import CHECKED, check
from flowmap.data.encoded import MADE, read_index
from flowmap.data.shards import check_sums
from flowmap.prepare.encode import encode
from tests.support.encoding import spec

pytest.importorskip("datasets")
FILES = [*(f"shard-0000{i}.arrow" for i in range(5)), "empty.safetensors", "reference.safetensors"]


@pytest.fixture
def made(tmp_path):
    encode(spec(), tmp_path / "e", batch_size=3)
    return tmp_path / "e"


def flip(path, place=-9, *, keep_time=False):
    """One bit of that file, the size as it was."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_file_of_an_encoding_has_a_checksum(made):
    index = read_index(made)
    assert sorted(one["file"] for one in (*index["shards"], *index["files"])) == sorted(FILES)
    assert all(one["sha256"] == file_digest(made / one["file"]) for one in (*index["shards"], *index["files"]))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("opened", [False, True])
def test_a_flipped_bit_is_noticed_on_opening(made, name, opened):
    if opened:
        spec(made).build()
    flip(made / name)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}: is torn or damaged: its SHA-256.*flowmap encode"):
            spec(made).build()


def test_what_has_not_changed_is_read_once(made, monkeypatch):
    read = []
    monkeypatch.setattr(checksums, "file_digest", lambda path: read.append(path.name) or file_digest(path))
    spec(made).build()
    spec(made).build()
    assert sorted(read) == sorted(FILES)
    os.utime(made / FILES[2])
    spec(made).build()
    assert read[len(FILES) :] == [FILES[2]]
    check_sums(made, read_index(made), MADE, again=True)
    assert len(read) == 2 * len(FILES) + 1


def test_verify_reads_what_kept_its_time_as_well(made):
    spec(made).build()
    flip(made / FILES[3], keep_time=True)
    spec(made).build()  # by size, inode and time it is the same file
    with pytest.raises(ValueError, match=f"{FILES[3]}: is torn or damaged"):
        check_sums(made, read_index(made), MADE, again=True)


def test_a_folder_that_cannot_keep_stamps_and_one_of_before_open(made, monkeypatch):
    monkeypatch.setattr(checksums.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    spec(made).build()
    assert not (made / CHECKED).exists() and not list(made.glob(".*.tmp"))
    monkeypatch.undo()
    (made / CHECKED).write_text("[1")  # torn: all is read again
    spec(made).build()
    index = json.loads((made / "index.json").read_text())
    del index["files"]
    for shard in index["shards"]:
        del shard["sha256"]  # as flowmap 0.1 wrote it
    (made / "index.json").write_text(json.dumps(index))
    assert len(spec(made).build()) == 18 and check_sums(made, read_index(made), MADE, again=True) == 0


def test_check_names_the_first_that_differs(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    right = {name: file_digest(tmp_path / name) for name in "ab"}
    check(tmp_path, right, "verb")
    with pytest.raises(ValueError, match="b: is torn or damaged.*run `verb`"):
        check(tmp_path, right | {"b": right["a"]}, "verb")

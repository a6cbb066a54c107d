"""Encoding to disk: every usable picture exactly once.

This is so whichever process makes the shards and however often it is killed.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flowmap.base.files import WriteError, only_process
from flowmap.cli import main
from flowmap.data import DATA, IMAGE_SOURCES
from flowmap.prepare.encode import encode
from flowmap.recipe import read_recipe
from tests.support.encoding import Averages, Letters, Numbers, files, spec

pyarrow = pytest.importorskip("pyarrow")


def rows(folder):
    """The source positions that the shards hold, in order."""
    found = []
    for path in sorted(folder.glob("shard-*.arrow")):
        with pyarrow.memory_map(str(path)) as file:
            found += pyarrow.ipc.open_stream(file).read_all()["position"].to_pylist()
    return found


def test_counts_and_reasons(tmp_path):
    index = encode(spec(images=Numbers(bad_label=4)), tmp_path)
    usable = Numbers(bad_label=4).usable
    assert rows(tmp_path) == usable and index["rows"] == len(usable)
    broken = [[f"number {i}", "is broken"] for i in (3, 10, 17)]
    assert index["left_out"] == [broken[0], ["number 4", "its label is 99, not one of 0..2"], *broken[1:]]
    assert index["grey"] == sum(i % 6 == 1 for i in usable) and index["missing_captions"] == sum(
        i % 5 == 0 for i in usable
    )
    assert index["num_classes"] == 3 and index["class_names"] == ["a", "b", "c"] and index["shape"] == [3, 4, 4]
    assert index == json.loads((tmp_path / "index.json").read_text())


def test_latents_that_are_not_finite_are_left_out(tmp_path):
    index = encode(spec(autoencoder=Averages(poison=0.8)), tmp_path)
    reasons = [reason for _, reason in index["left_out"]]
    assert 0 < reasons.count("is not finite in half precision when encoded") == 20 - index["rows"]


def test_processes_make_what_one_makes(tmp_path):
    whole = encode(spec(), tmp_path / "one", batch_size=3)
    assert encode(spec(), tmp_path / "two", shard=(1, 2), batch_size=3) is None
    assert not (tmp_path / "two" / "index.json").exists()
    assert encode(spec(), tmp_path / "two", shard=(0, 2), batch_size=3) == whole
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_second_call_changes_nothing(tmp_path):
    encode(spec(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    index = encode(spec(), tmp_path)
    assert index["rows"] == 20 and {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_another_choice_of_held_out_makes_no_shard_anew(tmp_path):
    encode(spec(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    encode(spec(held_out=4), tmp_path)
    assert len(spec(tmp_path, held_out=4).build()) == 16 and {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("count", [1, 20, 23, 25])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_stream_ends_where_it_ends(tmp_path, count, processes):
    stream = spec(
        images=Numbers(count=count, stream=True), held_out=0, text=None
    )  # the only picture of one has no caption
    for rank in range(processes):
        index = encode(stream, tmp_path / "s", shard=(rank, processes))
    known = encode(spec(images=Numbers(count=count), held_out=0, text=None), tmp_path / "k")
    assert rows(tmp_path / "s") == rows(tmp_path / "k") == Numbers(count=count).usable
    assert index["rows"] == known["rows"] and index["left_out"] == known["left_out"]


def test_a_stream_takes_its_reference_from_its_start(tmp_path):
    stream = spec(images=Numbers(count=90, stream=True), held_out=1, reference_images=3)
    encode(stream, tmp_path)
    data = spec(tmp_path, images=Numbers(count=90, stream=True), held_out=1, reference_images=3).build()
    assert len(data.reference) == 3 and len(data.held_out) == 1


def test_mistakes_are_named(tmp_path):
    encode(spec(), tmp_path / "e")
    with pytest.raises(ValueError, match="another encoding: identity.source.size"):
        encode(spec(images=Numbers(size=16)), tmp_path / "e")
    with pytest.raises(ValueError, match="shard_items: 5 there, 6 here"):
        encode(spec(shard_items=6), tmp_path / "e")
    with pytest.raises(ValueError, match="leaves nothing of 20 usable"):
        encode(spec(held_out=20), tmp_path / "h")
    with pytest.raises(ValueError, match="padded to one length"):
        encode(spec(text=Letters(ragged=True)), tmp_path / "r", batch_size=1)
    with pytest.raises(ValueError, match="3/3"):
        encode(spec(), tmp_path / "p", shard=(3, 3))


def test_a_source_that_changed_is_noticed(tmp_path, monkeypatch):
    encode(spec(), tmp_path)
    monkeypatch.setattr(Numbers, "fingerprint", lambda self: "other")
    with pytest.raises(ValueError, match="source has changed.*fingerprint"):
        encode(spec(), tmp_path)


def test_a_full_disk_names_the_shard_and_loses_nothing(tmp_path):
    encode(spec(), tmp_path, shard=(0, 5))
    first = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(WriteError, match="shard-00001.arrow"):
            encode(spec(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == first
    assert encode(spec(), tmp_path)["rows"] == 20


SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from tests.support.encoding import Numbers, spec
from flowmap.prepare.encode import encode

def child(folder, shard):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            encode(spec(images=Numbers(count=60, seconds=0.004), shard_items=7), folder, shard=shard, batch_size=3)
            code = 0
        finally:
            os._exit(code)
    return pid

encode(spec(), Path(sys.argv[1]) / "warm")  # imports what a child would spend its short life on
chance = random.Random(0)
for _ in range(8):
    pid = child(Path(sys.argv[1]) / "killed", (0, 1))
    time.sleep(chance.uniform(0.01, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(list((Path(sys.argv[1]) / "killed").glob("*.arrow"))))
pids = [child(Path(sys.argv[1]) / "two", (rank, 2)) for rank in range(2)]
assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
"""


@pytest.mark.slow
def test_killed_at_any_moment_or_made_by_two_at_once_it_is_the_same(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(counts) and counts[-1] > 0  # what is there stays there
    for stale in (".shard-00008.arrow.1.tmp", ".empty.safetensors.1.tmp", ".reference.safetensors.1.tmp"):
        (tmp_path / "killed" / stale).write_bytes(b"stale")
    (tmp_path / "killed" / "index.json").unlink(missing_ok=True)
    for path in (tmp_path / "killed").glob("shard-0000[78].*"):
        path.unlink()
    target = spec(images=Numbers(count=60, seconds=0.0), shard_items=7)
    encode(target, tmp_path / "whole", batch_size=3)
    target = spec(images=Numbers(count=60, seconds=0.004), shard_items=7)
    encode(target, tmp_path / "killed", batch_size=3)
    assert rows(tmp_path / "whole") == target.images.usable
    assert shards(tmp_path / "killed") == shards(tmp_path / "two") == shards(tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "two")


def shards(folder):
    return {name: content for name, content in files(folder).items() if name.startswith("shard")}


def test_the_same_part_is_not_made_twice_at_once(tmp_path):
    with only_process(tmp_path / ".process-1-of-2"), pytest.raises(ValueError, match="another flowmap process"):
        encode(spec(), tmp_path, shard=(1, 2))
    assert encode(spec(), tmp_path, shard=(1, 2)) is None
    with only_process(tmp_path / ".process-last"):
        assert encode(spec(), tmp_path, shard=(0, 2)) is None
    assert encode(spec(), tmp_path, shard=(0, 2))["rows"] == 20


RECIPE = """
data: {kind: encoded, images: {kind: folder, root: PICTURES, size: 4, classes: false}, shard_items: 2}
student: {kind: mlp}
objective: {kind: flow_matching}
"""


def test_the_verb(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "p").mkdir()
    for i in range(5):
        Image.new("RGB", (6, 6), (i, 0, 0)).save(tmp_path / "p" / f"{i}.png")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("PICTURES", str(tmp_path / "p")))
    out = ["--out", str(tmp_path / "e")]
    assert (
        main(["encode", "--recipe", str(recipe), *out, "--shard", "1/2"]) == 0
        and "when all parts are" in capsys.readouterr().out
    )
    assert (
        main(["encode", "--recipe", str(recipe), *out, "--shard", "0/2"]) == 0
        and "5 samples of shape (3, 4, 4)" in capsys.readouterr().out
    )
    assert main(["encode", "--recipe", str(recipe), *out, "--shard", "half"]) == 2
    assert main(["encode", "--recipe", "digits", *out]) == 2 and "not of kind encoded" in capsys.readouterr().err
    found = read_recipe(recipe, [f"data.root={tmp_path / 'e'}"])
    assert (
        len(found.data.build()) == 5
        and type(found.data) is DATA["encoded"]
        and type(found.data.images) is IMAGE_SOURCES["folder"]
    )
    assert read_recipe(recipe).to_yaml() == read_recipe(recipe).to_yaml()

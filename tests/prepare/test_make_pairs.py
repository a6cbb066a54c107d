"""Pairs on disk equal those of the exact flow, whichever process makes them and however often it is killed.

Pairs of another recipe are refused.
"""

import copy
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from flowmap.base.files import WriteError
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data, build_samples
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import PairedDataset, Pairs
from flowmap.data.pairs import contents, first_difference, noise_of
from flowmap.flow.solver import Heun
from flowmap.plan.plan import resolve
from flowmap.prepare.encode import encode
from flowmap.prepare.make_pairs import Maker, _fill, _finish, _make, make_pairs, verify
from flowmap.prepare.write import whole
from flowmap.recipe import read_recipe
from tests.support.encoding import files, spec

pytest.importorskip("datasets")

GAUSS = """\
data: {kind: toy, num_modes: 1, radius: 0.0, std: 0.4, points: 300, conditional: false, batch_size: 16}
student: {kind: mlp}
times: {kind: u_shaped}
objective: {kind: rectified}
coupling:
  kind: pairs
  teacher: {card: exact}
  num: 63
  inverted: 0.4
  shard_items: 10
  dtype: float32
  solver: {kind: heun, steps: 40}
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(key=value, ...) whose pairs lie in tmp_path / "pairs"."""
    path = tmp_path / "gauss.yaml"
    path.write_text(GAUSS)
    return lambda *overrides: read_recipe(path, [f"coupling.root={tmp_path / 'pairs'}", *overrides])


def opened(recipe) -> PairedDataset:
    run = resolve(recipe)
    return build_samples(run, build_data(run))


def test_they_are_those_of_the_exact_flow(recipe):
    index = make_pairs(resolve(recipe()))
    pairs = opened(recipe())
    x0, cond, x1 = pairs.__getitems__(range(63))
    assert (
        len(pairs) == index["rows"] == 63
        and pairs.num_generated == 38
        and index["nfe"] == 80
        and index["dtype"] == "float32"
    )
    assert cond["class"].tolist() == [0] * 63
    torch.testing.assert_close(x0[:38], 0.4 * x1[:38], rtol=0, atol=1e-3)  # Heun's error at 40 steps
    torch.testing.assert_close(0.4 * x1[38:], x0[38:], rtol=0, atol=2e-3)  # and half precision of up to 3
    real = build_data(resolve(recipe())).train
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:25]
    assert torch.equal(x0[38:], real[order])


def test_noise_is_a_function_of_seed_and_pair_and_batches_of_pairs(recipe):
    make_pairs(resolve(recipe()))
    pairs = opened(recipe())
    wanted = [5, 62, 0, 40, 5, 37, 38]
    x0, cond, x1 = pairs.__getitems__(wanted)
    for row, i in enumerate(wanted):
        one = pairs.__getitems__([i])
        assert torch.equal(one[0][0], x0[row]) and torch.equal(one[2][0], x1[row])
        assert i >= 38 or torch.equal(x1[row], noise_of(0, i, (2,)))
    assert not torch.equal(noise_of(0, 1, (2,)), noise_of(1, 0, (2,))) and noise_of(3, 7, (4, 5)).shape == (4, 5)


def test_reading_a_batch_copies_no_table_of_shards(recipe, monkeypatch):
    make_pairs(resolve(recipe()))
    pairs = opened(recipe())

    def refuse(*arguments, **settings):
        raise AssertionError("a copy of the table takes 100 ms with 1,300 shards")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    assert len(pairs.__getitems__([0, 5, 62])[0]) == 3


def test_processes_make_what_one_makes_and_a_second_call_changes_nothing(recipe, tmp_path):
    one = make_pairs(resolve(recipe()), tmp_path / "one", batch_size=4)
    for rank in (2, 0, 1):
        index = make_pairs(resolve(recipe()), tmp_path / "three", shard=(rank, 3), batch_size=4)
        assert (index is None) == (rank != 1)
    assert index == one and files(tmp_path / "one") == files(tmp_path / "three")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    assert (
        make_pairs(resolve(recipe()), tmp_path / "one") == one
        and {path: path.stat().st_mtime_ns for path in times} == times
    )


SCRIPT = """
import gc, os, random, signal, sys, time
from pathlib import Path
from flowmap.plan.plan import resolve
from flowmap.prepare.make_pairs import make_pairs
from flowmap.recipe import read_recipe
from flowmap.teachers.exact import MixtureTeacher

root, recipe = Path(sys.argv[1]), read_recipe(sys.argv[1] + "/gauss.yaml", ["coupling.solver.steps=4"])
make_pairs(resolve(recipe), root / "whole", batch_size=4)
quick = MixtureTeacher.velocity
MixtureTeacher.velocity = lambda *a: (time.sleep(0.001), quick(*a))[1]

gc.freeze(); gc.disable()  # a collection in a child would copy the parent's memory, and take longer than the pairs

def child(folder, shard):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            make_pairs(resolve(recipe), folder, shard=shard, batch_size=4)
            code = 0
        finally:
            os._exit(code)
    return pid

started = time.perf_counter()
os.waitpid(child(root / "timed", (0, 1)), 0)
whole, chance = time.perf_counter() - started, random.Random(0)  # on a busy machine kills come later too
for _ in range(10):
    pid = child(root / "killed", (0, 1))
    time.sleep(whole * chance.uniform(0.05, 0.6))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(list((root / "killed").glob("*.arrow"))))
pids = [child(root / "two", (rank, 2)) for rank in range(2)]
assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
"""


def test_killed_at_any_moment_or_made_by_two_at_once_they_are_the_same(recipe, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    recipe()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(counts) and counts[-1] > 0, counts
    (tmp_path / "killed" / ".shard-00006.arrow.1.tmp").write_bytes(b"stale")
    (tmp_path / "killed" / "index.json").unlink(missing_ok=True)
    for path in (tmp_path / "killed").glob("shard-00006.*"):
        path.unlink()
    given = recipe("coupling.solver.steps=4", f"coupling.root={tmp_path / 'killed'}")
    make_pairs(resolve(given), batch_size=4)
    assert files(tmp_path / "killed") == files(tmp_path / "two") == files(tmp_path / "whole")
    tables = (opened(given)._generated, opened(given)._inverted)
    assert [pair for table in tables for pair in table.data["pair"].to_pylist()] == list(range(63))


def test_a_full_disk_names_the_shard_and_loses_nothing(recipe, tmp_path):
    make_pairs(resolve(recipe()), shard=(0, 4))
    first = files(tmp_path / "pairs")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(WriteError, match="shard-00001.arrow"):
            make_pairs(resolve(recipe()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "pairs") == first
    with pytest.raises(RecipeError, match=r"is not complete \(2 shards are there\)"):
        opened(recipe())
    assert make_pairs(resolve(recipe()))["rows"] == 63


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("coupling.solver.steps=41", "solver.steps: 40 there, 41 here"),
        ("coupling.solver.kind=rk4", "solver.kind: 'heun' there, 'rk4' here"),
        ("coupling.num=64", "num: 63 there, 64 here"),
        ("coupling.seed=1", "seed: 0 there, 1 here"),
        ("coupling.inverted=0.2", "inverted: 0.4 there, 0.2 here"),
        ("data.std=0.5", "data.std: 0.4 there, 0.5 here"),
        ("data.points=400", "data.points: 300 there, 400 here"),
        ("coupling.teacher={card: exact, guidance: {kind: classifier_free}}", "teacher.guidance"),
        ("data.conditional=true", "data.conditional"),
    ],
)
def test_other_pairs_are_refused_by_the_first_key_that_differs(recipe, override, key):
    make_pairs(resolve(recipe("coupling.num=63")))
    other = recipe(override, *(["coupling.guidance=2.0"] if "guidance" in key else []))
    for refused in (lambda: opened(other), lambda: make_pairs(resolve(other))):
        with pytest.raises(ValueError, match="holds (other|another set of) pairs") as caught:
            refused()
        assert key in str(caught.value) and "\n" not in str(caught.value)
    assert len(opened(recipe("data.batch_size=99", "data.drop_condition=0.5"))) == 63


def test_another_guidance_clock_shape_or_generator_is_refused(recipe, tmp_path):
    guided = "coupling.teacher={card: exact, guidance: {kind: classifier_free, default: 1.5}}"
    assert make_pairs(resolve(recipe(guided, "data.conditional=true")))["identity"]["guidance"] == 1.5
    with pytest.raises(RecipeError, match="guidance: 1.5 there, 2.0 here"):
        opened(recipe(guided, "data.conditional=true", "coupling.guidance=2.0"))
    same = recipe(guided, "data.conditional=true")
    index = json.loads((tmp_path / "pairs" / "index.json").read_text())
    for part, key, value in (
        ("identity", "clock", "0 noise, 1 data"),
        ("contents", "shape", [3, 8, 8]),
        ("contents", "noise", "other"),
    ):
        changed = index | {part: index[part] | {key: value}}
        (tmp_path / "pairs" / "index.json").write_text(json.dumps(changed))
        with pytest.raises(RecipeError, match=f"holds other pairs: {key}"):
            opened(same)


def test_weights_that_are_not_here_are_not_compared():
    there = {"teacher": {"card": "a", "weights": "1"}, "seed": 0}
    assert first_difference(there, {"teacher": {"card": "a", "weights": None}, "seed": 0}) is None
    assert "teacher.weights: '1' there, '2' here" in first_difference(
        there, {"teacher": {"card": "a", "weights": "2"}, "seed": 0}
    )
    assert "teacher.card" in first_difference(there, {"teacher": {"card": "b", "weights": None}, "seed": 0})


def test_a_torn_shard_is_named_and_made_anew(recipe, tmp_path):
    make_pairs(resolve(recipe()))
    path = tmp_path / "pairs" / "shard-00002.arrow"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(RecipeError, match="shard-00002.arrow: is torn"):
        opened(recipe())
    path.write_bytes(b"\xff" * len(good))
    with pytest.raises(RecipeError, match="shard-00002.arrow: is torn"):
        opened(recipe())
    path.unlink()
    with pytest.raises(RecipeError, match="shard-00002.arrow: is missing; `flowmap pairs` makes it again"):
        opened(recipe())
    make_pairs(resolve(recipe()))
    assert path.read_bytes() == good


def test_verify_finds_nothing_or_the_pair_that_differs(recipe, tmp_path):
    make_pairs(resolve(recipe()))
    gap, _ = verify(resolve(recipe()), num=63)
    assert gap < 1e-6  # other batches
    assert verify(resolve(recipe()), num=1000, batch_size=7)[0] < 1e-6
    worse = Maker.of(resolve(recipe("coupling.solver.steps=3")), "cpu")
    for number in (1, 5):
        _make(worse, tmp_path / "pairs", number, worse.ranges()[number], 64)
        with pytest.raises(ValueError, match=f"shard-0000{number}.arrow.*damaged"):  # not the file of index.json
            verify(resolve(recipe()), num=63)
        make_pairs(resolve(recipe()))  # completes index.json: the shard is whole
        gap, pair = verify(resolve(recipe()), num=63)
        assert gap > 1e-3 and pair in worse.ranges()[number]
        _make(Maker.of(resolve(recipe()), "cpu"), tmp_path / "pairs", number, worse.ranges()[number], 64)
        make_pairs(resolve(recipe()))
    with pytest.raises(ValueError, match="--verify: 0"):
        verify(resolve(recipe()), num=0)


@pytest.mark.parametrize("number", [0, 5])
def test_a_pair_that_was_changed_is_not_trained_on(recipe, tmp_path, number):
    make_pairs(resolve(recipe()))
    maker, shard = Maker.of(resolve(recipe()), "cpu"), tmp_path / "pairs" / f"shard-0000{number}.arrow"
    PairedDataset(tmp_path / "pairs", maker.data, maker.identity)
    content = bytearray(shard.read_bytes())
    content[-200] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name}: is torn or damaged: its SHA-256.*flowmap pairs"):
        PairedDataset(tmp_path / "pairs", maker.data, maker.identity)
    with pytest.raises(ValueError, match=f"{shard.name}: is torn or damaged"):
        verify(resolve(recipe()), num=2)


def test_inverted_noise_is_held_against_chi_square(recipe, tmp_path):
    whole_set = ["coupling.num=300", "coupling.inverted=1.0", "coupling.shard_items=100"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = make_pairs(resolve(recipe(*whole_set)), tmp_path / "good")["inverted_noise"]
    assert (
        abs(found["z"]) < 4
        and found["p"] > 1e-4
        and found["count"] == 300
        and found["expected_mean"] == 2
        and found["expected_std"] == 2
    )
    with pytest.warns(UserWarning, match="does not carry these data to N"):
        found = make_pairs(resolve(recipe(*whole_set, "coupling.solver.steps=1")), tmp_path / "coarse")[
            "inverted_noise"
        ]
    assert (
        abs(found["z"]) > 4 and json.loads((tmp_path / "coarse" / "index.json").read_text())["inverted_noise"] == found
    )
    assert make_pairs(resolve(recipe("coupling.inverted=0")), tmp_path / "none")["inverted_noise"] is None


class Tells:
    """A teacher that records its conditions and returns the velocity that maps x1 to x0 = x1 - pooled."""

    def __init__(self):
        self.asked = []

    def velocity(self, x, t, cond=None):
        self.asked.append(cond)
        return cond["pooled"][:, :1, None, None].expand_as(x)


def test_text_is_kept_as_a_row_of_the_data_and_given_back(tmp_path):
    source = spec(tmp_path / "latents", flip=True)
    encode(source, tmp_path / "latents")
    data, teacher = source.build(), Tells()
    settings = Pairs(recipe="any", num=50, inverted=0.2, shard_items=20, solver=Heun(steps=1), dtype="float16")
    identity = {"format": 1, "seed": 0}
    maker = Maker(settings, data, BuiltTeacher(teacher, None), 2.0, identity, "cpu", True, "float16")
    _fill(maker, tmp_path / "pairs", (0, 1), 8)
    told = [whole(tmp_path / "pairs", number) for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _finish(maker, tmp_path / "pairs", told, lambda message: None)
    pairs = PairedDataset(tmp_path / "pairs", data, identity)
    x0, cond, x1 = pairs.__getitems__(range(50))
    assert [shard["inverted"] for shard in pairs.index["shards"]] == [False, False, True] and len(
        pairs.index["shards"]
    ) == 3
    assert set(cond) == {"text", "text_mask", "pooled", "class"} and len(set(cond["pooled"][:, 0].tolist())) > 1
    torch.testing.assert_close(
        x1 - x0, cond["pooled"][:, :1, None, None].expand_as(x0), rtol=0, atol=2e-2
    )  # half precision of 10
    assert all(one["guidance"].tolist() == [2.0] * len(one["guidance"]) for one in teacher.asked)
    place = torch.tensor(pairs._inverted.data["place"].to_pylist())
    assert len(set(place.tolist())) == 10 and torch.equal(x0[40:], data.__getitems__(place.tolist())[0])
    order = torch.tensor(pairs._generated.data["place"].to_pylist())
    assert sorted(order[: len(data)].tolist()) == list(range(len(data)))  # every text once before any comes again


def test_classes_come_in_turn_and_reach_the_teacher(recipe):
    eight = recipe("data.num_modes=8", "data.radius=1.0", "data.std=0.1", "data.conditional=true")
    make_pairs(resolve(eight))
    x0, cond, _ = opened(eight).__getitems__(range(38))
    assert cond["class"].tolist() == [i % 8 for i in range(38)]
    assert (x0 - eight.data.means[cond["class"]]).norm(dim=1).max() < 0.5  # five standard deviations


def test_mistakes_are_named(recipe, tmp_path):
    with pytest.raises(ValueError, match="coupling.inverted: wants 301 real samples, the data has 300"):
        make_pairs(resolve(recipe("coupling.num=301", "coupling.inverted=1.0")))
    with pytest.raises(ValueError, match="uint8 is for pictures"):
        make_pairs(resolve(recipe("coupling.dtype=uint8")))
    with pytest.raises(ValueError, match="shard: 3/3"):
        make_pairs(resolve(recipe()), shard=(3, 3))
    with pytest.raises(ValueError, match="batch: 0"):
        make_pairs(resolve(recipe()), batch_size=0)
    with pytest.raises(RecipeError, match="holds no pairs; run `flowmap pairs`"):
        opened(recipe(f"coupling.root={tmp_path / 'nothing'}"))
    stuck = Maker.of(resolve(recipe()), "cpu")
    object.__setattr__(
        stuck, "teacher", BuiltTeacher(type("Blows", (), {"velocity": lambda self, x, t, cond: x / 0})(), None)
    )
    with pytest.raises(RuntimeError, match="pair 10: the solver's result is not finite"):
        stuck.columns(range(10, 14))


def test_contents_change_with_the_data(recipe):
    one, other = build_data(resolve(recipe())), build_data(resolve(recipe("data.seed=1")))
    assert contents(one, 0) == contents(build_data(resolve(recipe())), 0) != contents(other, 0)


def test_the_verb(recipe, tmp_path, command):
    name = tmp_path / "gauss.yaml"
    recipe()
    out = ["--out", str(tmp_path / "p")]
    assert "when all parts are" in command("pairs", "--recipe", name, *out, "--shard", "1/2")[1]
    code, said, _ = command("pairs", "--recipe", name, *out, "--shard", "0/2")
    assert code == 0 and "63 pairs of shape (2,), 80 network calls each, 25 inverted" in said
    code, said, _ = command("pairs", "--recipe", name, *out, "--verify", 9)
    assert code == 0 and "9 pairs made again differ by at most" in said
    assert command("pairs", "--recipe", name, *out, "--shard", "half")[0] == 2
    code, _, error = command("pairs", "--recipe", name, *out, "coupling.seed=5")
    assert code == 2 and "seed: 0 there, 5 here" in error
    code, _, error = command("pairs", "--recipe", "digits", *out)
    assert code == 2 and "not of kind pairs" in error

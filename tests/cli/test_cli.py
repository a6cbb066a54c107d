"""The commands as a user runs them: what they print and write, and that every mistake is one line and exit 2."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import TINY, bytes_of
from PIL import Image
from safetensors.torch import save_file

from flowmap.base.files import read_tensors, write_text
from flowmap.base.images import stack, steps_label


def refuses(command, *arguments, says, code=2):
    """The command ends with that code and one line on stderr (besides a run's progress), which says all of `says`."""
    got, out, err = command(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert got == code, (got, err)
    assert len(lines) == 1 and lines[0].startswith("flowmap: "), err
    assert "Traceback" not in err and out == ""
    for part in says:
        assert str(part) in lines[0], (part, lines[0])


# ---------------------------------------------------------------- what works


def test_sample_writes_grids_and_single_pictures(command, finished, tmp_path):
    code, out, err = command(
        "sample", "--student", finished, "--steps", 1, 3, "--num", 5, "--seed", 3, "--out", tmp_path / "drawn"
    )
    assert (code, err) == (0, "")
    assert out.split() == [str(tmp_path / "drawn" / f"steps-{k}.png") for k in (1, 3)]
    labelled = stack([Image.new("RGB", (256, 256))], [steps_label("student", 1)])
    assert Image.open(tmp_path / "drawn" / "steps-1.png").size == labelled.size
    assert len((tmp_path / "drawn" / "steps-3.csv").read_text().splitlines()) == 5
    again = bytes_of(tmp_path / "drawn")
    command(
        "sample",
        "--student",
        finished / "student",
        "--steps",
        1,
        3,
        "--num",
        5,
        "--seed",
        3,
        "--out",
        tmp_path / "drawn",
    )
    assert bytes_of(tmp_path / "drawn") == again


def test_sample_compiles_the_network_where_it_is_asked_to(command, finished, tmp_path, monkeypatch):
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    arguments = ["sample", "--student", finished, "--steps", 2, "--num", 5, "--out"]
    assert command(*arguments, tmp_path / "drawn")[0] == 0 and not graphs
    assert command(*arguments, tmp_path / "compiled", "--compile")[0] == 0 and graphs
    assert bytes_of(tmp_path / "compiled") == bytes_of(tmp_path / "drawn")


def test_evaluate_gives_the_runs_own_figures(command, finished, tmp_path):
    code, out, _ = command("evaluate", "--student", finished, "--out", tmp_path / "m.json")
    assert code == 0 and "student 1" in out
    measured, kept = (json.loads(p.read_text()) for p in (tmp_path / "m.json", finished / "metrics.json"))
    assert {k: measured[k] for k in ("student", "teacher", "floor", "stamp")} == {
        k: kept[k] for k in ("student", "teacher", "floor", "stamp")
    }
    code, out, _ = command("evaluate", "--student", finished, "--steps", 1, "--metrics", "frechet")
    assert set(json.loads(out)["student"]) == {"1"}


def test_dry_run_writes_nothing(command, tiny, tmp_path):
    before = bytes_of(tmp_path)
    code, out, _ = command("fit", "--recipe", tiny, "--dry-run", "--out", tmp_path / "run")
    assert code == 0 and "20 steps" in out and "nothing is missing" in out
    assert bytes_of(tmp_path) == before and not (tmp_path / "run").exists()


MINE = """
from dataclasses import dataclass
from flowmap.objectives import OBJECTIVES
from flowmap.objectives.flow_matching import FlowMatching

@dataclass(frozen=True)
class Mine(FlowMatching):
    half: float = 0.5

OBJECTIVES["mine"] = Mine
"""


def test_a_file_of_the_users_adds_a_kind(command, tiny, tmp_path):
    from flowmap.objectives import OBJECTIVES

    (tmp_path / "my_objective.py").write_text(MINE)
    try:
        code, out, err = command(
            "show", "--recipe", tiny, "--import", tmp_path / "my_objective.py", "objective={kind: mine}"
        )
        assert code == 0 and "half: 0.5" in out, err
    finally:
        OBJECTIVES.pop("mine", None)
    refuses(command, "show", "--recipe", tiny, "--import", tmp_path / "none.py", says=["--import", "none.py"])
    refuses(command, "show", "--recipe", tiny, "--import", "no_such_module", says=["--import", "no_such_module"])


@pytest.mark.parametrize("verb", ["list", "cite", "show"])
def test_the_looking_verbs(command, verb, tiny):
    code, out, err = command(verb, *(["--recipe", tiny, "seed=7"] if verb == "show" else []))
    assert (code, err) == (0, "") and {"list": "digits", "cite": "2506.14603", "show": "seed: 7"}[verb] in out


def test_the_light_commands_import_nothing_heavy(tmp_path):
    heavy = ("lightning", "wandb", "torchmetrics", "diffusers", "transformers", "torchvision", "sklearn", "lpips")
    heavy += ("shtab",)
    text = "import sys\nfrom flowmap.cli import main\n"
    text += "for a in (['--help'], ['list'], ['show', '--recipe', 'digits'], ['cite']):\n"
    text += "    try:\n        main(a)\n    except SystemExit:\n        pass\n"
    text += "import flowmap.metrics, flowmap.data\n"  # the settings of metrics and data
    text += f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-300:] + done.stderr[-2000:]


# ---------------------------------------------------------------- mistakes in what is asked


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.step=3", ["tiny.yaml", "trainer.step", "did you mean 'steps'", "allowed:"]),
        ("trainer.steps=many", ["tiny.yaml", "trainer.steps", "'many'", "whole number"]),
        ("trainer.steps=0", ["tiny.yaml", "trainer.steps", "0", "1 or more"]),
        ("trainer.steps=1e999", ["trainer.steps"]),
        ("trainer.strategy=dpp", ["trainer.strategy", "'dpp'", "ddp"]),
        ("trainer.accelerator=gpuu", ["trainer", "gpuu"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1", "above 0"]),
        ("optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("ema.std=0.5", ["ema.std", "0.5"]),
        ("ema.kind=powr", ["ema.kind", "'powr'", "did you mean 'power'"]),
        ("teacher.card=exac", ["teacher.card", "'exac'", "did you mean 'exact'"]),
        ("student.kind=from_teacher", ["student.kind", "from_teacher", "network"]),
        ("data.kind=digits", ["teacher.card", "exact", "known density"]),
        ("sampler.steps=[0]", ["sampler.steps", "0"]),
        ("=3", ["key=value"]),
    ],
)
def test_a_mistake_in_a_setting(command, tiny, tmp_path, override, says):
    before = bytes_of(tmp_path)
    refuses(command, "fit", "--recipe", tiny, override, "--out", tmp_path / "run", says=says)
    assert bytes_of(tmp_path) == before


def test_a_recipe_that_is_not_there(command, tmp_path):
    refuses(command, "fit", "--recipe", "digit", says=["'digit'", "did you mean 'digits'"])
    refuses(command, "show", "--recipe", tmp_path / "no.yaml", says=["no.yaml"])


def test_a_value_that_is_still_to_be_given(command, tiny, tmp_path):
    tiny.write_text(TINY.replace("points: 500", 'points: "???"').replace("name: tiny", 'name: "???"'))
    refuses(command, "fit", "--recipe", tiny, "--out", tmp_path / "run", says=["tiny.yaml", "data.points", "???"])
    tiny.write_text(TINY.replace("name: tiny", 'name: "???"'))
    refuses(command, "fit", "--recipe", tiny, "--out", tmp_path / "run", says=["name", "must be given"])


def test_recipes_in_a_loop(command, tmp_path):
    card, path = tmp_path / "card.yaml", tmp_path / "looped.yaml"
    write_text(card, f"kind: recipe\nrecipe: {path}\n")
    write_text(
        path,
        "data: {kind: digits}\nstudent: {kind: from_teacher}\nobjective: {kind: ayf_emd}\n"
        f"teacher: {{card: {card}}}\n",
    )
    for extra in ([], ["--dry-run"]):
        refuses(command, "fit", "--recipe", path, *extra, "--out", tmp_path / "run", says=["loop", "looped"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], ["steps", "0"]),
        (["--steps", "1", "-2"], ["steps", "-2"]),
        (["--steps", "1000000000"], ["steps", "1000000000"]),
        (["--num", "0"], ["num", "0"]),
        (["--num", "99999999999"], ["num", "99999999999"]),
        (["--gamma", "1.5"], ["gamma", "1.5", "must lie in [0, 1]"]),
        (["--gamma", "nan"], ["gamma", "nan"]),
        (["--guidance", "2"], ["guidance", "2.0", "not trained"]),
        (["--class", "3"], ["class", "no condition", "none"]),
        (["--prompt", "a cat"], ["--prompt", "not conditioned on text"]),
        (["--device", "gpu9"], ["--device", "'gpu9'"]),
        (["--seed", str(2**70)], ["seed", str(2**70)]),
    ],
)
def test_a_sample_that_cannot_be_drawn(command, finished, tmp_path, arguments, says):
    refuses(command, "sample", "--student", finished, *arguments, "--out", tmp_path / "drawn", says=says)
    assert not (tmp_path / "drawn").exists()


def test_a_class_out_of_range_and_a_guidance_that_is_no_scale(command, tmp_path, labelled):
    for label in (10, -2):
        refuses(
            command,
            "sample",
            "--student",
            labelled,
            "--class",
            label,
            "--out",
            tmp_path / "drawn",
            says=["class", label, "0..9"],
        )
    for scale in ("nan", "-1", "inf"):
        refuses(
            command,
            "sample",
            "--student",
            labelled,
            "--guidance",
            scale,
            "--out",
            tmp_path / "drawn",
            says=["guidance"],
        )
    assert (
        command(
            "sample",
            "--student",
            labelled,
            "--class",
            9,
            "--guidance",
            2,
            "--num",
            2,
            "--steps",
            1,
            "--out",
            tmp_path / "drawn",
        )[0]
        == 0
    )


@pytest.fixture
def labelled(tmp_path):
    """An untrained student with ten classes and a guidance scale."""
    from flowmap.nets import DiT
    from flowmap.samplers import Deterministic
    from flowmap.student.config import StudentConfig
    from flowmap.student.folder import save_student

    config = StudentConfig(
        DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, guidance=(1.0, 3.0, 1.5)
    )
    save_student(tmp_path / "labelled", config, config.build().state_dict(), recipe="", card="")
    return tmp_path / "labelled"


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--metrics", "fretchet"], ["--guidance", "2"], ["--device", "gpu9"]]
)
def test_an_evaluation_that_cannot_be_made(command, finished, arguments):
    refuses(command, "evaluate", "--student", finished, *arguments, says=[arguments[-1]])


@pytest.mark.parametrize(
    "arguments",
    [[], ["fitt"], ["fit"], ["sample", "--student", "x", "--num", "two", "--out", "y"], ["sample", "--num", "2"]],
)
def test_a_usage_error_is_exit_two(command, arguments):
    code, _, err = command(*arguments)
    assert code == 2 and "Traceback" not in err


def test_no_such_student(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "file", "x")
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere": "no folder",
        tmp_path / "nowhere": "no folder",
        "file": "is a file",
        "owner/name": "owner/name",
        "empty": "config.json",
    }
    for source, says in cases.items():
        refuses(command, "sample", "--student", source, "--out", tmp_path / "drawn", says=[says])


# ---------------------------------------------------------------- where things are written


def test_an_out_that_cannot_be_written(command, tiny, finished, tmp_path):
    write_text(tmp_path / "file", "mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refuses(command, "fit", "--recipe", tiny, "--out", out, says=["--out", "file"])
        refuses(command, "sample", "--student", finished, "--out", out, says=["--out", "file"])
    refuses(command, "evaluate", "--student", finished, "--out", tmp_path / "file" / "m.json", says=["--out", "file"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_run_of_another_recipe_is_left_alone(command, tiny, finished):
    before = bytes_of(finished)
    for extra in ([], ["--resume"]):
        refuses(
            command,
            "fit",
            "--recipe",
            tiny,
            "seed=5",
            *extra,
            "--out",
            finished,
            says=["--out", "another recipe", "seed", "0 there and 5 here"],
        )
    assert bytes_of(finished) == before


def test_an_unfinished_run_wants_resume_or_overwrite(command, tiny, finished):
    (finished / "metrics.json").unlink()
    before = bytes_of(finished)
    refuses(command, "fit", "--recipe", tiny, "--out", finished, says=["unfinished", "--resume", "--overwrite"])
    assert bytes_of(finished) == before
    assert command("fit", "--recipe", tiny, "--out", finished, "--resume")[0] == 0
    assert bytes_of(finished).keys() == before.keys() | {"metrics.json"}


def test_overwrite_replaces_a_run_only_and_only_once_the_new_one_can_be_built(command, tiny, finished, tmp_path):
    write_text(tmp_path / "thesis" / "chapter.tex", "mine")
    refuses(
        command,
        "fit",
        "--recipe",
        tiny,
        "--overwrite",
        "--out",
        tmp_path / "thesis",
        says=["--overwrite", "not a run folder"],
    )
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"
    before = bytes_of(finished)
    refuses(
        command,
        "fit",
        "--recipe",
        tiny,
        "student.kind=from_teacher",
        "--overwrite",
        "--out",
        finished,
        says=["from_teacher"],
    )
    assert bytes_of(finished) == before
    assert command("fit", "--recipe", tiny, "seed=5", "--overwrite", "--out", finished)[0] == 0
    assert "seed: 5" in (finished / "recipe.yaml").read_text()


def test_somebody_elses_files_are_not_replaced(command, tiny, tmp_path):
    write_text(tmp_path / "mine" / "log.csv", "a,b\n")
    refuses(command, "fit", "--recipe", tiny, "--out", tmp_path / "mine", says=["--out", "not a run folder", "log.csv"])
    assert bytes_of(tmp_path / "mine") == {"log.csv": b"a,b\n"}


# ---------------------------------------------------------------- files that are not what they seem


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile(path, trap):
    torch.save({"state_dict": {}, "global_step": 3, "optimizer_states": [], "loops": Bomb(trap)}, path)


def bare_pickle(path, trap):
    path.write_bytes(pickle.dumps(Bomb(trap)))


def torn(path, trap):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, trap):
    path.write_bytes(b"")


def text(path, trap):
    path.write_text("no checkpoint")


def another_net(path, trap):
    state = torch.load(path, weights_only=True)
    state["state_dict"]["student.net.enter.weight"] = torch.zeros(24, 2)
    torch.save(state, path)


def not_a_run(path, trap):
    torch.save({"weights": torch.zeros(2)}, path)


def odd_entries(path, trap):
    torch.save({"state_dict": [1], "global_step": "x", "optimizer_states": 3}, path)


@pytest.mark.parametrize(
    "spoil", [hostile, bare_pickle, torn, empty, text, another_net, not_a_run, odd_entries], ids=lambda f: f.__name__
)
def test_a_checkpoint_that_cannot_be_used(command, tiny, finished, tmp_path, spoil):
    (finished / "metrics.json").unlink()
    path = finished / "checkpoints" / "last.ckpt"
    spoil(path, tmp_path / "trap")
    before = bytes_of(finished)
    says = (
        ["another architecture", "student.net.enter.weight", "(24, 2)"] if spoil is another_net else ["--resume", path]
    )
    refuses(command, "fit", "--recipe", tiny, "--resume", "--out", finished, says=says)
    assert not (tmp_path / "trap").exists(), "a pickle was run"
    assert bytes_of(finished) == before


def wrong_shape(path, trap):
    save_file({**read_tensors(path), "net.enter.weight": torch.zeros(16, 3)}, path)


def missing_tensor(path, trap):
    save_file({k: v for k, v in read_tensors(path).items() if k != "net.enter.weight"}, path)


def extra_tensor(path, trap):
    save_file({**read_tensors(path), "more": torch.zeros(1)}, path)


def whole_numbers(path, trap):
    save_file({k: v.int() for k, v in read_tensors(path).items()}, path)


def absent(path, trap):
    path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (torn, "not a whole safetensors file"),
        (empty, "not a whole safetensors file"),
        (text, "not a whole safetensors file"),
        (bare_pickle, "is a pickle"),
        (hostile, "is a pickle"),
        (wrong_shape, "net.enter.weight: has shape (16, 3), config.json says (16, 2)"),
        (missing_tensor, "net.enter.weight: is missing"),
        (extra_tensor, "more: is not part of the network"),
        (whole_numbers, "has int32"),
        (absent, "model.bin is a pickle and is not read"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_weights_that_cannot_be_used(command, finished, tmp_path, spoil, says):
    spoil(finished / "student" / "model.safetensors", tmp_path / "trap")
    refuses(command, "sample", "--student", finished, "--out", tmp_path / "drawn", says=["model.safetensors", says])
    assert not (tmp_path / "trap").exists() and not (tmp_path / "drawn").exists()


def changed(**values):
    return lambda config: {**config, **values}


def net(**values):
    return lambda config: {**config, "net": {**config["net"], **values}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (net(depth=10**9), "depth"),
        (net(width=10**9), "width"),
        (net(width=-1), "width"),
        (net(depth=10**400), "depth"),
        (net(width=True), "width"),
        (net(heads=3), "heads"),
        (net(kind="mpl"), "did you mean 'mlp'"),
        (net(kind=["mlp"]), "kind"),
        (changed(num_classes=10**12), "num_classes"),
        (changed(num_classes=0), "num_classes"),
        (changed(shape=[10**6, 10**6]), "shape"),
        (changed(shape=[]), "shape"),
        (changed(shape=[-2]), "shape"),
        (changed(shape="2"), "shape"),
        (changed(guidance=[1.0, float("inf"), 1.0]), "guidance"),
        (changed(sampler={"kind": "deterministic", "steps": [0]}), "sampler.steps"),
        (changed(format=2), "format"),
        (changed(extra=1), "extra"),
        (lambda config: {k: v for k, v in config.items() if k != "net"}, "net"),
        (lambda config: [config], "not a JSON object"),
    ],
)
def test_a_config_that_cannot_be_used(command, finished, tmp_path, change, says):
    path = finished / "student" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refuses(command, "sample", "--student", finished, "--out", tmp_path / "drawn", says=["config.json", says])


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000, b"null", b'{"format": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_not_json(command, finished, tmp_path, raw):
    (finished / "student" / "config.json").write_bytes(raw)
    refuses(command, "sample", "--student", finished, "--out", tmp_path / "drawn", says=["config.json"])


@pytest.mark.parametrize(
    "raw",
    [b"\x00", b"data: [", b"[1]", TINY.replace("{kind: toy", "{kind: [toy]").encode(), b"a: &a [*a]\n", b"- " * 5000],
)
def test_a_recipe_that_is_not_one(command, tmp_path, raw):
    (tmp_path / "bad.yaml").write_bytes(raw)
    refuses(command, "show", "--recipe", tmp_path / "bad.yaml", says=["bad.yaml"])


def test_overrides_may_stand_on_both_sides_of_an_option(capsys):
    from flowmap.cli import parse

    arguments = parse(["fit", "--recipe", "digits", "trainer.steps=2", "--dry-run", "seed=1"])
    assert arguments.overrides == ["trainer.steps=2", "seed=1"]
    arguments = parse(
        [
            "compare",
            "--recipes",
            "a",
            "b",
            "seed=1",
            "--steps",
            "1",
            "2",
            "lr=2",
            "+file.yaml",
            "--calls",
            "9",
            "--out",
            "runs/lr=3",
        ]
    )
    assert (arguments.recipes, arguments.steps, arguments.out) == (["a", "b"], [1, 2], "runs/lr=3")
    assert arguments.overrides == ["seed=1", "lr=2", "+file.yaml"]
    arguments = parse(["compare", "--runs", "runs/lr=1", "runs/lr=2", "--out", "o"])
    assert arguments.runs == ["runs/lr=1", "runs/lr=2"] and not arguments.overrides, (
        "a folder may have an = in its name"
    )
    for words in (
        ["fit", "--recipe", "digits", "--wet-run"],
        ["cite", "seed=1"],
        ["fit", "--recipe", "digits", "--nonsense=1"],
    ):
        with pytest.raises(SystemExit) as caught:
            parse(words)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err

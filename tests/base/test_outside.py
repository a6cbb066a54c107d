"""Untrusted recipes, cards, bases and overrides: no access to the environment or other files, and no hangs."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from flowmap.base.outside import read_yaml
from flowmap.base.schema import RecipeError
from flowmap.recipe.recipe import read_recipe, read_resolved
from flowmap.student.folder import load_student
from flowmap.teachers.card import read_card
from flowmap.train.fit import fit

SECRET = "hunter2-of-the-environment"
VALUES = [
    "${oc.env:A_SECRET}",
    "${oc.env:A_SECRET,x}",
    "x${oc.env:A_SECRET}y",
    "${seed}",
    "${oc.decode:${oc.env:A_SECRET}}",
    "${oc.env:A_SECRET",
]
ESCAPED = "\\x24{oc.env:A_SECRET}"  # YAML makes ${...} of it between double quotes


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("A_SECRET", SECRET)


def refused(call, *says):
    """The error of the call, one line, says all of `says` and nothing of the secret; it took no time."""
    started = time.perf_counter()
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and SECRET not in text, text
    assert all(part in text for part in says), text
    assert time.perf_counter() - started < 10  # nothing hangs
    return text


@pytest.mark.parametrize("value", [*VALUES, ESCAPED])
def test_no_text_of_a_recipe_is_resolved(tiny, value):
    text = tiny.read_text()
    tiny.write_text(text.replace("name: tiny", f'name: "{value}"'))
    refused(lambda: read_recipe(tiny), "tiny.yaml", "name", "not resolved")
    refused(lambda: read_resolved(tiny), "tiny.yaml", "name", "not resolved")
    tiny.write_text(text.replace("features: pixels", f'features: "{value}"'))
    refused(lambda: read_recipe(tiny), "metrics[0].features", "not resolved")
    base = tiny.with_name("base.yaml")
    base.write_text(f'log: {{project: "{value}"}}\n')
    tiny.write_text(f"base: base\n{text.replace('wandb: false, ', '')}")
    refused(lambda: read_recipe(tiny), "base.yaml", "log.project", "not resolved")
    tiny.write_text(text)
    refused(lambda: read_recipe(tiny, [f"+{base}"]), "base.yaml", "log.project", "not resolved")


@pytest.mark.parametrize(
    "override",
    ["name=${oc.env:A_SECRET}", f'name="{ESCAPED}"', "log={project: '${oc.env:A_SECRET}'}", "${oc.env:A_SECRET}=1"],
)
def test_no_override_is_resolved(tiny, override):
    refused(lambda: read_recipe(tiny, [override]), "command line", "not resolved")


def test_no_card_is_resolved(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("kind: exact\nlicence: ${oc.env:A_SECRET}\n")
    refused(lambda: read_card(path), "card.yaml", "licence", "not resolved")
    path.write_text("kind: [\n")
    refused(lambda: read_card(path), "card.yaml", "is not YAML (line 2")


def test_a_secret_reaches_no_file_of_a_run(tiny, tmp_path):
    recipe = read_recipe(tiny, ["trainer.steps=1", "name=$A_SECRET"])  # a dollar alone is text
    folder = fit(recipe, tmp_path / "run", log=lambda message: None).folder
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert read_resolved(folder / "recipe.yaml").name == "$A_SECRET"


PASSWD = f"root:x:0:0:{SECRET}:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n"
FILES = {
    "one text": PASSWD,
    "a mapping": f"password: {SECRET}\nuser: me\n",
    "keys": f"{SECRET}: 1\n",
    "a list": f"- {SECRET}\n",
    "no YAML": f"{SECRET}: [\n: ]",
    "a tab": f"data:\n\t- {SECRET}\n",
    "an unknown alias": f"data: *{SECRET}\n",
    "a tag": f"data: !{SECRET} 1\n",
    "twice": f"{SECRET}: 1\n{SECRET}: 2\n",
    "not UTF-8": SECRET.encode() + b"\xff",
    "huge": f"# {SECRET}\n" + "a: 1\n" * 300_000,
    "deep": f"{SECRET}: " + "[" * 100_000,
    "an alias of itself": f"{SECRET}: &a [*a]\n",
    "billion laughs": "a: &a [1]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a{i - 1 or ''}]\n" for i in range(1, 60)),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_recipe_is_not_quoted(tiny, tmp_path, what):
    other = tmp_path / "other"
    other.write_bytes(FILES[what] if isinstance(FILES[what], bytes) else FILES[what].encode())
    text = tiny.read_text()
    tiny.write_text(f"base: {other}\n{text}")
    for call in (lambda: read_recipe(tiny), lambda: read_recipe(other), lambda: read_resolved(other)):
        refused(call, str(other))
    tiny.write_text(text)
    refused(lambda: read_recipe(tiny, [f"+{other}"]), str(other))
    assert SECRET not in refused(lambda: read_card(other), "other")


def test_what_is_no_regular_file_is_never_opened(tiny, finished, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    text = tiny.read_text()
    for path in map(Path, (tmp_path / "pipe.yaml", "/dev/zero", "/proc/self/mem")):
        tiny.write_text(f"base: {path}\n{text}")
        refused(lambda: read_recipe(tiny))
        for read in (read_recipe, read_resolved, read_card):
            refused(partial(read, path))
    for name in ("config.json", "model.safetensors"):
        kept = (finished / "student" / name).rename(tmp_path / name)
        os.mkfifo(finished / "student" / name)
        refused(lambda: load_student(finished), name)
        (finished / "student" / name).unlink()
        kept.rename(finished / "student" / name)
    (finished / "student" / "recipe.yaml").unlink()
    os.symlink("/dev/zero", finished / "student" / "recipe.yaml")
    with pytest.raises(RecipeError, match="recipe.yaml: is not a regular file"):
        read_resolved(finished / "student" / "recipe.yaml")


def test_what_was_read_is_the_callers_own_and_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: [1, 2]}")
    read_yaml(path)["a"]["b"].append(3)
    assert read_yaml(path) == {"a": {"b": [1, 2]}}
    path.write_text("a: 4")
    assert read_yaml(path) == {"a": 4}

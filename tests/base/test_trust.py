"""Names in a recipe never import or call anything; names of modules that the user allows work."""

from __future__ import annotations

import sys

import pytest
import torch

from flowmap.base import trust
from flowmap.metrics.features import build_features, check_features
from flowmap.metrics.text_features import features_of
from flowmap.objectives.perceptual import perceptual

MODULE = """
from pathlib import Path
import torch
Path(__file__).with_name("imported").touch()

def halves(x):
    return x.flatten(1).double() / 2

def apart(a, b):
    return (a - b).square().flatten(1).sum(1)
"""
NAMES = {
    "features of pictures": (check_features, "features"),
    "built features of pictures": (lambda name: build_features(name, torch.zeros(2, 1, 4, 6)), "features"),
    "features of sentences": (features_of, "features"),
    "a perceptual distance": (lambda name: perceptual(name, torch.device("cpu")), "net"),
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module on the path that leaves a file behind when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_ALLOWED", {})
    (tmp_path / "mine_of_a_test.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("mine_of_a_test", None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", ["os:fork", "http.server:test", "mine_of_a_test:halves", "mine_of_a_test"])
def test_a_name_of_code_imports_nothing(mine, name, code):
    look_up, key = NAMES[name]
    with pytest.raises(ValueError, match=f"^{key}.*{code}") as refused:
        look_up(code)
    assert ":" not in code or "--import" in str(refused.value) and "flowmap.allow_import" in str(refused.value)
    assert not (mine / "imported").exists() and "mine_of_a_test" not in sys.modules


def test_what_the_user_allows_is_used(mine):
    trust.allow_import("mine_of_a_test")
    x = torch.ones(5, 3, 4, 6)
    assert build_features("mine_of_a_test:halves", x)(x).sum() == 5 * 3 * 4 * 6 / 2
    assert perceptual("mine_of_a_test:apart", torch.device("cpu"))(x, 0 * x).tolist() == [72.0] * 5
    with pytest.raises(ValueError, match="no attribute 'thirds'"):
        check_features("mine_of_a_test:thirds")


def test_a_package_does_not_allow_its_submodules():
    trust.allow_import("json")
    with pytest.raises(ValueError, match="--import json.decoder"):
        check_features("json.decoder:JSONDecoder")


def with_features(finished, code):
    path = finished / "student" / "recipe.yaml"
    path.write_text(path.read_text().replace("features: pixels", f"features: {code}"))
    assert code in path.read_text()
    return path


@pytest.mark.parametrize("code", ["os:fork", "http.server:test", "mine_of_a_test:halves"])
def test_a_students_folder_runs_no_code(command, finished, mine, code):
    path = with_features(finished, code)
    for arguments in (["evaluate", "--student", finished], ["fit", "--recipe", path, "--out", mine / "run"]):
        got, out, err = command(*arguments)
        assert (got, out, err.count("\n")) == (2, "", 1), err
        assert code in err and "--import" in err
    command("fit", "--recipe", path, "--out", mine / "run", "--dry-run")
    assert not (mine / "imported").exists() and not (mine / "run").exists()


def test_a_file_of_the_users_is_called_by_its_stem(command, finished, mine, tmp_path):
    with_features(finished, "mine_of_a_test:halves")
    got, out, err = command("evaluate", "--student", finished, "--steps", 1, "--import", mine / "mine_of_a_test.py")
    assert got == 0 and "frechet_halves" in out, err


READERS = [
    "fit",
    "doctor",
    "show",
    "encode",
    "pairs",
    "compare",
    "list",
    "sample",
    "evaluate",
    "export",
    "merge",
    "average",
]


@pytest.mark.parametrize("verb", READERS)
def test_every_verb_that_reads_a_recipe_takes_imports(command, verb):
    _, out, _ = command(verb, "--help")
    assert "--import" in out

"""Runs and students written by flowmap 0.1 are still recognised and load.

They are in tests/recorded/kept, made by benchmarks/recorded.py at commit 2a1eda1.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flowmap
from flowmap.recipe import read_recipe
from tests.support.tiny_text import wordnet_files

RECORDED = Path(__file__).parent / "recorded"
PICTURES = ("short-digits", "lediflow", "instaflow")
NAMES = (*PICTURES, "language")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the recorded recipes and their runs, which name each other by relative paths."""
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kept").rename(tmp_path / "runs")
    wordnet_files(tmp_path / "wordnet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMAP_RUNS", "runs")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_complete_with_all_that_it_was_built_on(place, name):
    said = []
    before = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    flowmap.fit(read_recipe(f"{name}.yaml", ["trainer.accelerator=cpu"]), f"runs/{name}", log=said.append)
    assert said and all("complete in runs" in line for line in said if line.startswith("[")), said
    assert before == {
        path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file() and path in before
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_student_samples_what_it_sampled(place, name):
    """To 1e-4: other processors round differently."""
    student = flowmap.load_student(f"runs/{name}/student")
    samples = student.sample(4, steps=1, seed=3)
    if name == "language":
        assert samples == json.loads((RECORDED / "sentences.json").read_text())
    else:
        torch.testing.assert_close(samples, load_file(RECORDED / "samples.safetensors")[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_that_was_not_measured_goes_on_from_its_checkpoint(place, name):
    (place / "runs" / name / "metrics.json").unlink()  # as if it had been cut off before it was measured
    said = []
    flowmap.fit(read_recipe(f"{name}.yaml", ["trainer.accelerator=cpu"]), f"runs/{name}", resume=True, log=said.append)
    assert any("resuming at step" in line for line in said), said
    assert (place / "runs" / name / "metrics.json").is_file()

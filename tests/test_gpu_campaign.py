"""`make gpu` from beginning to end on the CPU, at toy size; a second call measures nothing again."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def campaign(out: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--toy", "--out", str(out), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_a_job_is_measured_once(gpu, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--toy", "--out", str(out), "--jobs", "step dit256"]
    assert gpu.main(words) == 0, capsys.readouterr()
    job = json.loads(out.read_text())["jobs"]["step dit256"]
    assert job["step_ms"] > 0 and job["tangent_error"] > 0 and job["sample_1_in_4_steps_ms"] > 0
    assert gpu.main(words) == 0 and capsys.readouterr().out.count("measured before") == 1


def test_autoguidance_is_timed_in_turn_and_on_two_streams(gpu, tmp_path):
    job = gpu.autoguidance(gpu.Campaign(torch.device("cpu"), True, tmp_path))
    assert len(job) == 4 and min(job.values()) > 0  # one row and two


@pytest.mark.slow
def test_the_campaign_runs_to_its_end_and_is_resumed(tmp_path):
    out = tmp_path / "gpu.json"
    done = campaign(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())["jobs"]
    assert found["tests"]["tests"] > 0 and found["tests"]["failures"] == found["tests"]["errors"] == 0
    for name in ("dit256", "imagenet512", "sd15", "sd35-medium", "flux-dev-lora"):
        job = found[f"step {name}"]
        assert job["step_ms"] > 0 and job["tangent_error"] > 0 and job["sample_1_in_4_steps_ms"] > 0
    assert found["encoding"]["pictures_per_second"] > 0 and found["evaluation"]["pictures_per_second"] > 0
    assert {"student", "teacher", "floor"} <= found["fashion"]["metrics"].keys()
    again = campaign(out, "--jobs", "step dit256", "encoding")
    assert again.returncode == 0 and again.stdout.count("measured before") == 2


def test_without_a_gpu_it_says_so(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 3
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_a_job_that_may_last_longer_than_what_is_left_is_not_begun(tmp_path):
    done = campaign(tmp_path / "gpu.json", "--minutes", "0.5", "--jobs", "fashion")
    assert done.returncode == 1 and "not begun" in done.stdout

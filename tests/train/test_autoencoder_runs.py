"""An autoencoder trained by a recipe: what it leaves, and that it learns."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json

import pytest
import torch
from conftest import no_runs

from flowmap.teachers.autoencoder import Autoencoder

RECIPE = """
data: {kind: digits, batch_size: 32}
student: {kind: autoencoder_kl, channels: [8, 16], latent_channels: 2, groups: 4}
objective: {kind: reconstruction, kl: 1.0e-4}
optimizer: {lr: 5.0e-3, schedule: cosine, warmup_steps: 10}
trainer: {steps: 80, accelerator: cpu, checkpoint_every_steps: 40}
ema: {kind: power, std: 0.05}
metrics: [{kind: frechet, features: pixels, images: 200}]
log: {every_steps: 20, wandb: false}
"""


def test_from_a_recipe_to_a_folder_that_diffusers_loads(tmp_path, command, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "ae.yaml"
    path.write_text(RECIPE)
    assert command("fit", "--recipe", path, "--dry-run")[0] == 0
    code, out, err = command("fit", "--recipe", path, "--out", tmp_path / "run")
    assert code == 0 and "psnr" in out, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert no_runs(tmp_path / "run") == set()
    assert metrics["student"]["1"]["psnr"] > 12 and (tmp_path / "run" / "samples").is_dir()
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "run" / "student")
    frozen = Autoencoder(source=str(tmp_path / "run" / "student")).load()
    from flowmap.data import Digits

    x = Digits().build().held_out
    z = frozen.encode(x)
    assert z.shape == (297, 2, 4, 4) and abs(float(z.std()) - 1) < 0.1 and abs(float(z.mean())) < 0.1
    with torch.no_grad():
        torch.testing.assert_close(frozen.decode(z), model(x).sample, rtol=1e-4, atol=1e-4)
    code, out, err = command("sample", "--student", tmp_path / "run", "--num", 4, "--out", tmp_path / "drawn")
    assert code == 2 and "autoencoder" in err


@pytest.mark.parametrize(
    "change, says",
    [
        (
            "objective.kind=flow_matching",
            "objective: flow_matching does not train a student of kind autoencoder_kl; allowed: ",
        ),
        ("student.latent_channels=0", "latent_channels: 0"),
        ("student.channels=[8,9]", "channels"),
        ("objective.kl=-1", "kl: -1"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, command, change, says):
    (tmp_path / "ae.yaml").write_text(RECIPE)
    code, out, err = command("fit", "--recipe", tmp_path / "ae.yaml", "--out", tmp_path / "run", change)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1

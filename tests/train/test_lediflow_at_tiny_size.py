"""The full-scale recipes of LeDiFlow, changed by a +tiny file alone, on the real classes.

Pictures on disk -> latents -> auxiliary model -> flow of codes -> flow, measured, drawn, edited.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flowmap
from tests.support.tiny_pipelines import save
from tests.train.test_recipes_at_tiny_size import PIXELS, pictures

pytest.importorskip("datasets")

COMMON = """\
data: {{{more}held_out: 4, batch_size: 4, global_batch_size: 4}}
trainer: {{steps: 2, devices: 1, strategy: auto, precision: "32", accelerator: cpu, checkpoint_every_steps: 2}}
evaluation: {{teacher_steps: 2, batch_size: 8}}
log: {{wandb: false, samples_every_steps: 0, grid_images: 4}}
"""
AUXILIARY = "student: {size: 4, width: 24, depth: 1, heads: 2}\n"
CODES = "student: {width: 8, depth: 1}\n"
FLOW = """\
student: {{preset: nano, width: 24, depth: 1, heads: 2}}
prior: {{overrides: ["+{folder}/auxiliary.yaml"], z: {{overrides: ["+{folder}/codes.yaml"]}}}}
metrics: [{{kind: mmd, features: pixels, images: 8}}]
"""


def tiny(folder):
    root, coder = pictures(folder / "pictures"), save("dit", folder / "pipe") / "vae"
    images = f"images: {{root: {root}, size: {PIXELS}}}, autoencoder: {{source: {coder}}}, "
    (folder / "auxiliary.yaml").write_text(COMMON.format(more=images) + AUXILIARY)
    codes = COMMON.format(more=f"overrides: ['+{folder}/auxiliary.yaml'], ").replace("held_out: 4", "held_out: 0.5")
    (folder / "codes.yaml").write_text(codes + CODES)
    (folder / "flow.yaml").write_text(COMMON.format(more=images) + FLOW.format(folder=folder))
    return folder / "flow.yaml"


@pytest.mark.parametrize("recipe", ["ffhq"])
def test_from_pictures_on_disk_to_samples_that_are_edited(recipe, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    code, out, err = command("fit", "--recipe", f"lediflow/{recipe}", f"+{tiny(tmp_path)}", "--out", tmp_path / "run")
    assert code == 0 and "mmd_pixels" in out, err
    student = flowmap.load_student(tmp_path / "run")
    images = student.sample(3, steps=2, seed=1)
    assert images.shape == (3, 3, PIXELS, PIXELS) and torch.equal(images, student.sample(3, steps=2, seed=1))
    Image.new("RGB", (PIXELS, PIXELS), (200, 30, 40)).save(tmp_path / "a.png")
    Image.new("L", (PIXELS, PIXELS), 255).crop((0, 0, PIXELS, PIXELS)).save(tmp_path / "mask.png")
    arguments = ("sample", "--student", tmp_path / "run", "--num", 2, "--steps", 1, "--out", tmp_path / "drawn")
    assert command(*arguments, "--inpaint", tmp_path / "a.png", "--mask", tmp_path / "mask.png")[0] == 0
    assert command(*arguments, "--interpolate", tmp_path / "a.png", tmp_path / "a.png")[0] == 0


@pytest.mark.parametrize("recipe", ["ffhq", "lhq", "afhq"])
def test_a_dry_run_knows_sizes_without_pictures_or_weights(recipe, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    code, out, err = command("fit", "--recipe", f"lediflow/{recipe}", "--dry-run")
    assert code == 3 and "learned prior: 43.08 M parameters" in out and "samples of shape (4, 32, 32)" in out, err
    missing = out.strip().splitlines()[-1]
    assert (
        missing.startswith("missing on this machine: ")
        and f"data.images.root: .data/{recipe}: there is no such folder" in missing
    )
    assert "data.autoencoder.source: 'stabilityai/sdxl-vae': not on this machine" in missing

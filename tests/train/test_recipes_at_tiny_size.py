"""Every recipe for a pretrained teacher, changed by a +tiny file alone, on the real classes at tiny size.

Pictures on disk -> latents -> student -> exported folder -> samples.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import flowmap
from flowmap.export import export
from flowmap.nets.edm import ADM
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import save_student
from tests.support.tiny_pipelines import WORDS, save, two_towers

TINY = """
data: {{images: {images}{parts}, held_out: 4, reference_images: 8, batch_size: 4, global_batch_size: 4}}
teacher: {{card: {card}}}
objective: {{warmup_steps: 1}}
trainer: {{steps: 2, devices: 1, strategy: auto, precision: "32", accelerator: cpu, checkpoint_every_steps: 2}}
metrics: [{{kind: frechet, features: pixels, images: 8}}{clip}]
evaluation: {{teacher_steps: 2, batch_size: 8{captions}}}
log: {{wandb: false, samples_every_steps: 0, grid_images: 4}}
"""
PIXELS = 16


def pictures(folder, count=12):
    """Class folders, and captions beside them."""
    generator = np.random.default_rng(0)
    lines = []
    for i in range(count):
        name = f"{'ab'[i % 2]}/{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(folder / name)
        lines.append({"file_name": name, "text": " ".join(generator.choice(WORDS, 3))})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def edm2_zip(path, size, count=12):
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        labels = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, format="png")
            file.writestr(f"00000/img{i:08d}.png", buffer.getvalue())
            labels.append([f"00000/img{i:08d}.png", i % 3])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def edm2_weights(folder, shape):
    """Two tiny EDM2 networks where the cards of imagenet64 and imagenet512 look for theirs."""
    for size, name in (("s", 0), ("xs", 1)):
        torch.manual_seed(name)
        config = StudentConfig(
            net=EDM2(channels=8, multipliers=(1, 2), num_blocks=1, attention_at=(4,)),
            sampler=Deterministic(), shape=shape, num_classes=3,
            arrival=False, samples=Pixels(clamp=shape[0] == 3),
        )  # fmt: skip
        side = 512 if shape[0] == 4 else 64
        save_student(folder / f"edm2-{size}-imagenet{side}", config, config.build().state_dict(), recipe="", card="")


def coco(path, count=9):
    """Two captions of each picture, as in captions_val2014.json."""
    captions = [" ".join(np.random.default_rng(i).choice(WORDS, 3)) for i in range(2 * count)]
    rows = [{"image_id": i // 2, "id": i, "caption": text} for i, text in enumerate(captions)]
    path.write_text(json.dumps({"annotations": rows}))
    return path


def card(path, source, shape, num_classes=None):
    classes = "" if num_classes is None else f"num_classes: {num_classes}\n"
    path.write_text(f"kind: diffusers\nsource: {source}\nshape: {list(shape)}\n{classes}")
    return path


#          recipe: family, number of latent channels, exported as
PIPELINES = {
    "dit256": "dit", "sd15": "sd", "sd35-medium": "sd3", "sana": "sana", "flux-dev-lora": "flux",
    "z-image-lora": "z_image", "flux2-klein-lora": "flux2", "hunyuan-image-lora": "hunyuan_image",
    "lumina2": "lumina2", "qwen-image-lora": "qwen_image", "auraflow-lora": "aura_flow", "sdxl": "sdxl",
    "pixart-sigma": "pixart",
}  # fmt: skip
SHAPES = {"flux2": (16, 4, 4), "qwen_image": (4, 4, 4)}  # of latents, where they are not (4, 8, 8)
TOKENS = {"lumina2": 50}  # of a prompt with the instruction before it, where they are not 12


def tiny_file(recipe, folder):
    """The +tiny file of that recipe, with all that it names."""
    if recipe in PIPELINES:
        family = PIPELINES[recipe]
        pipe = save(family, folder / "pipe")
        images = f"{{root: {pictures(folder / 'pictures')}, size: {PIXELS}}}"
        parts = f", autoencoder: {{source: {pipe}}}" + (
            f", text: {{source: {pipe}, max_tokens: {TOKENS.get(family, 12)}}}" if family != "dit" else ""
        )
        if family in ("sd", "sdxl"):
            parts = parts.replace(", max_tokens: 12", "")
        where = card(folder / "card.yaml", pipe, SHAPES.get(family, (4, 8, 8)), 10 if family == "dit" else None)
    else:
        shape = (4, 8, 8) if recipe == "imagenet512" else (3, 8, 8)
        edm2_weights(folder / "weights", shape)
        size = PIXELS if recipe == "imagenet512" else 8
        images = f"{{path: {edm2_zip(folder / 'pictures.zip', size)}, size: {size}}}"
        parts = f", autoencoder: {{source: {save('dit', folder / 'pipe') / 'vae'}}}" if recipe == "imagenet512" else ""
        where = f"edm2-s-{recipe}"
    clip = captions = ""
    if ", text: " in parts:
        clip = f", {{kind: clip_score, images: 6, model: {two_towers(folder / 'clip')}}}"
        captions = f", captions: {coco(folder / 'captions_val2014.json')}"
    settings = dict(images=images, parts=parts, card=where, clip=clip, captions=captions)
    (folder / "tiny.yaml").write_text(TINY.format(**settings))
    return folder / "tiny.yaml"


# text and latents with an adapter of diffusers; classes and pixels with a network of our own
QUICK = ("sd35-medium", "imagenet64")


@pytest.mark.parametrize(
    "recipe",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*PIPELINES, "imagenet512") if name not in QUICK),
    ],
)
def test_from_pictures_on_disk_to_an_exported_folder(recipe, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    tiny = tiny_file(recipe, tmp_path)
    code, out, err = command("fit", "--recipe", recipe, f"+{tiny}", "--out", tmp_path / "run")
    assert code == 0 and "teacher 2" in out, err
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = [figures["teacher"], *figures["student"].values()]
    assert all(("clip_score_clip" in row) == (recipe not in ("imagenet64", "imagenet512", "dit256")) for row in rows)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    student = flowmap.load_student(tmp_path / "run")
    cond = {"prompt": "a red cat"} if student.config.text is not None else {"class": 1}
    images = student.sample(3, steps=2, cond=cond, seed=1)
    side = 8 if recipe == "imagenet64" else PIXELS
    assert images.shape == (3, 3, side, side) and images.isfinite().all() and float(images.abs().max()) <= 1
    code, out, err = command(
        "sample", "--student", tmp_path / "run", "--num", 4, "--steps", 1, "--out", tmp_path / "drawn", *words(cond)
    )
    assert code == 0 and (tmp_path / "drawn" / "steps-1.png").is_file(), err
    folder = export(student, tmp_path / "exported", steps=2)
    assert (folder / "model_index.json").is_file() and (folder / "vae").is_dir() == (recipe != "imagenet64")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stored", "precision", "close"),
    [("sd35-medium", "captions", "32", 1e-4), ("sd35-medium", "captions", "bf16", 0.02), ("sana", "trimmed", "32", 0)],
)
def test_a_run_is_the_same_however_its_text_is_stored(recipe, stored, precision, close, tmp_path, monkeypatch, command):
    """Other groups of captions may round otherwise, before half precision; in bf16 the encoders round as well."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    tiny = tiny_file(recipe, tmp_path)
    losses = []
    for kept, workers in (("padded", 0), (stored, 2)):
        settings = [f"data.stored_text={kept}", f"trainer.workers={workers}", f"trainer.precision={precision}"]
        more = ["log.every_steps=1", "trainer.steps=3", "--out", tmp_path / kept]
        code, out, err = command("fit", "--recipe", recipe, f"+{tiny}", *settings, *more)
        assert code == 0, err
        with open(tmp_path / kept / "log.csv", newline="") as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=close)


@pytest.mark.slow
def test_the_adversarial_stage_of_a_large_recipe(tmp_path, monkeypatch, command):
    """The student that imagenet512 leaves is finetuned in latents, by micro-batches, on EDM2's network."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    tiny = tiny_file("imagenet512", tmp_path)
    over = tmp_path / "adversarial.yaml"
    over.write_text(tiny.read_text().replace("objective: {warmup_steps: 1}", "objective: {discriminator: {width: 8}}"))
    settings = [f"+{over}", f"student.overrides=['+{tiny}']", "data.global_batch_size=8"]
    code, out, err = command("fit", "--recipe", "imagenet512-adversarial", *settings, "--out", tmp_path / "run")
    assert code == 0 and [line.split("]")[0] for line in err.splitlines() if line.startswith("[")] == [
        "[1/3",
        "[2/3",
        "[3/3",
    ], err
    assert flowmap.load_student(tmp_path / "run").sample(2, steps=2).shape == (2, 3, PIXELS, PIXELS)


def words(cond):
    return ("--prompt", cond["prompt"]) if "prompt" in cond else ("--class", cond["class"])


@pytest.mark.slow
def test_what_a_prompt_may_be(tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    tiny = tiny_file("sd15", tmp_path)
    assert command("fit", "--recipe", "sd15", f"+{tiny}", "--out", tmp_path / "run")[0] == 0
    student = flowmap.load_student(tmp_path / "run")
    both = student.sample(2, cond={"prompt": ["a red cat", "the dog"]}, seed=3)
    alone = student.sample(2, cond={"prompt": "a red cat"}, seed=3)
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[1], alone[1], atol=1e-4)
    encoded = student.text(["a red cat", "the dog"])
    torch.testing.assert_close(student.sample(2, cond=encoded, seed=3), both, rtol=1e-4, atol=1e-4)
    for cond, says in (
        ({}, "prompt: is required"),
        ({"prompt": ["a"]}, "prompt: 1 given; allowed: one text, or 2 texts"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "a", **encoded}, "come without prompt"),
        ({"class": 1}, "'class' is no condition of this student; allowed: guidance, prompt"),
    ):
        with pytest.raises(ValueError, match=says):
            student.sample(2, cond=cond)
    code, out, err = command("sample", "--student", tmp_path / "run", "--num", 2, "--out", tmp_path / "drawn")
    assert code == 2 and "prompt: is required" in err and len(err.strip().splitlines()) == 1


def test_the_doctor_tries_a_network_that_reads_text(tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    tiny = tiny_file("sd35-medium", tmp_path)
    code, out, err = command("doctor", "--recipe", "sd35-medium", f"+{tiny}")
    assert code == 0 and "choose objective.derivative=dual" in out, err


def test_2_rectified_flow_from_a_published_diffusion_network_and_its_pairs(tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    net = ADM(channels=64, multipliers=(1,), num_blocks=1, attention_at=())
    config = StudentConfig(net=net, sampler=Deterministic(), shape=(3, 8, 8), num_classes=3, arrival=False)
    save_student(tmp_path / "weights" / "edm-imagenet64", config, config.build().state_dict(), recipe="", card="")
    images = f"{{path: {edm2_zip(tmp_path / 'pictures.zip', 8)}, size: 8}}"
    tiny = TINY.format(images=images, parts="", card="edm-imagenet64", clip="", captions="")
    tiny = tiny.replace("objective: {warmup_steps: 1}", "objective: {distance: {net: random_conv}}")
    (tmp_path / "tiny.yaml").write_text(tiny + "coupling: {num: 8, solver: {steps: 3}}\n")
    code, out, err = command(
        "fit", "--recipe", "rfpp/imagenet64", f"+{tmp_path / 'tiny.yaml'}", "--out", tmp_path / "run"
    )
    assert code == 0 and "student 1" in out, err
    index = json.loads(next((tmp_path / "runs").glob("pairs-*/index.json")).read_text())
    assert index["nfe"] == 5 and index["rows"] == 8  # Heun's three steps on EDM's grid, the last one Euler's
    student = flowmap.load_student(tmp_path / "run")
    assert not student.config.arrival and student.sample(3, steps=2, cond={"class": 1}).shape == (3, 3, 8, 8)

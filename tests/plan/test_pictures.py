"""What `fit` and its dry run say of pictures before anything is trained, and what they refuse."""

import pytest
from PIL import Image

from flowmap.plan.plan import Encoding, plan
from flowmap.recipe import read_recipe

RECIPE = """
data: {{kind: encoded, images: {{kind: folder, root: {root}/pictures, size: 8}}, held_out: 1, reference_images: 2,
  batch_size: 2}}
student: {{kind: dit, preset: nano, patch: 2}}
objective: {{kind: flow_matching}}
trainer: {{steps: 1, accelerator: cpu}}
evaluation: {{batch_size: 8}}
log: {{wandb: false, grid_images: 4}}
"""
AUTOENCODER = """
data: {{kind: folder, root: {root}/pictures, size: 8}}
student: {{kind: autoencoder_kl, channels: [8, 8], latent_channels: 2, groups: 4}}
objective: {{kind: reconstruction}}
trainer: {{steps: 2, accelerator: cpu}}
log: {{wandb: false}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    for i, name in enumerate(("0/a.png", "1/b.png", "1/c.png", "__MACOSX/x.png")):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "1" / "d.heic").write_bytes(b"no picture")
    for name, text in (("r", RECIPE), ("ae", AUTOENCODER)):
        (tmp_path / f"{name}.yaml").write_text(text.format(root=tmp_path))
    return tmp_path


def test_the_dry_run_and_fit_say_what_is_left_out(place, command):
    hidden, other = "skipped: 1 hidden: __MACOSX", "skipped: 1 unsupported files (.heic): 1/d.heic"
    code, out, err = command("fit", "--recipe", place / "r.yaml", "--dry-run")
    assert code == 0 and "3 pictures, 2 classes\n" in out and hidden in out and other in out, err
    code, _, err = command("fit", "--recipe", place / "r.yaml")
    assert code == 0 and err.index("3 pictures, 2 classes\n") < err.index(hidden) < err.index("1 steps ->")
    for dry in ((), ("--dry-run",)):  # the encoding is there by now
        code, out, err = command("fit", "--recipe", place / "r.yaml", *dry)
        assert code == 0 and hidden in out + err and other in out + err


def test_captions_that_no_picture_has_are_refused_before_anything_is_trained(place, command):
    overrides = (
        f"+data.autoencoder={{recipe: {place}/ae.yaml}}",
        "+data.text={kind: pipeline, source: nowhere/nothing}",
    )
    for dry in ((), ("--dry-run",)):
        code, _, err = command("fit", "--recipe", place / "r.yaml", *(one.lstrip("+") for one in overrides), *dry)
        assert code == 2 and "Traceback" not in err
        assert (
            "r: data.text: the recipe reads captions and no picture has one: captions are read from metadata.jsonl"
            in err
        )
    assert not (place / "runs").exists()


def test_metadata_that_cannot_be_read_is_refused_by_the_dry_run(place, command):
    (place / "pictures" / "metadata.jsonl").write_bytes(b"\xff")
    code, _, err = command("fit", "--recipe", place / "r.yaml", "--dry-run")
    assert code == 2 and "metadata.jsonl:1: is not UTF-8" in err and "Traceback" not in err


def test_an_encoding_of_before_is_not_continued_but_begun_elsewhere(place, monkeypatch):
    folder = next(
        stage for stage in plan(read_recipe(place / "r.yaml"), place / "run") if isinstance(stage, Encoding)
    ).folder
    monkeypatch.setattr("flowmap.plan.data_folders.READER", "1")
    assert (
        folder
        != next(
            stage for stage in plan(read_recipe(place / "r.yaml"), place / "run") if isinstance(stage, Encoding)
        ).folder
    )

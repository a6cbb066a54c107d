"""Class names go from a folder's names to the encoding, student, command line, cards and the exported pipeline."""

import json
import shutil

import pytest
import torch
from PIL import Image

from flowmap.base.files import write_tensors
from flowmap.cli import main
from flowmap.data import Dataset, Latents
from flowmap.data.images.builtin import FASHION_CLASSES, Digits
from flowmap.data.images.folder import Folder
from flowmap.export import export
from flowmap.nets import MLP, DiT
from flowmap.recipe import read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.conditions import class_of
from flowmap.student.config import StudentConfig
from flowmap.student.config_file import read_config
from flowmap.student.folder import load_student, save_student
from flowmap.train.card import model_card
from tests.export.alone import shaken
from tests.support.encoding import spec

NAMES = ("circle", "square", "triangle")


def config(**more):
    return StudentConfig(DiT(preset="nano"), Deterministic(), (1, 8, 8), num_classes=3, class_names=NAMES, **more)


@pytest.fixture
def folder(tmp_path):
    student = shaken(config())
    save_student(
        tmp_path / "student", student.config, student.flow_map.state_dict(), recipe="name: shapes\n", card="# shapes\n"
    )
    return tmp_path / "student"


def test_data_sets_know_their_classes(tmp_path):
    for name in ("b", "a"):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    assert Folder(root=str(tmp_path), size=8, held_out=1).build().class_names == ("a", "b")
    assert Digits().build().class_names == tuple("0123456789") and len(FASHION_CLASSES) == 10


def test_an_encoding_keeps_them(tmp_path):
    pytest.importorskip("datasets")
    from flowmap.prepare.encode import encode

    encode(spec(), tmp_path)
    assert spec(tmp_path).build().class_names == ("a", "b", "c")


def test_a_run_of_the_digits_has_them(tmp_path, monkeypatch):
    from flowmap.build.data import build_data
    from flowmap.build.student import student_config
    from flowmap.plan.plan import resolve

    recipe = read_recipe("digits-teacher")
    run = resolve(recipe)
    assert student_config(run, build_data(run), None).class_names == tuple("0123456789")


def test_the_config_has_id2label_and_comes_back(folder):
    told = json.loads((folder / "config.json").read_text())
    assert told["id2label"] == {"0": "circle", "1": "square", "2": "triangle"} and "class_names" not in told
    assert read_config(folder / "config.json") == config()
    torn = {"0": "a", "2": "b", "3": "c"}
    for bad, says in (
        (torn, "id2label"),
        (["a"], "id2label"),
        ({"0": "a"}, "class_names: 3 classes"),
        ({"0": 1}, "3 classes"),
    ):
        (folder / "config.json").write_text(json.dumps(told | {"id2label": bad}))
        with pytest.raises(ValueError, match=says):
            read_config(folder / "config.json")
    del told["id2label"]  # as flowmap 0.1 wrote it
    (folder / "config.json").write_text(json.dumps(told))
    assert read_config(folder / "config.json").class_names is None


def test_a_student_takes_names(folder):
    student = load_student(folder)
    by_name = student.sample(4, cond={"class": ["square", "circle", 2, "square"]}, seed=3)
    assert torch.equal(by_name, student.sample(4, cond={"class": [1, 0, 2, 1]}, seed=3))
    assert torch.equal(student.sample(2, cond={"class": "triangle"}), student.sample(2, cond={"class": 2}))
    with pytest.raises(
        ValueError, match="class: no class 'squar', did you mean 'square'.; there are: circle, square, triangle"
    ):
        student.sample(1, cond={"class": "squar"})
    with pytest.raises(ValueError, match="knows no names"):
        shaken(StudentConfig(MLP(width=8, depth=1), Deterministic(), (2,), num_classes=3)).sample(
            1, cond={"class": "square"}
        )


def test_the_command_line_takes_names(folder, tmp_path, capsys):
    call = ["sample", "--student", str(folder), "--steps", "1", "--num", "2", "--out"]
    assert (
        main([*call, str(tmp_path / "named"), "--class", "square"])
        == main([*call, str(tmp_path / "numbered"), "--class", "1"])
        == 0
    )
    assert (tmp_path / "named" / "steps-1.png").read_bytes() == (tmp_path / "numbered" / "steps-1.png").read_bytes()
    capsys.readouterr()
    assert main([*call, str(tmp_path / "none"), "--class", "sqare"]) == 2
    assert "did you mean 'square'" in capsys.readouterr().err
    assert [class_of(given, ("2", "1")) for given in ("1", "2", "0", "-1", "x", None)] == ["1", "2", 0, -1, "x", None]


def test_cards_and_the_exported_pipeline_have_them(folder, tmp_path):
    from diffusers import DiffusionPipeline

    student = load_student(folder)
    assert "Classes: 0 circle, 1 square, 2 triangle." in model_card(read_recipe("digits"), config(), None)
    written = export(student, tmp_path / "exported", steps=1)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Classes: 0 circle, 1 square, 2 triangle." in card and 'class_labels=["circle", "square"]' in card, written
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert pipe.config.id2label == {"0": "circle", "1": "square", "2": "triangle"}
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    named, numbered = (
        pipe(class_labels=labels, latents=noise, output_type="pt").images
        for labels in (["square", "circle", 2], [1, 0, 2])
    )
    assert torch.equal(named, numbered)
    with pytest.raises(ValueError, match="no class 'oval'; there are: circle, square, triangle"):
        pipe(class_labels="oval", latents=noise)
    shutil.rmtree(tmp_path / "exported")


@pytest.mark.parametrize("label", [10, 99, -2])
def test_labels_out_of_range_are_refused(tmp_path, label):
    x0, labels = torch.zeros(6, 1, 4, 4), torch.tensor([0, 9, -1, 3, label, 1])
    with pytest.raises(ValueError, match=f"training sample 4 has label {label}, not one of 0..9"):
        Dataset("x", x0, x0[:0], labels, labels[:0], num_classes=10)
    with pytest.raises(ValueError, match=f"held-out sample 4 has label {label}"):
        Dataset("x", x0, x0, labels[:4].repeat(2)[:6], labels, num_classes=10)
    write_tensors(tmp_path / "a.safetensors", {"x0": x0, "class": labels})
    with pytest.raises(ValueError, match=f"label {label}"):
        Latents(root=str(tmp_path), num_classes=10).build()

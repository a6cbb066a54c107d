"""Exports are written completely or not at all, have a stamp, and never replace other folders; also by command."""

from __future__ import annotations

import json

import pytest

from flowmap.export import export
from flowmap.export.folder import STAMP, whole_folder
from flowmap.nets import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from tests.conftest import bytes_of
from tests.export.alone import shaken
from tests.support.hub import standing_in

pytest.importorskip("diffusers")


def student(**more):
    return shaken(StudentConfig(MLP(width=8, depth=1), Deterministic(), (2,), samples=Pixels(clamp=False), **more))


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    out = tmp_path / "out"
    for made in (False, True):
        if made:
            export(student(recipe="first"), out)
        before = bytes_of(tmp_path)
        with pytest.raises(RuntimeError), whole_folder(out, {}, overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
        assert bytes_of(tmp_path) == before


def test_only_an_earlier_export_is_replaced_and_only_when_asked(tmp_path):
    out = tmp_path / "out"
    export(student(recipe="first"), out)
    with pytest.raises(ValueError, match="'first'; --overwrite"):
        export(student(recipe="second"), out)
    export(student(recipe="second"), out, to="torch", steps=1, overwrite=True)
    assert json.loads((out / STAMP).read_text())["recipe"] == "second" and not (out / "model_index.json").exists()
    (out / STAMP).unlink()
    with pytest.raises(ValueError, match="no export"):
        export(student(), out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="no folder"):
        export(student(), tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"to": "gguf"}, "diffusers, torch, onnx, lora, lora-peft, lora-comfyui"),
        ({"to": "lora"}, "no LoRA student"),
        ({"steps": 0}, "steps"),
        ({"guidance": 2.0}, "not trained"),
        ({"to": "torch", "custom": True}, "--custom"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        export(student(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_run_with_its_card(finished, tmp_path, command):
    code, out, err = command("export", "--student", finished, "--to", "torch", "--out", tmp_path / "p", "--steps", 2)
    assert code == 0 and out.strip() == str(tmp_path / "p") and (tmp_path / "p" / "program.pt2").is_file(), err
    card = (tmp_path / "p" / "README.md").read_text()
    assert (
        "# tiny\n" in card and "teacher: exact" in card and "20 training steps" in card and "2 steps: unrolled" in card
    )
    assert "licence of the teacher: " in card and "student, 1 step" in card, "the figures of the student's own card"
    code, out, err = command("export", "--student", finished, "--out", tmp_path / "p")
    assert code == 2 and err.count("\n") == 1 and "--overwrite" in err
    code, _, err = command("export", "--student", finished, "--out", tmp_path / "p", "--overwrite", "--no-text")
    assert code == 0 and (tmp_path / "p" / "pipeline.py").is_file() and not (tmp_path / "p" / "program.pt2").exists(), (
        err
    )


def test_push_uploads_the_folder_and_nothing_else(finished, tmp_path, command, monkeypatch):
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        code, out, err = command("export", "--student", finished, "--out", tmp_path / "p", "--push", "owner/name")
        assert code == 0 and out.split()[0] == str(tmp_path / "p") and "owner/name" in out.split()[1], err
        here = {path.relative_to(tmp_path / "p").as_posix(): path for path in (tmp_path / "p").rglob("*")}
        assert hub.files("owner/name") == {name: path.read_bytes() for name, path in here.items() if path.is_file()}
        code, _, err = command("export", "--student", finished, "--out", tmp_path / "q", "--push", "name")
        assert code == 2 and "owner/name" in err and not (tmp_path / "q").exists() and len(hub.created) == 1
        hub.refused["owner/closed"] = "forbidden"
        code, _, err = command("export", "--student", finished, "--out", tmp_path / "r", "--push", "owner/closed")
        assert code == 1 and f"--push: {tmp_path / 'r'} is written: owner/closed was not uploaded to" in err

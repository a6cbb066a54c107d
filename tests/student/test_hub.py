"""A student in a folder and on a hub: what was written is what is loaded, and what is refused is one line."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

import flowmap
from flowmap.nets import DiT
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import local_folder
from tests.support.hub import standing_in

NAMES = ("circle", "square", "triangle")


def made(seed: int = 0) -> Student:
    torch.manual_seed(seed)
    net = DiT(preset="nano", depth=1, width=16, heads=2, patch=2)
    config = StudentConfig(
        net, Deterministic(steps=(1, 2)), (3, 4, 6), num_classes=3, class_names=NAMES, guidance=(1.0, 3.0, 1.5)
    )
    flow_map = config.build().eval().requires_grad_(False)
    for p in flow_map.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return Student(config, flow_map)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with standing_in(monkeypatch, tmp_path / "cache") as found:
        yield found


def same(student: Student, other: Student) -> bool:
    return torch.equal(student.sample(5, steps=2), other.sample(5, steps=2)) and student.config == other.config


def test_a_saved_student_is_the_student(tmp_path):
    student = made()
    folder = student.save_pretrained(tmp_path / "student")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "recipe.yaml",
    ]  # fmt: skip
    loaded = Student.from_pretrained(folder)
    assert same(student, loaded) and same(student, flowmap.load_student(folder))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nmore\n")
    assert (loaded.save_pretrained(tmp_path / "copy") / "README.md").read_text() == card + "\nmore\n"
    loaded.save_pretrained(folder)
    assert same(student, load_student(folder)), "its own folder can be written again"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"folder: .* has notes\.txt"):
        student.save_pretrained(tmp_path / "other")


def test_a_pushed_student_is_loaded_by_its_name(hub, tmp_path):
    student = made()
    assert "owner/name" in student.push_to_hub("owner/name", private=True, pictures=6)
    assert hub.created[0]["visibility"] == "private" and set(hub.files("owner/name")) == {
        "README.md", "config.json", "model.safetensors", "recipe.yaml", "samples.png",
    }  # fmt: skip
    loaded = load_student("owner/name")
    assert same(student, loaded)
    card = hub.files("owner/name")["README.md"].decode()
    assert 'load_student("owner/name")' in card and "](samples.png)" in card and "0 circle, 1 square" in card
    assert set(hub.validated) == {card}, "the hub has checked its metadata"
    picture = Image.open(io.BytesIO(hub.files("owner/name")["samples.png"]))
    assert picture.width > 6 * 48 and picture.height > 2 * 30, "a row at each number of steps"


def test_a_revision_is_that_commit(hub):
    first, second = made(), made(1)
    first.push_to_hub("owner/name", pictures=0)
    hub.commits["owner/name"]["v1"] = dict(hub.files("owner/name"))
    second.push_to_hub("owner/name", pictures=0)
    sha = hub.sha("owner/name", "v1")
    assert same(second, load_student("owner/name")) and same(first, load_student("owner/name", revision="v1"))
    assert same(first, Student.from_pretrained("owner/name", revision=sha))
    with pytest.raises(ValueError, match="^student: 'owner/name' .* at revision v2: it has no such revision$"):
        load_student("owner/name", revision="v2")


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    hub.refused |= {"owner/gated": "gated", "owner/closed": "forbidden"}
    for name, why in {
        "owner/gated": "it is gated: accept its terms on its page of the hub, then log in",
        "owner/none": "there is no such repository, or it is private: log in",
    }.items():
        with pytest.raises(ValueError, match=f"^student: '{name}' is no folder, and as a hub id: {why}") as found:
            load_student(name)
        assert "\n" not in str(found.value)
    with pytest.raises(
        RuntimeError, match="^push_to_hub: owner/closed was not uploaded to: the hub does not allow"
    ) as found:
        made().push_to_hub("owner/closed", pictures=0)
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="^push_to_hub: 'name' is not a repository; allowed: owner/name$"):
        made().push_to_hub("name")
    with pytest.raises(ValueError, match="^revision: 'v1' was given, but .* is a local path$"):
        load_student(made().save_pretrained(tmp_path / "student"), revision="v1")


def test_offline_the_cache_is_enough_and_anything_else_one_line(hub, monkeypatch):
    from huggingface_hub import constants

    student = made()
    student.push_to_hub("owner/name", pictures=0)
    load_student("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(student, load_student("owner/name"))
    with pytest.raises(
        ValueError, match="^student: 'owner/other' .*: it is not in the cache, and HF_HUB_OFFLINE is set$"
    ):
        load_student("owner/other")
    with pytest.raises(RuntimeError, match="^push_to_hub: owner/name was not uploaded to: HF_HUB_OFFLINE is set$"):
        student.push_to_hub("owner/name", pictures=0)


def test_a_hub_that_cannot_be_reached_is_one_line(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(ValueError, match="it is not in the cache, and the hub cannot be reached") as found:
        load_student("owner/name")
    assert "\n" not in str(found.value)
    with pytest.raises(RuntimeError, match="^push_to_hub: owner/name was not uploaded to: ") as found:
        made().push_to_hub("owner/name", pictures=0)
    assert "\n" not in str(found.value)


def test_a_teachers_pipeline_is_refused_in_the_same_words(hub):
    hub.refused["owner/model"] = "gated"
    with pytest.raises(ValueError, match="^text.source: 'owner/model' is no folder, and as a hub id: it is gated"):
        local_folder("owner/model", None, "text.source", ("*.json",))

"""Encoding real-world folders of pictures: files that are left out are reported first.

Captions that no picture has are refused.
"""

import json
import os
from dataclasses import replace

import pytest
from PIL import Image

from flowmap.data.images import survey
from flowmap.data.images.folder import FolderImages
from flowmap.prepare.encode import encode
from tests.support.encoding import Letters, spec

pytest.importorskip("pyarrow")


@pytest.fixture
def root(tmp_path):
    """Class folders 1, 2 and 10, the last without a usable picture; a caption for one of four pictures; stray files."""
    root = tmp_path / "pictures"
    for i, name in enumerate(("1/a.png", "1/b.png", "2/c.png", "10/d.png", ".ipynb_checkpoints/a.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(root / name)
    (root / "10" / "d.png").write_bytes(b"no picture")
    (root / "2" / "e.heic").write_bytes(b"no picture")
    (root / "1" / "a.txt").write_text("one")
    (root / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "gone"}\n')
    return root


def of(root, **more):
    return spec(images=FolderImages(root=str(root), size=8), held_out=1, reference_images=2, **more)


def test_what_is_left_out_is_counted_by_reason_and_said(root, tmp_path):
    said = []
    index = encode(of(root), tmp_path / "e", log=said.append)
    assert (
        index["class_names"] == ["1", "2", "10"]
        and index["class_rows"] == {"0": 2, "1": 1}
        and index["num_classes"] == 3
    )
    assert {reason: one["count"] for reason, one in index["skipped"].items()} == {
        "hidden": 1, "unsupported files (.heic)": 1, "captions without a picture": 1
    }  # fmt: skip
    first = said.index("reading the pictures that metrics compare with")
    assert (
        said[0] == "4 pictures, 3 classes, 3 of them without a caption"
        and "skipped: 1 captions without a picture: gone.png" in said[:first]
    )
    assert (
        said[first + 1 :]
        == survey.describe_index(index)
        == survey.describe_index(json.loads((tmp_path / "e" / "index.json").read_text()))
    )
    assert "left out: 1 cannot be read: 10/d.png" in said and "skipped: 1 hidden: .ipynb_checkpoints" in said[first:]
    assert "2 of 3 samples have no caption" in said and "classes without a usable picture: 10" in said


def test_reasons_of_one_kind_are_counted_together():
    index = {
        "left_out": [[f"{i}.png", f"has {i} x 9 pixels"] for i in range(5)],
        "skipped": {},
        "grey": 0,
        "unlabelled": 2,
        "rows": 3,
    }
    index |= {
        "identity": {"text": None},
        "num_classes": 2,
        "class_names": None,
        "class_rows": {"1": 1},
        "missing_captions": 0,
    }
    assert survey.describe_index(index) == [
        "left out: 5 has N x N pixels: 0.png, 1.png, 2.png, ...", "2 of 3 samples have no class",
        "classes without a usable picture: 0",
    ]  # fmt: skip
    assert survey.without_pictures(None, 2**31, []) == []


def test_captions_that_no_picture_has_are_refused_before_anything_is_written(root, tmp_path):
    (root / "1" / "a.txt").unlink()
    with pytest.raises(
        ValueError,
        match="data.text: the recipe reads captions and no picture has one: captions are read from metadata.jsonl",
    ):
        encode(of(root), tmp_path / "e")
    assert not (tmp_path / "e").exists()
    with pytest.raises(ValueError, match="captions is false"):
        encode(spec(images=FolderImages(root=str(root), size=8, captions=False)), tmp_path / "e")
    assert encode(of(root, text=None), tmp_path / "e")["rows"] == 3


def test_captions_that_turn_out_to_be_none_are_refused_before_training(root, tmp_path):
    (root / "1" / "a.txt").write_text(" \n")  # that it is blank is known when it is read
    with pytest.raises(ValueError, match="none of 3 usable pictures has one"):
        encode(of(root), tmp_path / "e")
    assert not (tmp_path / "e" / "index.json").exists()


@pytest.mark.parametrize("change", ["a class before the others", "a picture's place", "a caption"])
def test_an_encoding_begun_of_another_order_labels_or_captions_is_not_continued(root, tmp_path, change):
    assert encode(of(root), tmp_path / "e", shard=(1, 2)) is None
    if change == "a caption":
        (root / "2" / "c.txt").write_text("two")
    elif change == "a picture's place":
        os.rename(root / "1" / "b.png", root / "2" / "b.png")
    else:
        (root / "0").mkdir()
    with pytest.raises(
        ValueError,
        match="its source has changed since it was begun: fingerprint: .*choose another folder, or delete this one",
    ):
        encode(of(root), tmp_path / "e", shard=(0, 2))


def test_an_encoding_that_read_pictures_otherwise_is_refused_in_one_line(root, tmp_path):
    """As version 0.1 did: its plan and index say nothing of how pictures were read."""
    encode(of(root), tmp_path / "e")
    for name in ("plan.json", "index.json"):
        told = json.loads((tmp_path / "e" / name).read_text())
        del told["identity"]["source"]["reader"]
        told["identity"]["format"] = 1
        (tmp_path / "e" / name).write_text(json.dumps(told))
    with pytest.raises(
        ValueError,
        match="holds another encoding: identity.format: 1 there, 2 here; choose another folder, or delete this one",
    ):
        encode(of(root), tmp_path / "e")
    with pytest.raises(ValueError, match="is of format 1, .*`flowmap encode` makes it in another folder"):
        replace(of(root), root=str(tmp_path / "e")).build()


def test_names_that_are_not_utf8_do_not_stop_an_encoding(root, tmp_path):
    os.link(root / "1" / "a.png", os.path.join(os.fsencode(root), b"1", b"caf\xe9.png"))
    (root / "metadata.jsonl").write_text('{"file_name": "1/b.png", "text": "half \\ud83d"}')
    index = encode(of(root, text=Letters()), tmp_path / "e")
    assert index["rows"] == 4 and json.loads((tmp_path / "e" / "index.json").read_text()) == index

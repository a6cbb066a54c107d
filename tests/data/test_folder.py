"""A folder of image files as data: what is read, how, and what is left out and said."""

import numpy
import pytest
import torch
from PIL import Image

from flowmap.data import Folder


def picture(path, size=(20, 12), mode="RGB", value=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pictures"
    picture(root / "cats" / "a.png")
    picture(root / "cats" / "deeper" / "b.JPG", size=(8, 30), value=(0, 255, 0))
    picture(root / "dogs" / "c.webp", size=(16, 16), value=(0, 0, 255))
    picture(root / "dogs" / "grey.png", mode="L", value=128)
    return root


def test_classes_are_the_subfolders_in_order(root, capsys):
    data = Folder(root=str(root), size=8).build()
    assert data.shape == (3, 8, 8) and data.num_classes == 2 and data.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.train[0], torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8))
    assert float(data.train.min()) >= -1 and float(data.train.max()) <= 1
    assert "1 of 4 images have grey levels alone" in capsys.readouterr().err


def test_the_largest_centred_square_is_kept(tmp_path):
    pixels = numpy.zeros((4, 12, 3), dtype=numpy.uint8)
    pixels[:, 4:8] = 255
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "wide.png")
    data = Folder(root=str(tmp_path), size=4).build()
    assert bool((data.train == 1).all()) and data.labels is None  # one folder is no class


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (6, 6), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((Folder(root=str(tmp_path), size=3).build().train == 1).all())
    assert Folder(root=str(tmp_path), size=3, channels=1).build().shape == (1, 3, 3)


def test_what_cannot_be_used_is_left_out_counted_and_named(root, capsys, monkeypatch):
    (root / "cats" / "broken.png").write_bytes(b"no picture")
    whole = (root / "dogs" / "c.webp").read_bytes()
    (root / "dogs" / "torn.webp").write_bytes(whole[: len(whole) // 2])
    picture(root / "beside.png")
    (root / "notes.txt").write_text("not an image")
    monkeypatch.setattr("flowmap.data.images.folder.MAX_PIXELS", 1000)
    picture(root / "dogs" / "huge.png", size=(60, 60))
    data = Folder(root=str(root), size=8).build()
    said = capsys.readouterr().err
    assert (
        len(data) == 4
        and "4 images, 4 left out: beside.png lies beside" in said
        and "and 1 more" in said
        and "broken.png" in said
    )


def test_held_out_images_are_drawn_once_for_all(root):
    first, again = (Folder(root=str(root), size=8, held_out=1, seed=3).build() for _ in range(2))
    assert len(first) == 3 and len(first.held_out) == 1 and torch.equal(first.held_out, again.held_out)


MISTAKES = [
    ({"root": "nowhere"}, "no such"),
    ({"held_out": 4}, "holds 4 readable"),
    ({"size": 0}, "size: 0"),
    ({"channels": 2}, "channels: 2"),
]


@pytest.mark.parametrize(("settings", "says"), MISTAKES)
def test_mistakes_are_named(root, settings, says):
    with pytest.raises(ValueError, match=says):
        Folder(**({"root": str(root)} | settings)).build()

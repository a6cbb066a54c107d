"""A folder of pictures as people have them: what is a picture, what a class, and what is neither and counted."""

import io
import json
import os
import unicodedata

import numpy
import pytest
import torch
from PIL import Image

from flowmap.data import Folder
from flowmap.data.images.folder import FolderImages


def picture(path, value=100, suffix=None, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (value, 0, 0)).save(path, suffix, **save)


def folder(root, names, value=100):
    for name in names:
        picture(root / name, value, {".jpe": "JPEG", ".jfif": "JPEG"}.get(os.path.splitext(name)[1].lower()))
    return FolderImages(root=str(root), size=4)


def labels(source):
    return {item.key: item.label for item in source.items()}


ARROW = numpy.zeros((6, 4, 3), dtype=numpy.uint8)
ARROW[:3, :2] = 255  # white in the upper left alone: each of the eight orientations of it is another picture
STORED = {
    1: lambda x: x,
    2: numpy.fliplr,
    3: lambda x: numpy.rot90(x, 2),
    4: numpy.flipud,
    5: lambda x: x.transpose(1, 0, 2),
}
STORED |= {
    6: numpy.rot90,
    7: lambda x: numpy.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: numpy.rot90(x, -1),
}  # how a camera turned so stores it


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif"])
def test_pictures_stand_upright_as_their_exif_says(tmp_path, suffix):
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100}}.get(
        suffix, {}
    )
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        big = numpy.ascontiguousarray(stored(ARROW).repeat(16, 0).repeat(16, 1))
        Image.fromarray(big).save(tmp_path / f"{orientation}.{suffix}", exif=exif, **lossless)
    upright = torch.from_numpy(ARROW[1:5].copy()).permute(2, 0, 1).int()  # the centred square
    items = list(FolderImages(root=str(tmp_path), size=4).items())
    assert len(items) == 8
    for item in items:
        middle = (item.image.int() - upright).abs().float().mean()
        assert middle < 30, (item.key, item.image[0])  # Lanczos over the edge; a wrong turn is 64 or more away


def test_broken_exif_makes_no_picture_unusable(tmp_path):
    picture(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7frubbish")
    (item,) = FolderImages(root=str(tmp_path), size=4).items()
    assert item.problem is None and item.image.shape == (3, 4, 4)


READ = ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "avif"]


def test_every_suffix_that_is_read_in_any_case(tmp_path):
    names = [f"{place}/{suffix}.{case}" for suffix in READ for place, case in (("a", suffix), ("b", suffix.upper()))]
    source = folder(tmp_path, names)
    assert len(list(source.items())) == 2 * len(READ) and all(item.problem is None for item in source.items())
    assert Folder(root=str(tmp_path), size=4, held_out=0).build().labels.bincount().tolist() == [len(READ)] * 2


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), (0, 0, 250)), Image.new("RGB", (6, 6), (250, 0, 0))]
    for suffix in ("gif", "webp", "png", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    for item in FolderImages(root=str(tmp_path), size=4).items():
        assert item.image[:, 1, 1].tolist()[2] > 240 and item.image[0, 1, 1] < 10, item.key


def test_palettes_and_inks_become_colours(tmp_path):
    colours = Image.new("RGB", (6, 6), (250, 5, 10))
    colours.quantize(4).save(tmp_path / "palette.png")
    colours.convert("CMYK").save(tmp_path / "inks.jpg", quality=100)
    colours.quantize(4).save(tmp_path / "clear.gif", transparency=0)
    Image.new("RGBA", (6, 6), (250, 5, 10, 0)).quantize(4).save(tmp_path / "clear.png")
    found = {item.key: item.image[:, 1, 1].int() for item in FolderImages(root=str(tmp_path), size=4).items()}
    for name in ("palette.png", "inks.jpg"):
        assert (found[name] - torch.tensor([250, 5, 10])).abs().max() <= 3, name
    assert found["clear.png"].tolist() == [255] * 3


def test_deeper_pixels_are_left_out_by_name(tmp_path):
    for mode in ("I;16", "I", "F", "I;16B"):
        Image.new(mode, (6, 6)).save(tmp_path / f"{mode.replace(';', '')}.tiff")
    assert all("deeper than 8 bits" in item.problem for item in FolderImages(root=str(tmp_path), size=4).items())


HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/cats/._a.png",
    ".git/x.png",
    "@eaDir/a.png",
    "cats/._a.png",
    "cats/.ipynb/a.png",
]


def test_what_systems_and_tools_leave_is_no_class_and_counted(tmp_path):
    source = folder(tmp_path, ["cats/a.png", "dogs/b.png", *HIDDEN])
    assert source.class_names() == ["cats", "dogs"] and labels(source) == {"cats/a.png": 0, "dogs/b.png": 1}
    assert source.skipped()["hidden"]["count"] == len(HIDDEN)
    assert Folder(root=str(tmp_path), size=4).build().labels.tolist() == [0, 1]


def test_a_linked_class_folder_is_a_class(tmp_path):
    folder(tmp_path / "elsewhere", ["a.png", "deep/b.png"])
    source = folder(tmp_path / "root", ["dogs/c.png"])
    (tmp_path / "root" / "cats").symlink_to(tmp_path / "elsewhere")
    assert labels(source) == {"cats/a.png": 0, "cats/deep/b.png": 0, "dogs/c.png": 1}


def test_links_that_lead_in_circles_end(tmp_path):
    folder(tmp_path, ["cats/a.png", "dogs/b.png"])
    (tmp_path / "cats" / "again").symlink_to(tmp_path / "cats")
    (tmp_path / "dogs" / "up").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    source = FolderImages(root=str(tmp_path), size=4)
    assert list(labels(source)) == ["cats/a.png", "dogs/b.png"] and source.class_names() == ["cats", "dogs"]
    passed = source.skipped()
    assert passed["links to a parent folder"]["count"] == 2 and passed["not regular files"] == {
        "count": 1,
        "first": ["self.png"],
    }


def test_numbered_folders_are_classes_in_the_order_of_their_numbers(tmp_path):
    source = folder(tmp_path, [f"{i}/a.png" for i in range(12)])
    assert source.class_names() == [str(i) for i in range(12)] and labels(source) == {
        f"{i}/a.png": i for i in range(12)
    }
    (tmp_path / "x").mkdir()
    picture(tmp_path / "x" / "a.png")
    assert FolderImages(root=str(tmp_path)).class_names()[:4] == ["0", "1", "10", "11"]  # names, not numbers


@pytest.mark.parametrize("content", ["none", "unreadable", "heic", "broken link"])
def test_a_class_without_a_usable_picture_keeps_its_number(tmp_path, content, capsys):
    folder(tmp_path, ["0/a.png", "2/c.png"])
    (tmp_path / "1").mkdir()
    if content == "unreadable":
        (tmp_path / "1" / "b.png").write_bytes(b"no picture")
    elif content == "heic":
        (tmp_path / "1" / "b.heic").write_bytes(b"some")
    elif content == "broken link":
        (tmp_path / "1" / "b.png").symlink_to("nowhere.png")
    source = FolderImages(root=str(tmp_path), size=4)
    assert source.class_names() == ["0", "1", "2"] and source.num_classes() == 3
    assert Folder(root=str(tmp_path), size=4).build().labels.tolist() == [0, 2]
    assert "classes without a usable picture: 1" in capsys.readouterr().err


def test_a_folder_without_pictures_is_no_class(tmp_path):
    source = folder(tmp_path, ["cats/a.png", "dogs/b.png"])
    for name in ("captions/a.txt", "docs/read.me"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    assert source.class_names() == ["cats", "dogs"]


def test_one_folder_is_no_class_and_leaves_nothing_beside_out(tmp_path):
    source = folder(tmp_path, ["a.png", "more/b.png"])
    (tmp_path / "empty").mkdir()
    assert (
        source.num_classes() is None and [(item.label, item.problem) for item in source.items()] == [(None, None)] * 2
    )


def test_what_is_not_read_is_counted_by_suffix(tmp_path, capsys):
    folder(tmp_path, ["a.png"])
    for name in ("b.heic", "c.HEIC", "d.jxl", "e.json", "noext"):
        (tmp_path / name).write_bytes(b"some")
    passed = FolderImages(root=str(tmp_path)).skipped()
    found = {reason.removeprefix("unsupported files"): one["count"] for reason, one in passed.items()}
    assert found == {" (.heic)": 2, " (.jxl)": 1, " (.json)": 1, "": 1}
    Folder(root=str(tmp_path), size=4).build()
    assert "2 unsupported files (.heic): b.heic, c.HEIC" in capsys.readouterr().err


def test_only_plain_files_are_opened(tmp_path):
    folder(tmp_path, ["a.png"])
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.txt")
    source = FolderImages(root=str(tmp_path), size=4)
    (item,) = source.items()
    assert (
        item.problem == "its caption cannot be read: it is not a regular file"
        and source.skipped()["not regular files"]["count"] == 2
    )


def test_a_folder_that_may_not_be_listed_is_said(tmp_path, monkeypatch):
    folder(tmp_path, ["0/a.png", "1/b.png", "2/c.png"])
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith(f"1{os.sep}"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = FolderImages(root=str(tmp_path), size=4)
    assert source.class_names() == ["0", "1", "2"] and source.skipped()["unreadable folders"] == {
        "count": 1,
        "first": ["1"],
    }


def test_names_that_are_not_utf8_are_told_in_utf8(tmp_path):
    folder(tmp_path, ["a/x.png"])
    for name in (b"b\xff/caf\xe9.png", b"b\xff/bell\x07.png"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.link(tmp_path / "a" / "x.png", path)
    source = FolderImages(root=str(tmp_path), size=4)
    assert labels(source) == {"a/x.png": 0, "b\\xff/bell\\x07.png": 1, "b\\xff/caf\\xe9.png": 1}
    assert all(item.problem is None for item in source.items()) and source.class_names() == ["a", "b\\xff"]


def test_names_of_classes_are_composed_and_keep_their_signs(tmp_path):
    names = [unicodedata.normalize("NFD", "Käse"), "👩\u200d💻", "a\u202eb"]
    source = folder(tmp_path, [f"{name}/a.png" for name in names])
    assert set(source.class_names()) == {unicodedata.normalize("NFC", "Käse"), "👩\u200d💻", "a\\u202eb"}
    folder(tmp_path, [unicodedata.normalize("NFC", "Käse") + "/a.png"])
    assert len(set(FolderImages(root=str(tmp_path)).class_names())) == 4  # two that a person cannot tell apart stay two


def test_the_fingerprint_knows_order_labels_and_captions(tmp_path):
    folder(tmp_path, ["1/a.png", "2/b.png"])

    def mark():
        return FolderImages(root=str(tmp_path)).fingerprint()

    marks = [mark()]
    for change in (
        lambda: (tmp_path / "0").mkdir(),  # a class more, before the others
        lambda: (tmp_path / "1" / "a.txt").write_text("a caption"),
        lambda: (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1/a.png", "text": "another"})),
        lambda: (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1/a.png", "text": "a third"})),
    ):
        change()
        marks.append(mark())
    assert len(set(marks)) == len(marks) and mark() == marks[-1]
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert mark() == marks[-1]


def test_torn_pictures_are_left_out_in_every_format(tmp_path):
    for suffix in READ:
        stream = io.BytesIO()
        kind = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        noise = numpy.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(stream, kind)
        (tmp_path / f"torn.{suffix}").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    assert all(item.problem.startswith("cannot be read") for item in FolderImages(root=str(tmp_path), size=4).items())

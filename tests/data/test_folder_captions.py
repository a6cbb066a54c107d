"""Captions of a folder of pictures: every usual format, and captions that belong to no picture."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from flowmap.data.images.folder import FolderImages

NAMES = ("a/1.png", "a/2.png", "b/deep/3.png")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pictures"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def captions(root):
    return [item.caption for item in FolderImages(root=str(root), size=4).items()]


def skipped(root):
    return {reason: one["count"] for reason, one in FolderImages(root=str(root)).skipped().items()}


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


WAYS = {
    "at the top": {"metadata.jsonl": jsonl(*({"file_name": name, "text": name[-5]} for name in NAMES))},
    "from here": {"metadata.jsonl": jsonl(*({"file_name": f"./{name}", "text": name[-5]} for name in NAMES))},
    "another system's": {
        "metadata.jsonl": jsonl(*({"file_name": name.replace("/", "\\"), "text": name[-5]} for name in NAMES))
    },
    "in subfolders": {
        "a/metadata.jsonl": jsonl({"file_name": "1.png", "text": "1"}, {"file_name": "./2.png", "text": "2"}),
        "b/metadata.csv": "file_name,text\ndeep/3.png,3\n",
    },
    "another key": {"metadata.jsonl": jsonl(*({"image": name, "caption": name[-5]} for name in NAMES))},
    "several": {"metadata.jsonl": jsonl(*({"file_name": name, "text": [name[-5], "more"]} for name in NAMES))},
    "a byte-order mark": {
        "metadata.jsonl": "\ufeff" + jsonl(*({"file_name": name, "text": name[-5]} for name in NAMES))
    },
    "CSV": {"metadata.csv": "label,file_name,text\r\n" + "".join(f'x,{name},"{name[-5]}"\r\n' for name in NAMES)},
    "CSV with a mark": {
        "metadata.csv": "\ufefffile_name,caption\n" + "".join(f"{name},{name[-5]}\n" for name in NAMES)
    },
    "texts": {f"{name[:-4]}.txt": f"\ufeff{name[-5]}\r\n" for name in NAMES},
    "TEXTS": {f"{name[:-4]}.TXT": name[-5] for name in NAMES},
}


@pytest.mark.parametrize("way", WAYS)
def test_captions_are_found(root, way):
    for name, content in WAYS[way].items():
        (root / name).write_text(content, encoding="utf-8", newline="")
    assert captions(root) == ["1", "2", "3"] and skipped(root) == {}
    assert (
        FolderImages(root=str(root)).num_captions() == 3
        and FolderImages(root=str(root), captions=False).num_captions() == 0
    )


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("way", ["metadata.jsonl", "txt"])
def test_names_are_compared_composed(tmp_path, way, forms):
    name, there = (unicodedata.normalize(form, "Käse é.png") for form in forms)
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    if way == "txt":
        (tmp_path / there).with_suffix(".txt").write_text("cheese")
    else:
        (tmp_path / way).write_text(
            json.dumps({"file_name": there, "text": "cheese"}, ensure_ascii=False), encoding="utf-8"
        )
    assert captions(tmp_path) == ["cheese"]


def test_a_quoted_caption_of_several_lines(root):
    (root / "metadata.csv").write_text('file_name,text\na/1.png,"one, or\n""two"""\n')
    assert captions(root) == ['one, or\n"two"', None, None]


def test_captions_of_no_picture_and_captions_twice_are_counted(root):
    rows = [
        ("a/1.png", "one"),
        ("a/9.png", "nine"),
        ("a/1.png", "uno"),
        ("a/1.png", "uno"),
        ("a/2.png", ""),
        ("../x.png", "out"),
    ]
    (root / "metadata.jsonl").write_text(jsonl(*({"file_name": name, "text": text} for name, text in rows)))
    (root / "LICENSE.txt").write_text("free")
    assert captions(root) == ["uno", None, None]
    assert skipped(root) == {
        "captions without a picture": 2,
        "duplicate captions (the last one is used)": 1,
        "metadata lines without a caption": 1,
        "text files without a picture": 1,
    }


BAD = {
    "metadata.jsonl": [
        (b'{"file_name": "a/1.png"}\n\xff\xfe', ":2: is not UTF-8"),
        (b"x" * (2**20 + 1), ":1: has more than"),
        (b"{}", ": line 1 names no picture"),
    ],
    "a/metadata.csv": [
        (b"file_name,text\n1.png,\xe9\n", ":2: is not UTF-8"),
        (b"id,words\n1,a\n", ": line 2 names no picture.*it has id, words"),
    ],
}


@pytest.mark.parametrize(("name", "content", "says"), [(name, *one) for name, every in BAD.items() for one in every])
def test_metadata_that_cannot_be_read_is_named(root, name, content, says):
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}{says}"):
        captions(root)


@pytest.mark.parametrize("name", ["metadata.jsonl", "a/metadata.csv"])
def test_metadata_without_end_is_refused(root, name):
    os.mkfifo(root / name)
    with pytest.raises(ValueError, match=f"{name}.*is not a regular file"):
        captions(root)


def test_texts_without_end_leave_their_pictures_out(root):
    (root / "a/1.txt").symlink_to("/dev/zero")
    os.mkfifo(root / "a/2.txt")
    (root / "b/deep/3.txt").write_bytes(b"x" * (2**20 + 1))
    problems = [item.problem for item in FolderImages(root=str(root)).items()]
    assert problems == ["its caption cannot be read: it is not a regular file"] * 2 + [
        "its caption cannot be read: it has more than 1048576 bytes"
    ]


def test_a_caption_that_utf8_cannot_hold_is_mended(root):
    (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "half \\ud83d of a pair"}')
    assert captions(root)[0] == "half ? of a pair"


def test_a_caption_without_a_key_that_is_read_tells_the_keys(root):
    (root / "metadata.jsonl").write_text(jsonl(*({"file_name": name, "title": "t", "words": 3} for name in NAMES)))
    source = FolderImages(root=str(root))
    assert source.num_captions() == 0 and "the metadata has the keys file_name, title, words" in source.captions_hint

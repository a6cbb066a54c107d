"""Captions of an evaluation from a file: lines, COCO's annotations, and clear refusals."""

import json

import pytest

from flowmap.data.prompts import read_prompts


def test_one_caption_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\n  a dog \nun éléphant".encode())
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "a dog", "un éléphant"]


def test_of_coco_the_first_caption_of_each_picture(tmp_path):
    rows = [(9, 70, "nine"), (3, 51, "three, second"), (9, 12, " nine,\nfirst "), (3, 50, "three, first")]
    annotations = [{"image_id": image, "id": one, "caption": text} for image, one, text in rows]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": annotations}))
    assert read_prompts(path) == ["three, first", "nine, first"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "has no caption"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.json", b"{}", 'is not COCO\'s {"annotations"'),
        ("a.json", b'{"annotations": []}', "has no caption"),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": 2}]}', r"annotations\[0\] is not COCO's"),
        ("a.json", b"[1", "is not JSON"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no such file"):
        read_prompts(tmp_path / "none.json")

"""The captions that a text-to-image student is measured on, from a file: one a line, or COCO's captions_*.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmap.base.files import read_json
from flowmap.data.safe_files import lines_of


def read_prompts(path: str | Path) -> list[str]:
    """The captions of the file, in a fixed order. ValueError names the file if it has none.

    Of a text file each line that is not empty. Of COCO's annotations one caption of each picture, the one with the
    smallest id, in the order of the pictures' ids.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    if str(path).lower().endswith(".json"):
        found = _of_coco(Path(path))
    else:
        found = [text for line in lines_of(path) if (text := line.strip())]
    if not found:
        raise ValueError(f"{path}: has no caption")
    return found


def _of_coco(path: Path) -> list[str]:
    rows = read_json(path).get("annotations")
    form = '{"annotations": [{"image_id": 1, "id": 1, "caption": "..."}, ...]}'
    if not isinstance(rows, list):
        raise ValueError(f"{path}: is not COCO's {form}")
    chosen: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(rows):
        if not _is_annotation(row):
            raise ValueError(f"{path}: annotations[{number}] is not COCO's {form}")
        image, one = row["image_id"], (row["id"], row["caption"])
        chosen[image] = min(chosen.get(image, one), one)
    return [" ".join(chosen[image][1].split()) for image in sorted(chosen)]


def _is_annotation(row: Any) -> bool:
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("image_id"), int)
        and isinstance(row.get("id"), int)
        and isinstance(row.get("caption"), str)
        and bool(row["caption"].strip())
    )

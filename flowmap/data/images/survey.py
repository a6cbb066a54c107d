"""A summary of a source's pictures before training: how many there are, and how many are left out for which reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flowmap.data.images.listing import Tally
from flowmap.data.sources import ImageSource

MAX_NAMED = 10  # classes that a line names
MAX_CLASSES = 10**6  # a label of 2**31 - 1 does not make 2**31 classes to search


def check_captions(images: ImageSource, wants_text: bool) -> None:
    """Raise ValueError where the recipe reads text and the source knows, without decoding pictures, that it has no
    captions.
    """
    if wants_text and images.num_captions() == 0 and images.length() != 0:
        raise ValueError(f"data.text: the recipe reads captions and no picture has one: {images.captions_hint}")


def describe_source(images: ImageSource, wants_text: bool) -> list[str]:
    """What the source knows without decoding pictures, a line each."""
    length = images.length()
    if length is None:
        return ["a stream of pictures of unknown length"]
    classes, captions = images.num_classes(), images.num_captions()
    parts = [f"{length} pictures", *([f"{classes} classes"] if classes else [])]
    parts += [f"{length - captions} of them without a caption"] if wants_text and captions is not None else []
    return [", ".join(parts), *_skipped(images.skipped())]


def describe_index(index: Mapping[str, Any]) -> list[str]:
    """What an encoding left out, by reason, from its index; [] where it left nothing out."""
    left_out = Tally()
    for key, reason in index["left_out"]:
        left_out.note(reason_of(reason), key)
    lines = [f"left out: {line}" for line in left_out.lines()] + _skipped(index["skipped"])
    lines += [f"{index[key]} of {index['rows']} samples {what}" for key, what in _counted(index) if index[key]]
    return lines + without_pictures(index["class_names"], index["num_classes"], map(int, index["class_rows"]))


def without_pictures(names: list[str] | None, num_classes: int | None, seen: Iterable[int]) -> list[str]:
    """A line that names the classes without a sample; [] where every class has one."""
    if num_classes is None or num_classes > MAX_CLASSES:
        return []
    there = set(seen)
    lacking = [names[i] if names else str(i) for i in range(num_classes) if i not in there]
    more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
    return [f"classes without a usable picture: {', '.join(lacking[:MAX_NAMED])}{more}"] if lacking else []


def reason_of(problem: str) -> str:
    """The problem without its details: "has 90 x 80 pixels" and "has 70 x 80 pixels" are "has N x N pixels"."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'...'", problem.partition(": ")[0]))


def _skipped(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"skipped: {line}" for line in Tally(found).lines()]


def _counted(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key of the index, words) of the counts to report for samples that were kept."""
    counted = [("grey", "have grey levels alone")]
    counted += [("missing_captions", "have no caption")] if index["identity"]["text"] is not None else []
    return counted + ([("unlabelled", "have no class")] if index["num_classes"] is not None else [])

"""What a person should know of a source's pictures before anything is trained on them: how many there are, and what is not among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flowmap.data.listing import Tally
from flowmap.data.sources import ImageSource

MAX_NAMED = 10  # classes that a line names
MAX_CLASSES = 10**6  # a label of 2**31 does not make so many classes to look through


def check_captions(images: ImageSource, wants_text: bool) -> None:
    """ValueError where texts are wanted and it is known without reading a picture that none has one."""
    if wants_text and images.num_captions() == 0 and images.length() != 0:
        raise ValueError(f"data.text: reads captions, and no picture has one: {images.captions_stand}")


def before(images: ImageSource, wants_text: bool) -> list[str]:
    """What is known without decoding a picture."""
    length = images.length()
    if length is None:
        return ["a stream of pictures, how many is not known before its end"]
    classes, captions = images.num_classes(), images.num_captions()
    parts = [f"{length} pictures", *([f"{classes} classes"] if classes else [])]
    parts += [f"{length - captions} of them without a caption"] if wants_text and captions is not None else []
    return [", ".join(parts), *_passed_over(images.passed_over())]


def after(index: Mapping[str, Any]) -> list[str]:
    """What an encoding's index says is not among its samples, by reason; [] where it leaves nothing out."""
    left_out = Tally()
    for key, reason in index["left_out"]:
        left_out.note(reason_of(reason), key)
    lines = [f"left out: {line}" for line in left_out.lines()] + _passed_over(index["passed_over"])
    lines += [f"{index[key]} of {index['rows']} samples {what}" for key, what in _counted(index) if index[key]]
    return lines + without_pictures(index["class_names"], index["num_classes"], map(int, index["class_rows"]))


def without_pictures(names: list[str] | None, num_classes: int | None, seen: Iterable[int]) -> list[str]:
    """A line that names the classes of which no sample is, where there are any."""
    if num_classes is None or num_classes > MAX_CLASSES:
        return []
    there = set(seen)
    lacking = [names[i] if names else str(i) for i in range(num_classes) if i not in there]
    more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
    return [f"classes without a usable picture: {', '.join(lacking[:MAX_NAMED])}{more}"] if lacking else []


def reason_of(problem: str) -> str:
    """What problems of one kind have in common: "has 90 x 80 pixels" and "has 70 x 80 pixels" are "has N x N pixels"."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'...'", problem.partition(": ")[0]))


def _passed_over(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"passed over: {line}" for line in Tally(found).lines()]


def _counted(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(count, words) of what is among the samples and still worth saying."""
    counted = [("grey", "have grey levels alone")]
    counted += [("missing_captions", "have no caption")] if index["identity"]["text"] is not None else []
    return counted + ([("unlabelled", "have no class")] if index["num_classes"] is not None else [])

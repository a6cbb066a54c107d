"""Sources of pictures: each yields pictures one at a time, in a fixed order, from any position on.

Pictures are data, never code: nothing is unpickled, no path in an archive is followed, and a picture that cannot be
used keeps its position, with the reason.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, Protocol

import torch
from torch import Tensor

from flowmap.base.ranges import Side, check_ranges
from flowmap.data.safe_files import open_regular, printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "AVIF",
)  # by content, whatever the name says: PIL would run Ghostscript on an EPS
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 256 * 2**20  # of one picture inside an archive
TEXT_KEYS = ("text", "caption", "prompt")  # of a line or a file of metadata
READER = (
    "2: upright by EXIF, folders of numbers in their order"  # changes when the same files give other pictures or labels
)


@dataclass(frozen=True)
class Item:
    """The picture at one position: uint8 (C, size, size), or None with the reason in `problem`.

    grey: whether it has grey levels only although colour was requested. key: its name for a person. All texts can be
    encoded as UTF-8.
    """

    image: Tensor | None
    label: int | None
    caption: str | None
    key: str
    problem: str | None = None
    grey: bool = False

    def __post_init__(self):
        object.__setattr__(self, "key", printable(self.key))
        object.__setattr__(self, "problem", self.problem and printable(self.problem))
        object.__setattr__(self, "caption", self.caption and self.caption.encode("utf-8", "replace").decode())


class ImageSource(Protocol):
    """Pictures in a fixed order. A broken or huge one is an Item with a problem, never an exception, so that positions
    stay.
    """

    size: int
    channels: int
    captions_hint: str  # where such a source looks for captions, for error messages

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The items at positions start, start + 1, ... before stop; fewer where the source ends.

        Several threads may read from a source of known length at once.
        """
        ...

    def length(self) -> int | None:
        """How many positions there are; None for a stream."""
        ...

    def num_classes(self) -> int | None: ...

    def class_names(self) -> list[str] | None: ...

    def identity(self) -> dict[str, Any]:
        """Plain values that identify the source; reads nothing."""
        ...

    def fingerprint(self) -> str | None:
        """A text that changes with names, order or labels of pictures; None where that requires reading them."""
        ...

    def skipped(self) -> dict[str, dict[str, Any]]:
        """What is not read and has no position, by reason: {reason: {"count": 2, "first": [at most three names]}}."""
        ...

    def num_captions(self) -> int | None:
        """How many pictures have a caption; None where that is not known without reading them."""
        ...


@dataclass(frozen=True)
class SquareImages:
    """Pictures turned upright by their EXIF orientation, cropped to the largest centred square, scaled to size x size
    pixels.

    channels 3 is RGB, 1 grey levels. Transparency becomes white, and an animation its first frame. A picture that is
    broken, or has more than 64 million pixels or more than 8 bits of grey, is left out and named with the reason.
    """

    size: Side = 64
    channels: Side = 3
    kind: ClassVar[str]
    captions_hint: ClassVar[str] = "this source has no captions"

    def __post_init__(self):
        check_ranges(self)
        check_channels(self.channels)

    def length(self) -> int | None:
        return None

    def num_classes(self) -> int | None:
        return None

    def class_names(self) -> list[str] | None:
        return None

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self), "reader": READER}

    def fingerprint(self) -> str | None:
        return None

    def skipped(self) -> dict[str, dict[str, Any]]:
        return {}

    def num_captions(self) -> int | None:
        return None

    def _item(
        self, file: str | BinaryIO, label: int | None, caption: str | None, key: str, max_pixels: int = MAX_PIXELS
    ) -> Item:
        try:
            image, was_grey = read_picture(file, size=self.size, channels=self.channels, max_pixels=max_pixels)
        except ValueError as error:
            return Item(None, label, caption, key, str(error))
        return Item(image, label, caption, key, grey=was_grey and self.channels == 3)


def read_picture(
    file: str | BinaryIO, *, size: int, channels: int, max_pixels: int = MAX_PIXELS
) -> tuple[Tensor, bool]:
    """uint8 (channels, size, size), and whether the picture has grey levels only. ValueError gives the reason for
    refusal.
    """
    import numpy
    from PIL import Image

    image, was_grey = load_upright(file, max_pixels)
    try:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB" if channels == 3 else "L").resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side), reducing_gap=3.0
        )
    except (OSError, ValueError) as error:  # a mode that has no way to RGB
        raise ValueError(f"cannot be read: {error}") from error
    pixels = torch.from_numpy(numpy.array(square))
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]).contiguous(), was_grey


def load_upright(file: str | BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[Any, bool]:
    """A PIL picture, its first frame, upright by EXIF and on white, and whether it has grey levels only.

    ValueError gives the reason for refusal.
    """
    try:
        with open_regular(file) if isinstance(file, str) else file as content:
            return _decoded(content, max_pixels)
    except _Unusable:
        raise
    except Exception as error:  # a decoder raises anything at all on a broken file
        said = (isinstance(error, OSError) and error.strerror) or re.sub(
            r" ?<[^>]*>", "", str(error)
        )  # <_io.BytesIO object at 0x...>
        raise ValueError(f"cannot be read: {' '.join(said.split()) or type(error).__name__}") from error


def _decoded(content: BinaryIO, max_pixels: int) -> tuple[Any, bool]:
    from PIL import Image, ImageOps

    with Image.open(content, formats=_formats()) as image:
        if image.width * image.height > max_pixels:
            raise _Unusable(f"has {image.width} x {image.height} pixels")
        if image.mode.startswith(("I", "F")):
            raise _Unusable(f"has pixels of mode {image.mode}, deeper than 8 bits")
        image.load()
        with suppress(Exception):  # what describes a picture does not make it unusable
            ImageOps.exif_transpose(image, in_place=True)
        was_grey = image.mode in ("1", "L", "LA")
        found: Image.Image = image
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            found = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return found, was_grey


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


def optional(name: str) -> ModuleType:
    """A package that only some sources need. ValueError explains how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}): pip install 'flowmap-distillation[data]'") from error


def class_names_of(feature: Any) -> list[str] | None:
    """The names of the classes in a column of a Hugging Face data set; None where the column has none."""
    found = isinstance(feature, optional("datasets").ClassLabel) and feature.names
    return list(found) if found else None


def escapes(name: str) -> bool:
    """Whether a name inside an archive is a path out of it: absolute, or up through `..`."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":"


def text_of(row: Mapping[str, Any], keys: tuple[str, ...] = TEXT_KEYS) -> str | None:
    """The first text among those keys of a row of metadata, of several the first; None where there is none."""
    found = (row.get(key) for key in keys)
    texts = (value[0] if isinstance(value, (list, tuple)) and value else value for value in found)
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def as_label(value: Any) -> int | None:
    """The class of a picture; ValueError unless it is a whole number from 0 or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"its label is {str(value)[:40]!r}, not a whole number from 0")
    return value


def check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels: {channels} is not one of 1 (grey levels), 3 (RGB)")


class _Unusable(ValueError):
    """A picture that can be read but not used."""

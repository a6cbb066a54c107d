"""Text to image by the papers' protocol: COCO-2014, 30,000 captions, FID at 256 pixels and the CLIP score.

One caption of each of 30,000 pictures of the validation set, drawn once; the generated pictures are cropped to the
centred square and scaled to 256, as the real ones are, and their features compared with those of the whole validation
set. Source of the use for one-step models: InstaFlow (arXiv:2309.06380), whose figures name it COCO2014-30k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.files import text_digest, write_text
from flowmap.base.images import steps_label
from flowmap.base.schema import short_hash
from flowmap.data.dataset import looked_at
from flowmap.data.images.folder import FolderImages
from flowmap.data.prompts import read_prompts
from flowmap.metrics import CLIPScore
from flowmap.metrics.clip_score import score_key
from flowmap.metrics.features import check_features, short_name

NAME = "coco30k"
PICTURES, ANNOTATIONS = "val2014", "captions_val2014.json"
PLACES = (f"annotations/{ANNOTATIONS}", ANNOTATIONS)


@dataclass(frozen=True)
class Coco:
    """The protocol on a folder with val2014/ and captions_val2014.json (also in annotations/).

    images, size: the number of captions, and the side of the pictures whose features are compared. features, weights:
    the network of the Frechet distance and its weights. clip: the model of the CLIP score; None for none.
    """

    root: Path
    images: int = 30_000
    size: int = 256
    features: str = "inception"
    weights: str | None = None
    clip: str | None = CLIPScore.model

    @property
    def annotations(self) -> Path:
        """The file of all captions. ValueError if it is not there."""
        found = next((self.root / place for place in PLACES if (self.root / place).is_file()), None)
        if found is None:
            raise ValueError(f"--coco: {self.root} has no {ANNOTATIONS}, also not in annotations/")
        return found

    def lacking(self) -> list[str]:
        """What is not on this machine, a line for each; no network is loaded."""
        found = []
        for look in (self.captions, self._check_pictures, self._check_features, self._check_clip):
            try:
                look()
            except ValueError as error:
                found.append(str(error))
        return found

    def captions(self) -> list[str]:
        """The captions, one of each picture, in the order of the samples that are drawn from them.

        It is the order of evaluation.captions, so that recipes with that file measure the same samples.
        """
        texts = read_prompts(self.annotations)
        if len(texts) < self.images:
            raise ValueError(f"--images: {self.images} captions are wanted, and {self.annotations} has {len(texts)}")
        return [texts[i] for i in looked_at(torch.arange(self.images), len(texts)).tolist()]

    def write_captions(self, path: Path) -> None:
        """Write the captions, one a line, as the record of what was measured."""
        write_text(path, self._lines())

    def wrote(self, path: Path) -> bool:
        """Whether the file is that record, byte by byte."""
        return path.read_bytes() == self._lines().encode()

    def _lines(self) -> str:
        return "\n".join(self.captions()) + "\n"

    @property
    def reference(self) -> FolderImages:
        """The real pictures, as their features are taken."""
        return FolderImages(self.size, 3, str(self.root / PICTURES), classes=False, captions=False)

    @property
    def key(self) -> str:
        return f"frechet_{short_name(self.features)}"

    @property
    def clip_key(self) -> str | None:
        return None if self.clip is None else score_key(self.clip)

    def stamp(self) -> dict[str, Any]:
        """What figures by the protocol depend on, beside the samples and the real pictures."""
        settings = {name: getattr(self, name) for name in ("images", "size", "features", "weights", "clip")}
        return {**settings, "captions": text_digest("\n".join(self.captions()))}

    def _check_pictures(self) -> None:
        if not (self.root / PICTURES).is_dir():
            raise ValueError(f"--coco: {self.root} has no folder {PICTURES} with the pictures")

    def _check_features(self) -> None:
        check_features(self.features, self.weights)

    def _check_clip(self) -> None:
        if self.clip is not None:
            CLIPScore(model=self.clip).check()


def squared(x: Tensor, size: int) -> Tensor:
    """The centred squares of pictures x (B, C, H, W) in [-1, 1], scaled to size x size by the bicubic filter with
    antialiasing.
    """
    side = min(x.shape[-2:])
    top, left = ((length - side) // 2 for length in x.shape[-2:])
    x = x[..., top : top + side, left : left + side].float()
    if side == size:
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def calls_of(coco: Coco, rows: Mapping[str, int]) -> Iterator[str]:
    """A line on the network calls of each row; rows: calls for each sample by the row's label."""
    for label, calls in rows.items():
        yield f"{label}: {coco.images:,} samples, {coco.images * calls:,} network calls"
    yield f"in all {coco.images * sum(rows.values()):,} network calls"


def figures_page(measured: Mapping[str, Any], names: list[str]) -> str:
    """The figures as a table of Markdown with a sentence on how they were measured, for a model card."""
    settings = measured["protocol"]
    rows = {steps_label("student", int(k)): row for k, row in measured["student"].items()}
    if "teacher" in measured:
        rows[steps_label("teacher", measured["teacher"]["steps"])] = measured["teacher"]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {label} | {' | '.join(f'{row[name]:.4g}' for name in names)} |" for label, row in rows.items()]
    how = (
        f"COCO-2014: {settings['images']:,} captions of the validation set, one of each picture; Frechet distance in "
        f"`{settings['features']}` at {settings['size']} pixels to its {settings['reference']:,} pictures; "
        f"seed {settings['seed']}."
    )
    return "\n".join([*lines, "", how]) + "\n"


def named(stamp: Mapping[str, Any]) -> str:
    """A short name for everything that a row depends on."""
    return short_hash(dict(stamp))


def beside(out: Path, name: str) -> Path:
    """The file STEM-name next to the file of the figures, STEM.json."""
    return out.with_name(f"{out.stem}-{name}")

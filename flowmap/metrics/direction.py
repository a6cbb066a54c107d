"""Whether a figure of metrics.json is better if it is lower or if it is higher, by its name."""

from __future__ import annotations

LOWER = ("frechet_", "mmd_", "cmmd", "endpoint_error")
HIGHER = ("precision_", "recall_", "clip_score_", "phrase_hit", "length_within", "style_hit")


def direction(name: str) -> int:
    """-1 if lower is better, 1 if higher is, 0 if it is not known."""
    return -1 if name.startswith(LOWER) else int(name.startswith(HIGHER))

"""Whether a figure of metrics.json is better if it is lower or if it is higher, by its name."""

from __future__ import annotations

LOWER = ("frechet_", "mmd_", "cmmd", "endpoint_error")
HIGHER = ("precision_", "recall_", "clip_score_", "phrase_hit", "length_within", "tags_exactly", "infilled_")
HIT = "_hit"  # the end of the share that has what was asked for: tag_hit, style_hit, <attribute>_hit


def direction(name: str) -> int:
    """-1 if lower is better, 1 if higher is, 0 if it is not known.

    name: as in metrics.json, or with a number of steps: tag_hit/4.
    """
    hit = name.partition("/")[0].endswith(HIT)
    return -1 if name.startswith(LOWER) else int(hit or name.startswith(HIGHER))

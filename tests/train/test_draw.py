"""The draws of a step: what is dropped becomes nothing, and all else is as without dropping."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowmap.recipe import read_recipe
from flowmap.train.draw import draw_sample

B = 200


def drawn(drop, cond, empty=None):
    recipe = read_recipe("digits")
    recipe = replace(recipe, data=replace(recipe.data, drop_condition=drop))
    return draw_sample(recipe, torch.zeros(B, 1, 8, 8), cond, torch.Generator().manual_seed(0), empty)


def conditions():
    return {
        "class": torch.arange(B), "text": torch.ones(B, 3, 2), "text_mask": torch.ones(B, 3, dtype=torch.bool), "pooled": torch.ones(B, 2),
    }  # fmt: skip


EMPTY = {"text": torch.full((1, 3, 2), 7.0), "text_mask": torch.zeros(1, 3, dtype=torch.bool), "pooled": torch.full((1, 2), 5.0)}


def test_what_is_dropped_is_dropped_whole():
    given = conditions()
    sample = drawn(0.4, given, EMPTY)
    gone = sample.cond["class"] == -1
    assert 0.3 < gone.float().mean() < 0.5
    for key, row in EMPTY.items():
        assert torch.equal(sample.cond[key][gone], row.expand(int(gone.sum()), *row.shape[1:]))
        assert torch.equal(sample.cond[key][~gone], given[key][~gone])
    assert torch.equal(given["class"], torch.arange(B))  # the batch itself is left alone


def test_noise_and_times_do_not_depend_on_dropping():
    with_text, without, kept = drawn(0.4, conditions(), EMPTY), drawn(0.4, {"class": torch.arange(B)}), drawn(0.0, conditions(), EMPTY)
    for other in (without, kept):
        assert torch.equal(with_text.x1, other.x1) and torch.equal(with_text.t, other.t) and torch.equal(with_text.s, other.s)
    assert torch.equal(with_text.cond["class"], without.cond["class"]) and torch.equal(with_text.cond["guidance"], without.cond["guidance"])
    assert torch.equal(kept.cond["class"], torch.arange(B))

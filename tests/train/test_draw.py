"""The draws of a step: what is dropped becomes nothing, and all else is as without dropping."""

from __future__ import annotations

from dataclasses import replace

import torch

from flowmap.data import Text
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.recipe import read_recipe
from flowmap.train.draw import draw_sample

B = 200


def drawn(drop, cond, empty=None):
    recipe = read_recipe("digits")
    recipe = replace(recipe, data=replace(recipe.data, drop_condition=drop))
    return draw_sample(recipe, torch.zeros(B, 1, 8, 8), cond, torch.Generator().manual_seed(0), empty)


def conditions():
    return {
        "class": torch.arange(B), "text": torch.ones(B, 3, 2), "text_mask": torch.ones(B, 3, dtype=torch.bool),
        "pooled": torch.ones(B, 2),
    }  # fmt: skip


EMPTY = {
    "text": torch.full((1, 3, 2), 7.0),
    "text_mask": torch.zeros(1, 3, dtype=torch.bool),
    "pooled": torch.full((1, 2), 5.0),
}


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
    with_text, without, kept = (
        drawn(0.4, conditions(), EMPTY),
        drawn(0.4, {"class": torch.arange(B)}),
        drawn(0.0, conditions(), EMPTY),
    )
    for other in (without, kept):
        assert (
            torch.equal(with_text.x1, other.x1)
            and torch.equal(with_text.t, other.t)
            and torch.equal(with_text.s, other.s)
        )
    assert torch.equal(with_text.cond["class"], without.cond["class"]) and torch.equal(
        with_text.cond["guidance"], without.cond["guidance"]
    )
    assert torch.equal(kept.cond["class"], torch.arange(B))


def test_attributes_are_dropped_one_by_one_and_all_together():
    recipe = read_recipe("digits-teacher")
    data = Text(
        autoencoder=TextAutoencoder(source="none"), attributes=("length",), drop_attribute=0.3, drop_condition=0.1
    )
    recipe, n = replace(recipe, data=data), 20_000
    cond = {"a": torch.zeros(n, dtype=torch.int64), "b": torch.ones(n, dtype=torch.int64), "left": torch.ones(n, 2)}
    empty = {"a": torch.tensor([-1]), "b": torch.tensor([-1]), "left": torch.zeros(1, 2)}
    found = draw_sample(recipe, torch.zeros(n, 2), cond, torch.Generator().manual_seed(0), empty).cond
    gone = {key: found[key] == -1 for key in ("a", "b")} | {"left": found["left"][:, 0] == 0}
    assert abs(float(gone["left"].float().mean()) - 0.1) < 0.01  # all together
    for key in ("a", "b"):
        assert bool(gone[key][gone["left"]].all()) and abs(float(gone[key].float().mean()) - (0.1 + 0.9 * 0.3)) < 0.015
    both = float((gone["a"] & gone["b"] & ~gone["left"]).float().mean())
    assert abs(both - 0.9 * 0.09) < 0.01  # one by one

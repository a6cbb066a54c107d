"""Trajectories: on straight paths every state is a mixture of noise and data, for the teacher and for jumps."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from flowmap.base.images import to_grid
from flowmap.evaluation.trajectory import FRAMES, Way, animation, sheet, ways
from flowmap.samplers import Deterministic, Gamma
from tests.support.straight_page import ends, straight_demo


def on_the_line(t: float, num: int = 3, seed: int = 4) -> Image.Image:
    x1 = straight_demo().student.start(num, torch.Generator().manual_seed(seed)).x1
    return to_grid((1 - t) * ends(num, seed) + t * x1, columns=2, least=32).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether no pixel differs by more than 1: float32 sums of other terms may round to the next pixel value."""
    return one.size == other.size and max(most for _, most in ImageChops.difference(one, other).getextrema()) <= 1


def test_every_state_lies_on_the_straight_line_at_its_time():
    demo = straight_demo()
    teacher, two, one = ways(demo.student, demo.teacher, num=3, steps=(2, 1), seed=4)
    assert (teacher.label, two.label, one.label) == ("teacher, 8 steps", "student, 2 steps", "student, 1 step")
    assert len(teacher.times) == FRAMES + 1 and two.times == (1.0, 0.5, 0.0) and one.times == (1.0, 0.0)
    for way in (teacher, two, one):
        assert all(same(state, on_the_line(t)) for t, state in zip(way.times, way.pictures, strict=True))


def test_a_tuned_grid_is_followed():
    demo = straight_demo()
    config = replace(demo.student.config, sampler=Deterministic(middle=(0.35,)))
    demo.student.config = config
    (way,) = ways(demo.student, None, num=3, steps=(2,), seed=4)
    assert way.times == (1.0, 0.35, 0.0) and same(way.pictures[1], on_the_line(0.35))


def test_the_sheet_is_empty_between_jumps_and_the_animation_keeps_the_last_state():
    dots = tuple(Image.new("RGB", (4, 6), shade) for shade in ("#100000", "#200000", "#300000"))
    way = Way("w", (1.0, 0.5, 0.0), dots)
    assert [way.at(t) for t in (1.0, 0.75, 0.5, 0.1, 0.0)] == [dots[0], dots[0], dots[1], dots[1], dots[2]]
    drawn = sheet([way], frames=4)
    shades = [drawn.getpixel((drawn.width - 5 * 10 + i * 10 + 1, 1)) for i in range(5)]
    assert shades == [(16, 0, 0), (255,) * 3, (32, 0, 0), (255,) * 3, (48, 0, 0)]
    with Image.open(io.BytesIO(animation([way], frames=4))) as gif:
        assert gif.n_frames == 3, "frames that are the same are one"
        assert gif.info["loop"] == 0


def test_what_cannot_be_drawn_is_named():
    demo = straight_demo()
    demo.student.config = replace(demo.student.config, sampler=Gamma(gamma=0.5))
    with pytest.raises(ValueError, match="Gamma does not only move"):
        ways(demo.student, demo.teacher)
    object.__setattr__(demo.student.config, "text", object())
    with pytest.raises(ValueError, match="need no prompt"):
        ways(demo.student, demo.teacher)

"""Samples of any shape can be drawn: the last thing that a run does must not be the first that fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowmap.base.images import stack, steps_label, to_grid, to_picture


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_a_sample_of_any_number_of_channels_is_a_picture(channels):
    x = torch.linspace(-1, 1, channels)[:, None, None].expand(channels, 4, 6)
    pixels = np.asarray(to_picture(x))
    levels = ((x[:, 0, 0] + 1) * 127.5).round().int().tolist()
    assert pixels.shape == ((4, 6) if channels == 1 else (4, 6, 3))
    assert pixels[0, 0].tolist() == (
        levels[0] if channels == 1 else [*levels[:2], 128] if channels == 2 else levels[:3]
    )


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 4, 6), (1, 1, 1), (3, 6), (1,), (2,), (7,)])
def test_samples_of_any_shape_are_a_grid(shape):
    grid = to_grid(torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)), columns=16)
    assert min(grid.size) >= 3 and stack([grid, grid]).height == 2 * grid.height + 8


def test_each_row_of_a_sheet_has_its_label_on_the_left():
    """The grids keep their pixels; the column on the left is white except for the label, at the height of its row."""
    grids = [to_grid(torch.full((2, 1, 8, 8), value)) for value in (-1.0, 0.0)]
    sheet = np.asarray(stack(grids, ["", steps_label("student", 1)]))
    height, width = grids[0].height, grids[0].width
    margin = sheet.shape[1] - width
    assert (sheet[:height, margin:] == np.asarray(grids[0])).all()
    assert (sheet[-height:, margin:] == np.asarray(grids[1])).all()
    assert (sheet[:height, :margin] == 255).all() and (sheet[-height:, :margin] < 128).any()


def test_labels_count_steps():
    assert steps_label("student", 1) == "student, 1 step" and steps_label("teacher", 64) == "teacher, 64 steps"


@pytest.mark.parametrize(("side", "tile"), [(8, 48), (14, 56), (28, 56), (64, 64), (256, 256)])
def test_small_pictures_are_enlarged_by_a_whole_factor_to_48_pixels_or_more(side, tile):
    assert to_grid(torch.zeros(3, 3, side, side)).size == (3 * (tile + 2), tile + 2)

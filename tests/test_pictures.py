"""Samples of any shape can be drawn: the last thing that a run does must not be the first that fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowmap.base.images import stack, to_grid, to_picture


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

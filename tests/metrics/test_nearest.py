"""Copies are nearer to training samples than held-out samples are, fresh samples as near."""

import pytest
import torch

from flowmap.data import Dataset, Digits
from flowmap.metrics import METRICS, NearestNeighbour, baselines


def points(seed, n):
    return torch.randn(n, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


DATA = Dataset("noise", points(0, 400), points(1, 150))


def row(samples, **settings):
    metric = NearestNeighbour(**settings).compare(DATA)
    for part in samples.split(70):
        metric.update(part)
    return metric.report()


def test_distances_are_those_of_a_plain_search():
    x, scale = points(2, 90), float(DATA.reference.double().std())
    by_hand = [min(float((a - b).double().norm()) for b in DATA.reference) for a in x]
    found = row(x)
    assert found["nearest_pixels"] * scale == pytest.approx(float(torch.tensor(by_hand).median()), rel=1e-6)
    assert set(found) == {"nearest_pixels", "nearest_pixels_held_out", "nearest_pixels_ratio"}
    assert found["nearest_pixels_ratio"] == found["nearest_pixels"] / found["nearest_pixels_held_out"]


def test_fresh_samples_have_ratio_one_and_copies_less():
    assert row(points(2, 150))["nearest_pixels_ratio"] == pytest.approx(
        1, abs=0.02
    )  # 72 values: distances differ by a few per cent
    assert row(DATA.train[:100])["nearest_pixels_ratio"] < 1e-6
    near = DATA.train[:100] + 0.1 * points(3, 100)
    assert row(near)["nearest_pixels_ratio"] < 0.2


def test_a_part_of_the_reference_may_be_searched():
    few, all_of_it = (
        NearestNeighbour(reference_images=count).compare(DATA).baseline()["nearest_pixels"] for count in (50, None)
    )
    assert few > all_of_it


def test_the_floor_is_the_row_of_held_out_samples():
    spec = NearestNeighbour("pca", images=200)
    digits = Digits().build()
    found = baselines([(spec, spec.compare(digits))], digits)
    assert found["nearest_pca_ratio"] == 1 and found["nearest_pca"] == found["nearest_pca_held_out"] > 0


def test_held_out_samples_are_needed():
    assert METRICS["nearest_neighbour"] is NearestNeighbour
    with pytest.raises(ValueError, match="data.held_out is 0"):
        NearestNeighbour().fits(Dataset("none", points(0, 40), points(1, 0)))
    metric = NearestNeighbour().compare(DATA)
    with pytest.raises(ValueError, match="was given no sample"):
        metric.report()

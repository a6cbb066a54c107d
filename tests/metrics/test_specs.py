"""Specs build metrics with the reference in them, results have their names, and the floor is what it says."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flowmap.data import Digits
from flowmap.metrics import METRICS, EndpointError, Frechet, PrecisionRecall, Straightness, floor


def gaussian(seed, n):
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed))


def scored(spec, reference, samples):
    metric = spec.build(reference)
    metric.update(samples, real=False)
    return spec.report(metric)


def test_names_of_results():
    real, fake = gaussian(0, 300), gaussian(1, 300)
    assert set(scored(Frechet(), real, fake)) == {"frechet_pixels"}
    assert set(scored(PrecisionRecall("pca"), real, fake)) == {"precision_pca", "recall_pca"}
    x = gaussian(2, 5)
    straight, ends = Straightness().build(), EndpointError().build()
    straight.update(torch.stack([x, 0 * x]), torch.tensor([1.0, 0.0]))
    ends.update(x, x)
    assert Straightness().report(straight) == {"straightness": 0.0} and EndpointError().report(ends) == {"endpoint_error": 0.0}
    assert {spec().needs for spec in METRICS.values()} == {"samples", "conditions", "trajectory", "endpoints", "inversion", "loss", "texts"}


def test_pixels_do_not_see_the_data_scale():
    real, fake = gaussian(0, 300), 1.5 * gaussian(1, 300)
    assert scored(Frechet(), 7 * real, 7 * fake) == pytest.approx(scored(Frechet(), real, fake))


def test_reference_can_be_a_part():
    metric = Frechet(reference_images=50).build(gaussian(0, 300))
    assert metric.real_count == 50
    assert sum(len(part) for part in PrecisionRecall(images=40).build(gaussian(0, 300)).real) == 40
    with pytest.raises(ValueError, match="metrics.k is 0"):
        PrecisionRecall(k=0).build(gaussian(0, 300))


def test_floor_with_enough_held_out_is_a_plain_measurement():
    data = SimpleNamespace(reference=gaussian(0, 900), held_out=gaussian(1, 400))
    spec = Frechet(images=400)
    assert floor(spec, data) == pytest.approx(scored(spec, data.reference, data.held_out))


def test_floor_by_halves_is_what_fresh_samples_score():
    """Truth: the mean over fresh draws of real samples, in the numbers of use; both have a spread of a few per cent."""
    n, m = 600, 1500
    spec = Frechet(images=m)
    truth = [scored(spec, gaussian(2 * s, n), gaussian(2 * s + 1, m))["frechet_pixels"] for s in range(40)]
    found = [floor(spec, SimpleNamespace(reference=gaussian(s, n), held_out=gaussian(s + 100, 120)))["frechet_pixels"] for s in range(40)]
    assert sum(found) == pytest.approx(sum(truth), rel=0.15)


def test_floors_of_the_digits():
    data = Digits().build()
    assert floor(Frechet(), data)["frechet_pixels"] == pytest.approx(0.27, abs=0.04)
    shares = floor(PrecisionRecall(), data)
    assert 0.85 < shares["precision_pixels"] < 0.95 and 0.85 < shares["recall_pixels"] < 0.95
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert scored(Frechet(), data.reference, noise)["frechet_pixels"] > 20


def test_reading_the_specs_imports_nothing_heavy():
    heavy = {"torchmetrics", "sklearn", "torchvision", "lightning"}
    code = f"import flowmap.metrics, flowmap.data, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})

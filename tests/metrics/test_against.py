"""Generated samples against held-out and training ones: keys, sizes, one pass through the features, and baselines."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowmap.data import Dataset, Digits
from flowmap.metrics import MMD, Against, Frechet, PrecisionRecall, baseline
from flowmap.metrics.features import Pixels


def gaussian(seed, n):
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed))


def scored(spec, reference, samples):
    metric = spec.build(reference)
    metric.update(samples, real=False)
    return spec.report(metric)


def two(reference, held_out):
    return Dataset("two", reference, held_out)


def test_both_references_and_the_held_out_one_first():
    data, samples = two(gaussian(0, 500), gaussian(1, 300)), gaussian(2, 400)
    against = Against(Frechet(images=400), data)
    against.update(samples)
    found = against.report()
    assert list(found) == ["frechet_pixels", "frechet_pixels_train"]
    assert found["frechet_pixels_train"] == pytest.approx(scored(Frechet(), data.reference, samples)["frechet_pixels"])
    scale = float(
        data.held_out.double().std() / data.reference.double().std()
    )  # both in the space that was fitted to training samples
    assert found["frechet_pixels"] == pytest.approx(
        scale**2 * scored(Frechet(), data.held_out, samples)["frechet_pixels"]
    )
    against.reset()
    against.update(samples)
    assert against.report() == found


def test_nothing_held_out_gives_training_keys_alone():
    against = Against(PrecisionRecall(images=100), two(gaussian(0, 300), gaussian(1, 0)))
    against.update(gaussian(2, 100))
    assert set(against.report()) == {"precision_pixels_train", "recall_pixels_train"}


@pytest.mark.parametrize("spec", [Frechet(images=900), PrecisionRecall(images=900), MMD(images=900)])
def test_features_of_generated_samples_are_taken_once(spec, monkeypatch):
    seen = []
    against = Against(spec, two(gaussian(0, 900), gaussian(1, 200)))
    forward = Pixels.forward
    monkeypatch.setattr(Pixels, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    against.update(gaussian(2, 1000))
    assert sum(seen) == 900


def test_precision_and_recall_compare_as_many_samples_as_the_reference_has():
    data = two(gaussian(0, 400), gaussian(1, 120))
    against = Against(PrecisionRecall(images=400), data)
    samples = gaussian(2, 400)
    against.update(samples)
    assert {suffix: sum(map(len, metric.fake)) for suffix, metric in against.metrics.items()} == {
        "": 120,
        "_train": 400,
    }
    assert (
        against.report()["precision_pixels"]
        == scored(PrecisionRecall(), data.held_out, samples[:120])["precision_pixels"]
    )


@pytest.mark.parametrize(("n", "held", "m"), [(600, 400, 300), (600, 120, 1500)])
def test_floors_are_what_fresh_samples_score(n, held, m):
    """Truth: independent draws at the sizes of use, 40 times.

    With too few real samples the bias law takes the place of more of them, to leading order: 15 % covers its next term
    and the spread of both means.
    """
    spec, mean = Frechet(images=m), lambda values: sum(values) / len(values)
    truth = {}
    for suffix, size in (("", held), ("_train", n)):
        truth[suffix] = mean(
            [scored(spec, gaussian(2 * s, size), gaussian(2 * s + 1, m))["frechet_pixels"] for s in range(40)]
        )
    found = [
        baseline(Against(spec, data), data)
        for data in (two(gaussian(s + 100, n), gaussian(s + 200, held)) for s in range(40))
    ]
    for suffix, value in truth.items():
        assert mean([one[f"frechet_pixels{suffix}"] for one in found]) == pytest.approx(value, rel=0.15)


def test_the_floor_by_halves_is_what_fresh_samples_score():
    n, m, spec = 700, 1500, Frechet(images=1500)
    truth = [scored(spec, gaussian(2 * s, n), gaussian(2 * s + 1, m))["frechet_pixels"] for s in range(40)]
    sets = [two(gaussian(s, n), gaussian(s, 0)) for s in range(40)]
    found = [baseline(Against(spec, data), data) for data in sets]
    assert set(found[0]) == {"frechet_pixels_train", "frechet_pixels_train_std"}
    assert sum(one["frechet_pixels_train"] for one in found) == pytest.approx(sum(truth), rel=0.15)


def test_the_spread_of_the_floor_is_that_of_its_draws():
    """20,000 training samples: draws of 300 hardly overlap, so that the spread is that of independent draws."""
    data, spec = two(gaussian(0, 20_000), gaussian(1, 400)), Frechet(images=300)
    found = baseline(Against(spec, data), data, draws=40)
    fresh = torch.tensor([scored(spec, data.held_out, gaussian(50 + s, 300))["frechet_pixels"] for s in range(40)])
    assert found["frechet_pixels_std"] == pytest.approx(
        float(fresh.std()), rel=4 / math.sqrt(2 * 40)
    )  # four standard errors of a spread
    assert found["frechet_pixels"] == pytest.approx(float(fresh.mean()), abs=5 * float(fresh.std()) / math.sqrt(40))
    assert baseline(Against(spec, data), data) == baseline(Against(spec, data), data)


def test_the_floor_has_the_classes_of_generated_samples():
    """Class 1 lies 50 away and is 5 % of what is held out, half of what was trained on."""
    labels = torch.arange(1000) % 2
    held = (torch.arange(400) % 20 == 0).long()
    shift = lambda x, y: x + 50.0 * y.view(-1, 1, 1)
    data = Dataset("odd", shift(gaussian(0, 1000), labels), shift(gaussian(1, 400), held), labels, held, num_classes=2)
    against = Against(Frechet(images=200), data)
    by_law = baseline(against, data, lambda num: (torch.arange(num) % 20 == 0).long())["frechet_pixels"]
    assert by_law < 0.1 < 1 < baseline(against, data)["frechet_pixels"]


def test_floors_of_the_digits():
    data = Digits().build()
    found = baseline(Against(Frechet(), data), data)
    assert found["frechet_pixels_train"] == pytest.approx(0.31, abs=0.04) and found["frechet_pixels"] == pytest.approx(
        1.03, abs=0.1
    )
    shares = baseline(Against(PrecisionRecall(images=898), data), data)
    assert all(
        0.85 < shares[f"{name}_pixels{suffix}"] < 0.95 for name in ("precision", "recall") for suffix in ("", "_train")
    )
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert scored(Frechet(), data.reference, noise)["frechet_pixels"] > 20


def test_a_set_without_conditions_has_a_floor():
    data = SimpleNamespace(reference=gaussian(0, 300), held_out=gaussian(1, 200))
    assert set(baseline(Against(Frechet(images=100), data), data)) == {
        f"frechet_pixels{s}" for s in ("", "_std", "_train", "_train_std")
    }

"""Specs build metrics with the reference in them, and results have their names."""

import pytest
import torch

from flowmap.metrics import METRICS, EndpointError, Frechet, PrecisionRecall, Straightness


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
    assert Straightness().report(straight) == {"straightness": 0.0} and EndpointError().report(ends) == {
        "endpoint_error": 0.0
    }


def test_what_each_kind_is_measured_on():
    of = lambda name: {kind for kind, spec in METRICS.items() if getattr(spec, name)}
    assert of("on_samples") == {"frechet", "precision_recall", "mmd", "nearest_neighbour"}
    assert of("of_velocity") == {"straightness", "loss_by_time"}
    assert of("of_endpoints") == {"endpoint_error"} and of("normal_noise") == {"inversion"}
    assert {kind for kind, spec in METRICS.items() if not spec().num_starts} == {"inversion", "loss_by_time"}
    texts = {"distinct", "self_bleu", "text_divergence", "memorised", "control", "phrase", "content_kept"}
    texts |= {"style_hit", "infilled", "perplexity", "tag_hit"}
    assert {kind for kind, spec in METRICS.items() if spec().num_texts} == texts


def test_pixels_do_not_see_the_data_scale():
    real, fake = gaussian(0, 300), 1.5 * gaussian(1, 300)
    assert scored(Frechet(), 7 * real, 7 * fake) == pytest.approx(scored(Frechet(), real, fake))


def test_reference_can_be_a_part():
    metric = Frechet(reference_images=50).build(gaussian(0, 300))
    assert metric.real_count == 50
    assert sum(len(part) for part in PrecisionRecall(images=40).build(gaussian(0, 300)).real) == 40

"""The MMD: its closed form between Gaussians, no bias, and CLIP's weights only where they are at hand."""

import pytest
import torch

from flowmap.base.schema import construct
from flowmap.data import Dataset
from flowmap.metrics import METRICS, MMD, Against, baseline
from flowmap.metrics.features import build_features
from flowmap.metrics.mmd import MaximumMeanDiscrepancy, median_distance
from tests.support.oracle import draw


def flat(x):
    return x.flatten(1)


def of(real, fake, sigma=1.0, **settings):
    metric = MaximumMeanDiscrepancy(flat, sigma, **settings)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def closed_form(shift, sigma, dims):
    """E k(x, x') + E k(y, y') - 2 E k(x, y) for x ~ N(0, I), y ~ N(shift, I)."""
    wide = sigma**2 + 2
    return 2 * (sigma**2 / wide) ** (dims / 2) * (1 - torch.exp(torch.tensor(-(shift**2) / (2 * wide))).item())


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_between_two_gaussians_it_has_its_closed_form(shift):
    x, y = draw(3000, 2, seed=1), draw(3000, 2, seed=2) + torch.tensor([shift, 0.0])
    assert float(of(x, y, 1.3).compute()) / 1000 == pytest.approx(closed_form(shift, 1.3, 2), rel=0.12)


def test_two_samples_by_hand_and_permutations():
    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[2.0], [4.0]]).double()
    k = lambda d: torch.exp(torch.tensor(-(d**2) / 2)).double()
    cross = (k(2.0) + k(4.0) + k(1.0) + k(3.0)) / 4
    torch.testing.assert_close(of(x, y).compute(), 1000 * (k(1.0) + k(2.0) - 2 * cross))
    a, b = draw(50, 3, seed=1), draw(40, 3, seed=2)
    torch.testing.assert_close(of(a, b).compute(), of(a[torch.randperm(50)], b.flip(0)).compute())
    torch.testing.assert_close(of(3 * a, 3 * b, 3.0).compute(), of(a, b, 1.0).compute())
    torch.testing.assert_close(of(7 * a, b, unit=True).compute(), of(a, 3 * b, unit=True).compute())


def test_it_has_no_bias():
    found = torch.stack([of(draw(12, 2, seed=i), draw(9, 2, seed=1000 + i)).compute() for i in range(200)])
    assert abs(float(found.mean())) < 5 * float(found.std()) / 200**0.5 and float(found.min()) < 0


def test_reset_keeps_the_real_ones_and_batches_add_up():
    a, b = draw(600, 3, seed=1), draw(500, 3, seed=2)
    whole, parts = of(a, b), MaximumMeanDiscrepancy(flat, 1.0)
    for part in a.split(70):
        parts.update(part, real=True)
    for part in b.split(90):
        parts.update(part, real=False)
    torch.testing.assert_close(parts.compute(), whole.compute())
    parts.reset()
    parts.update(b, real=False)
    torch.testing.assert_close(parts.compute(), whole.compute())
    with pytest.raises(ValueError, match="2 or more generated"):
        of(a, b[:1]).compute()


def test_the_spec_reports_by_features_and_has_a_floor():
    x = draw(300, 1, 4, 6, dtype=torch.float32)
    spec = MMD(images=100)
    metric = spec.build(x[:200])
    assert metric.sigma == pytest.approx(median_distance(build_features("pixels", x[:200])(x[:200])), rel=1e-6)
    metric.update(x[200:], real=False)
    near = spec.report(metric)
    metric.reset()
    metric.update(x[200:] + 1, real=False)
    assert set(near) == {"mmd_pixels"} and spec.report(metric)["mmd_pixels"] > 20 * abs(near["mmd_pixels"])
    for held_out in (x[200:], x[200:250]):
        assert abs(baseline(Against(spec, data := Dataset("noise", x[:200], held_out)), data)["mmd_pixels"]) < 20
    assert METRICS["mmd"] is MMD and MMD(features="clip", unit=True, sigma=10.0).report(metric).keys() == {"cmmd"}
    with pytest.raises(ValueError, match="sigma: -1"):
        construct(MMD, {"sigma": -1.0}, {}, file="x")


def test_clip_is_read_from_safetensors_at_hand_or_refused_in_one_line(tmp_path, monkeypatch):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from flowmap.metrics.features import _network

    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    _network.cache_clear()
    with pytest.raises(ValueError, match="features 'clip' needs") as caught:
        build_features("clip", torch.zeros(2, 1, 8, 8))
    assert "\n" not in str(caught.value)
    sizes = dict(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = CLIPVisionConfig(**sizes)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip-vit-large-patch14-336")
    x = draw(5, 1, 8, 8, dtype=torch.float32).clamp(-1, 1)
    found = build_features("clip", x)(x)
    assert found.shape == (5, 8)
    torch.testing.assert_close(found[[3, 1]], build_features("clip", x)(x[[3, 1]]))
    _network.cache_clear()

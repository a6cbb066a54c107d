"""Pretrained networks of pictures: DINOv2 by the protocol of FD-DINOv2, weights by path, widths without loading."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from flowmap.data import Dataset
from flowmap.metrics import Against, Frechet
from flowmap.metrics.features import _network, build_features, width_of
from flowmap.metrics.picture_nets import resized_positions


@pytest.fixture(autouse=True)
def nothing_else_here(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    _network.cache_clear()
    yield
    _network.cache_clear()


def pictures(seed, n, size=20):
    return (torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 0.4).clamp(-1, 1)


def tiny_dinov2(folder, image_size=84):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=image_size, patch_size=14
    )
    torch.manual_seed(0)
    net = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        net.embeddings.position_embeddings.normal_()
    net.save_pretrained(folder)
    return net


def test_dinov2_is_the_class_token_of_normalised_bytes_at_224(tmp_path):
    """As EDM2's detector: bytes, bicubic with antialiasing, ImageNet's mean and std, CLS after the last norm."""
    net, x = tiny_dinov2(tmp_path / "dinov2", image_size=224), pictures(0, 3)
    found = build_features("dinov2", x, weights=str(tmp_path / "dinov2"))(x)
    pixels = ((x + 1) * 127.5).round().clamp(0, 255)
    pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        wanted = net(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found, wanted)
    grey = x[:, :1]
    features = build_features("dinov2", x, weights=str(tmp_path / "dinov2"))
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)))


def test_positions_are_resized_as_the_published_network_does(tmp_path):
    """scale_factor (16 + 0.1) / n without antialiasing; the same grid stays as it is."""
    positions = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    grid = positions[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    scale = float(16 + 0.1) / 37
    published = F.interpolate(grid, mode="bicubic", antialias=False, scale_factor=(scale, scale))
    found = resized_positions(positions, 16, 0.1)
    assert found.shape == (1, 1 + 256, 8) and found[:, :1].equal(positions[:, :1])
    assert found[:, 1:].equal(published.permute(0, 2, 3, 1).reshape(1, 256, 8))
    assert resized_positions(positions, 37, 0.1) is positions
    tiny_dinov2(tmp_path / "dinov2", image_size=84)  # 6 x 6 positions, as the published ones are 37 x 37
    assert build_features("dinov2", positions, weights=str(tmp_path / "dinov2"))(pictures(0, 2)).shape == (2, 16)


def test_fd_dinov2_is_reported_under_its_name_and_checked_beforehand(tmp_path):
    spec = Frechet("dinov2", images=4, weights=str(tmp_path / "dinov2"))
    with pytest.raises(ValueError, match="features 'dinov2' needs .*dinov2, safetensors, in .*none/dinov2 or in the"):
        spec.check()
    with pytest.raises(ValueError, match="needs facebook/dinov2-large, safetensors, in .*dinov2-large or in the hub"):
        Frechet("dinov2").check()
    tiny_dinov2(tmp_path / "dinov2")
    spec.check()
    assert width_of("dinov2", spec.weights) == 16 and width_of("inception") == 2048 and width_of("pixels") is None
    against = Against(spec, Dataset("two", pictures(0, 6), pictures(1, 5)))
    with pytest.warns(UserWarning, match="far too high"):
        against.update(pictures(2, 4))
        assert list(against.report()) == ["frechet_dinov2", "frechet_dinov2_train"]


def test_a_folder_of_another_network_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("dinov2", "clip"):
        with pytest.raises(ValueError, match=f"features '{name}': .*empty has no") as error:
            build_features(name, pictures(0, 2), weights=str(tmp_path / "empty"))
        assert "\n" not in str(error.value)


def test_clip_by_path(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "mine")
    assert build_features("clip", pictures(0, 2), weights=str(tmp_path / "mine"))(pictures(0, 2)).shape == (2, 8)
    assert width_of("clip", str(tmp_path / "mine")) == 8

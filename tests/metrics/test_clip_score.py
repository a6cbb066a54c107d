"""The CLIP score: that of torchmetrics on a tiny CLIP, and in a student's row with the captions of a file."""

import pytest
import torch

from flowmap.metrics import CLIPScore
from flowmap.metrics.clip_model import CLIPMean
from flowmap.metrics.spec import DrawnBatch
from tests.support.tiny_pipelines import two_towers

CAPTIONS = ["a red cat", "the face of a green dog", "blue", "grinning face with eyes 1 2 3", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_towers(tmp_path_factory.mktemp("clip"))


def pictures(n, channels=3):
    return torch.rand(n, channels, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


class _Model(torch.nn.Module):
    """What torchmetrics calls: transformers 5 returns records where it takes tensors."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *arguments):
        return self._tensor(self.model.get_image_features(*arguments))

    def get_text_features(self, *arguments):
        return self._tensor(self.model.get_text_features(*arguments))

    @staticmethod
    def _tensor(found):
        return found if isinstance(found, torch.Tensor) else found.pooler_output


def test_it_is_the_score_of_torchmetrics(folder):
    from torchmetrics.multimodal.clip_score import CLIPScore as Twin

    x, ours = pictures(5), CLIPMean(str(folder))
    twin = Twin(lambda: (_Model(ours.model), ours.processor))
    bytes_ = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for part in (slice(0, 2), slice(2, 5)):
        twin.update(list(bytes_[part]), CAPTIONS[part])
        ours.update(x[part], CAPTIONS[part])
    found = float(ours.compute())
    assert found == pytest.approx(float(twin.compute()), rel=1e-4) and abs(found) > 0.1
    ours.reset()
    flipped = CAPTIONS[::-1]
    ours.update(x, flipped)
    assert float(ours.compute()) != pytest.approx(found, rel=1e-3)  # the captions matter


def test_grey_pictures_long_captions_and_negative_means(folder, monkeypatch):
    metric = CLIPMean(str(folder))
    metric.update(pictures(2, channels=1), ["a cat " * 40, "dog"])  # 80 words, 16 are read
    first = metric.total.clone()
    metric.reset()
    metric.update(pictures(2, channels=1).expand(-1, 3, -1, -1), ["a cat " * 40, "dog"])
    assert metric.total == first
    metric.total = torch.tensor(-1.0).double()
    assert float(metric.compute()) == 0  # as torchmetrics: the mean is cut off, not each cosine
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        metric.update(pictures(2), ["a"])


def test_the_first_images_of_all_processes_count(folder):
    spec = CLIPScore(model=str(folder), images=6)
    metric = spec.build_on(None)
    for first in (0, 2, 4):  # this process's samples, of two processes
        batch = DrawnBatch(pictures(2), first, 2, dict, lambda: CAPTIONS[:2])
        spec.update(metric, batch)
    assert int(metric.count) == 3
    assert list(spec.measure(metric, None)) == [f"clip_score_{folder.name.removeprefix('clip-')}"]


def test_a_model_that_is_not_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="clip_score needs openai/clip-vit-large-patch14, safetensors, in ") as error:
        CLIPScore().check()
    assert "\n" not in str(error.value)
    (tmp_path / "clip-vit-large-patch14").mkdir()
    CLIPScore().check()
    with pytest.raises(ValueError, match="has no CLIP of transformers as safetensors"):
        CLIPScore().build_on(None)

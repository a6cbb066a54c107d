"""What an evaluation holds: chunks of samples, moments and features, whatever the number of samples is."""

import pytest
import torch

from flowmap.data import Dataset
from flowmap.data.stored import StoredSamples
from flowmap.estimate.live import LiveBytes
from flowmap.evaluation.measure import measure
from flowmap.metrics import Frechet, PrecisionRecall
from flowmap.metrics import real as real_module
from flowmap.recipe import read_recipe
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student
from tests.evaluation.test_shared import Bent

SIDE, BATCH = 32, 16
PICTURE = 3 * SIDE * SIDE * 4  # bytes


def drawn_when_read(num, seed):
    """`num` pictures that exist only while they are read, as those on disk."""

    def read(places):
        generator = torch.Generator().manual_seed(seed + int(places.sum()))
        return torch.rand(len(places), 3, SIDE, SIDE, generator=generator) * 2 - 1

    return StoredSamples(num, (3, SIDE, SIDE), read)


def peak(num, monkeypatch, *specs):
    """The most bytes alive at once in an evaluation of `num` samples against as many real ones."""
    for place in ("flowmap.metrics.real.CHUNK", "flowmap.flow.prior.BLOCK"):
        monkeypatch.setattr(place, BATCH)
    recipe = read_recipe("digits-teacher", [f"evaluation.batch_size={BATCH}"])
    config = StudentConfig(recipe.student, recipe.sampler, (3, SIDE, SIDE), num_classes=10)
    labels = torch.arange(num) % 10
    data = Dataset("stream", drawn_when_read(num, 0), drawn_when_read(num, 1), labels, labels, num_classes=10)
    with LiveBytes() as live:
        found = measure(recipe, Student(config, Bent()), None, data, steps=[1], metrics=[s(num) for s in specs])
    assert found["student"]["1"] and found["floor"]
    return live.peak


@pytest.fixture
def pooled(monkeypatch):
    """A space of 12 features, so that features weigh little beside pictures."""
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(SIDE // 2), torch.nn.Flatten())
    monkeypatch.setattr("flowmap.metrics.features._network", lambda name, weights: real_module.FrozenNetwork(pool))
    monkeypatch.setattr("flowmap.metrics.features.needs_pictures", lambda name: True)


def test_moments_of_64_batches_take_no_more_memory_than_those_of_4(monkeypatch, pooled):
    few, many = (peak(num, monkeypatch, lambda n: Frechet(images=n)) for num in (4 * BATCH, 64 * BATCH))
    assert few < many < 9 * BATCH * PICTURE
    assert many - few < 60 * BATCH * 200  # numbers, labels and 12 features of each real sample; a picture has 12,288


def test_metrics_that_need_all_features_keep_these_and_no_picture(monkeypatch, pooled):
    monkeypatch.setattr("flowmap.metrics.precision_recall.PrecisionRecallScore.chunk", BATCH)
    specs = (lambda n: Frechet(images=n), lambda n: PrecisionRecall(images=n))
    few, many = (peak(num, monkeypatch, *specs) for num in (4 * BATCH, 64 * BATCH))
    rows = 2 * BATCH * 8  # of the matrix of distances
    assert many - few < 60 * BATCH * (200 + rows + 8 * 12 * 8)  # 12 features in float64: two references, two of each

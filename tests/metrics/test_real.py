"""Real samples: read a chunk at a time, and passed through a frozen network once."""

import math

import pytest
import torch

from flowmap.data import Dataset
from flowmap.data.stored import StoredSamples
from flowmap.metrics import MMD, Frechet, NearestNeighbour, PrecisionRecall, baselines
from flowmap.metrics import real as real_module
from flowmap.metrics.features import PCA, Pixels, build_features
from flowmap.metrics.real import FrozenNetwork, Real, chunk_of, spread
from tests.support.oracle import draw


class Counting(torch.nn.Module):
    """Features that note how many samples they were asked for."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x.flatten(1).cumsum(1)


def stored(x, taken=None):
    def read(places):
        if taken is not None:
            taken.append(len(places))
        return x[places]

    return StoredSamples(len(x), tuple(x.shape[1:]), read)


def pictures(seed, n):
    return draw(n, 3, 4, 6, seed=seed).float()


def test_a_real_sample_passes_through_a_network_once_for_as_long_as_the_samples_exist():
    x, net = pictures(0, 40), Counting()
    network = FrozenNetwork(net)
    for places in (torch.arange(30), torch.tensor([39, 0, 39, 7])):
        found = torch.cat(list(Real(x).features(network, places)))
        assert torch.equal(found, x[places].flatten(1).cumsum(1))
    assert net.seen == 30 + 2  # the second 39 is asked for in the batch of the first
    known = len(Real._known)
    del x
    assert len(Real._known) == known - 1


def test_a_network_sees_each_real_and_each_generated_picture_once_in_a_whole_evaluation(monkeypatch):
    net = Counting()
    network = FrozenNetwork(net)
    monkeypatch.setattr("flowmap.metrics.features._network", lambda name, weights: network)
    monkeypatch.setattr("flowmap.metrics.features.needs_pictures", lambda name: True)
    data = Dataset("noise", pictures(0, 300), pictures(1, 120))
    specs = [kind(images=100) for kind in (Frechet, PrecisionRecall, MMD, NearestNeighbour)]
    built = [(spec, spec.build_on(data)) for spec in specs]
    baselines(built, data)
    tried = 2 * 2 + 2  # two samples tell the dimensions of Frechet's features; one, those of the two gathered sets
    assert 420 <= net.seen <= 420 + tried + 3
    seen = net.seen
    for spec, metric in built:
        spec.begin(metric)
        metric.update(pictures(2, 500))
    assert net.seen == seen + 4 * 100


@pytest.mark.parametrize("kind", [Frechet, PrecisionRecall, MMD, NearestNeighbour])
@pytest.mark.parametrize("features", ["pixels", "pca"])
def test_samples_on_disk_give_the_figures_of_samples_in_memory(kind, features):
    x, held_out, samples = pictures(0, 700), pictures(1, 300), pictures(2, 280)
    figures, taken = [], []
    for data in (Dataset("here", x, held_out), Dataset("there", stored(x, taken), stored(held_out, taken))):
        spec = kind(features=features, images=280)
        metric = spec.build_on(data)
        metric.update(samples)
        figures.append(metric.report() | baselines([(spec, metric)], data))
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)
    assert max(taken) <= 256


def test_a_space_fitted_chunk_by_chunk_is_that_of_the_whole():
    x = pictures(0, 700) + 3
    assert float(spread(stored(x), "cpu")) == pytest.approx(float(x.double().std()), rel=1e-12)
    assert torch.equal(spread(x, "cpu"), x.double().std())
    whole, parts = PCA(x), PCA(stored(x))
    torch.testing.assert_close(parts(x[:9]).abs(), whole(x[:9]).abs(), rtol=1e-8, atol=1e-8)  # a direction has no sign
    assert torch.equal(Pixels(x)(x[:2]), build_features("pixels", x)(x[:2]))


def test_large_pictures_come_in_smaller_chunks():
    assert chunk_of((1, 8, 8)) == chunk_of((3, 256, 256)) == 256
    assert chunk_of((3, 512, 512)) == 64 and chunk_of((3, 1024, 1024)) == 16 and chunk_of((3, 20000, 20000)) == 1
    assert all(chunk_of((3, s, s)) * 12 * s * s <= 2**28 for s in (256, 512, 1024))


def test_against_counts_what_comes_in_parts_as_it_counts_the_whole():
    data = Dataset("noise", pictures(0, 300), pictures(1, 120))
    for kind in (Frechet, PrecisionRecall, MMD, NearestNeighbour):
        rows = []
        for size in (500, 64):
            metric = kind(images=200).build_on(data)
            for part in pictures(2, 500).split(size):
                metric.update(part)
            rows.append(metric.report())
        assert rows[1] == pytest.approx(rows[0], rel=1e-10)
        metric.reset()
        metric.update(pictures(2, 500))
        assert metric.report() == rows[0]


def test_processes_share_the_real_samples_without_a_rest(monkeypatch):
    places = torch.randperm(100)[:37]
    monkeypatch.setattr(real_module, "world_size", lambda: 8)
    shares = []
    for process in range(8):
        monkeypatch.setattr(real_module, "rank", lambda process=process: process)
        shares.append(real_module.mine(places))
    assert sorted(torch.cat(shares).tolist()) == sorted(places.tolist())
    assert math.isclose(sum(map(len, shares)), 37)

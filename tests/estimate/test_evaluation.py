"""Memory of an evaluation: the states that metrics really hold, and the full-scale recipes on one GPU."""

import pytest
import torch

from flowmap.estimate.evaluation import evaluation_bytes, picture_shape
from flowmap.estimate.frozen_networks import NETWORKS
from flowmap.estimate.live import LiveBytes
from flowmap.estimate.networks import config_without_weights
from flowmap.estimate.outlines import Outlines
from flowmap.metrics import MMD, Frechet, PrecisionRecall
from flowmap.metrics.features import PictureNet, width_of
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from tests.support.oracle import draw

GIB = 2**30


@pytest.mark.parametrize(("kind", "width"), [(Frechet, 200), (PrecisionRecall, 12), (MMD, 12)])
def test_what_a_metric_says_it_holds_is_what_it_holds(kind, width):
    real, held_out, fake = (draw(num, width, seed=num).float() for num in (1200, 900, 800))
    spec = kind(images=800, **({"sigma": 1.0} if kind is MMD else {}))
    with LiveBytes() as live:
        sides = [spec.build(real), spec.build(held_out)]
        for metric in sides:
            metric.update(fake, real=False)
            spec.report(metric)
    said = spec.held_bytes(width, 1200, 900)
    assert live.peak < 1.2 * said < 2.5 * live.peak


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("imagenet64", "dit256", "sd15", "flux-dev-lora")]


@pytest.mark.parametrize("name", ["imagenet512", *LARGE])
def test_a_full_scale_recipe_is_measured_on_a_gpu_of_80_gb(name):
    run = resolve(read_recipe(name))
    config = config_without_weights(run, Outlines().of(run, whole=False)[0])
    found = evaluation_bytes(run, config)
    assert 0 < found.device < 60 * GIB and 0 <= found.host < 4 * GIB
    assert found.total >= found.device and picture_shape(run, config)[0] == 3


def test_it_depends_on_the_batch_and_on_the_numbers_of_samples_hardly():
    def of(*settings):
        run = resolve(read_recipe("digits", list(settings)))
        return run, config_without_weights(run, Outlines().of(run, whole=False)[0])

    frechet = "metrics=[{{kind: frechet, features: inception, images: {}}}]"
    few, many = (evaluation_bytes(*of(frechet.format(num), "evaluation.batch_size=512")) for num in (500, 50_000))
    assert few == many
    halved = evaluation_bytes(*of(frechet.format(500), "evaluation.batch_size=256"))
    assert halved.drawing == pytest.approx(few.drawing / 2, rel=0.05) and halved.states == few.states
    assert picture_shape(*of()) == (1, 8, 8)


def test_the_table_of_networks_has_their_widths():
    from flowmap.metrics.features import FEATURES

    nets = {name for name, kind in FEATURES.items() if isinstance(kind, type) and issubclass(kind, PictureNet)}
    assert nets == set(NETWORKS)
    for name in ("inception", "efficientnet_lite0"):
        assert width_of(name) == NETWORKS[name].features


def test_live_bytes_count_what_is_alive_and_no_view():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:]
        del x
        z = y + 1
        del y, z
    assert live.peak == 4 * 1800 and live.now == 0

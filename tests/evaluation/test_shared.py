"""Evaluation shared by processes: the figures of 2 and of 4 are those of one, from the same samples."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowmap.data import Digits
from flowmap.evaluation.measure import measure
from flowmap.metrics.features import FEATURES, PictureNet
from flowmap.recipe import read_recipe
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student

METRICS = [
    "{kind: frechet, features: halves, images: 200, reference_images: 501}",
    "{kind: frechet, features: pca, images: 200}",
    "{kind: precision_recall, features: halves, images: 120}",
    "{kind: mmd, features: pca, images: 100, reference_images: 203}",
    "{kind: nearest_neighbour, features: halves, images: 100, reference_images: 301}",
    "{kind: agreement, images: 100, reference_images: 301}",
    "{kind: straightness, images: 40, steps: 3}",
    "{kind: endpoint_error, images: 40, steps: 3}",
    "{kind: inversion, images: 40, solver: {kind: euler, steps: 3}}",
    "{kind: loss_by_time, images: 40, times: [0.25, 0.5]}",
]


class Halves(PictureNet):
    """A network that is not fitted to anything: sums over the halves of each row of a picture."""

    def __init__(self, reference):
        super().__init__()

    @classmethod
    def check(cls):
        pass

    def forward(self, x):
        return x.unflatten(-1, (2, -1)).sum(-1).flatten(1)


class Bent(torch.nn.Module):
    """A student without sums over a batch, so that a sample is the same to the bit in whatever batch it is drawn."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def mean_velocity(self, x, t, s, cond=None):
        label, r = (value.view(-1, 1, 1, 1) for value in (cond["class"], t + s))
        return x - torch.tanh(x * (1 + r)) * (1 + label / 10)

    def velocity(self, x, t, cond=None):
        return self.mean_velocity(x, t, t, cond)

    def forward(self, x, t, s, cond=None):
        return x - (t - s).view(-1, 1, 1, 1) * self.mean_velocity(x, t, s, cond)


def figures():
    FEATURES["halves"] = Halves
    recipe = read_recipe("digits-teacher", [f"metrics=[{', '.join(METRICS)}]", "evaluation.batch_size=24"])
    config = StudentConfig(recipe.student, recipe.sampler, (1, 8, 8), num_classes=10)
    found = measure(recipe, Student(config, Bent()), None, Digits().build(), steps=[2])
    return found["student"]["2"] | {f"floor {key}": value for key, value in found["floor"].items()}


def _measured(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(figures()))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_figures_of_several_processes_are_those_of_one(world, tmp_path):
    whole = figures()
    names = ("frechet", "precision", "mmd", "nearest", "agreement", "straight", "endpoint", "inversion", "loss")
    assert all(any(key.startswith(name) for key in whole) for name in names)
    mp.spawn(_measured, (world, tmp_path), nprocs=world)
    for rank in range(world):
        found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
        assert found == pytest.approx(whole, rel=1e-9, abs=1e-12)

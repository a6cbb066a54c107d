"""Captions go with the samples that were drawn from them: `measure` finds a student that follows its captions."""

from dataclasses import dataclass, replace

import pytest
import torch

from flowmap.evaluation.measure import measure
from flowmap.flow.seeds import seeded
from flowmap.metrics import Agreement, Retrieval
from flowmap.nets.mlp import MLP
from flowmap.prepare.encode import encode
from flowmap.recipe import read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.student import Student
from tests.support.encoding import Numbers, spec

pytest.importorskip("datasets")


@dataclass(frozen=True)
class Hashed:
    """A sentence's embedding is drawn by its hash."""

    def load(self):
        return lambda captions: {
            "pooled": torch.stack([torch.randn(6, generator=seeded(caption)) for caption in captions])
        }

    def identity(self):
        return {"id": "hashed"}


class Painter(torch.nn.Module):
    """Paints the caption's embedding, one value to a row of pixels, or leaves the noise as it is."""

    def __init__(self, reads):
        super().__init__()
        self.reads, self.weight = reads, torch.nn.Parameter(torch.zeros(1))

    def mean_velocity(self, x, t, s, cond=None):
        picture = cond["pooled"].repeat(1, 32).reshape(len(x), 3, 8, 8) / 4
        return x - picture if self.reads else torch.zeros_like(x)

    def velocity(self, x, t, cond=None):
        return self.mean_velocity(x, t, t, cond)

    def forward(self, x, t, s, cond=None):
        return x + (s - t).view(-1, 1, 1, 1) * self.mean_velocity(x, t, s, cond)


@dataclass(frozen=True)
class Told(Numbers):
    """Pictures that are the embeddings of their captions."""

    def items(self, start=0, stop=None):
        for item in super().items(start, stop):
            painted = Hashed().load()([item.caption or ""])["pooled"].repeat(1, 32).reshape(3, 8, 8) / 4
            image = None if item.image is None else ((painted.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            yield type(item)(image, None, item.caption, item.key, item.problem)

    def num_classes(self):
        return None

    def class_names(self):
        return None


def test_a_student_that_draws_its_caption_is_found(tmp_path):
    settings = dict(
        images=Told(count=260), autoencoder=None, text=Hashed(), held_out=30, reference_images=180, shard_items=100
    )
    encode(spec(**settings), tmp_path)
    data = spec(tmp_path, **settings).build()
    recipe = replace(read_recipe("digits"), sampler=Deterministic(), metrics=(Retrieval("pixels", 150, 40),))
    config = StudentConfig(MLP(), Deterministic(), data.shape, text=Hashed(), samples=Pixels())
    found = {reads: measure(recipe, Student(config, Painter(reads)), None, data, steps=[1]) for reads in (True, False)}
    assert found[True]["student"]["1"]["retrieval_top1_pixels"] > 0.95
    assert (
        found[False]["student"]["1"]["retrieval_top1_pixels"] < 0.08
        and found[False]["student"]["1"]["retrieval_top5_pixels"] < 0.25
    )
    assert (
        found[True]["floor"]["retrieval_top1_pixels"]
        > 0.95
        > 0.3
        > found[True]["floor"]["retrieval_top1_pixels_shuffled"]
    )
    with pytest.raises(ValueError, match="metrics: agreement needs data with classes"):
        measure(recipe, Student(config, Painter(True)), None, data, steps=[1], metrics=[Agreement()])

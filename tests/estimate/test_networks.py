"""The networks of a dry run are those that the builders make, without the weights that they start from."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flowmap.base.schema import RecipeError
from flowmap.build.student import student_config
from flowmap.data.outline import outline_of
from flowmap.estimate import costs, dry_run
from flowmap.estimate import networks as made_networks
from flowmap.estimate.networks import Networks
from flowmap.nets import DiT
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """Runs the dry run of a recipe and returns the networks of each stage."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    found = []

    class Kept(Networks):
        @staticmethod
        def of(run, config):
            found.append((run, config, Networks.of(run, config)))
            return found[-1][2]

    monkeypatch.setattr(dry_run, "Networks", Kept)

    def run(*recipe):
        dry_run.dry_run(read_recipe(*recipe), None)
        return found

    return run


EDM2 = "student={kind: edm2, channels: 32, multipliers: [1, 2], num_blocks: 1, attention_at: []}"
NEW_EMBEDDING = ["teacher.guidance=null", "student.time_embedding=t", f"teacher.overrides=['{EDM2}']"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits", []),
        ("digits", NEW_EMBEDDING),
        ("digits-adversarial", []),
        ("digits-dmd", []),
        ("digits-joint", []),
        ("instaflow/digits", []),
    ],
)
def test_they_are_on_the_meta_device_and_as_large_as_those_that_are_trained(name, overrides, networks):
    for _, config, made in networks(name, overrides):
        for net in (made.student, made.fake, made.discriminator):
            assert net is None or all(p.is_meta for p in net.parameters())
        real = config.build().state_dict()
        assert {key: value.shape for key, value in made.student.state_dict().items()} == {
            key: value.shape for key, value in real.items()
        }


def test_a_start_that_is_another_network_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    """By the builder, as when the run begins."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    run = resolve(read_recipe("digits"))
    data = outline_of(run.data.build())
    config = student_config(run.changed(student=run.net), data, None)
    other = resolve(read_recipe("digits", ["teacher.overrides=[student.preset=mini]"]))
    assert Networks.of(run, config).student is not None
    with pytest.raises(RecipeError, match="digits: student: .*its network is not the teacher's"):
        Networks.of(other, config)


def test_each_distinct_network_is_built_once_in_a_dry_run(tmp_path, monkeypatch):
    """Guided by a weak model, priced on accelerators: student, teacher and weak model are each asked for many times."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    built, original = Counter(), StudentConfig.build

    def build(self, base=None):
        built[replace(self, recipe="", recipe_hash="", step=0)] += 1
        return original(self, base)

    monkeypatch.setattr(StudentConfig, "build", build)
    monkeypatch.setattr(dry_run, "WORTH_PRICING", 0)
    made_networks._BUILT.clear()
    costs._COUNTED.clear()
    lines = dry_run.dry_run(read_recipe("digits", ["trainer.accelerator=auto"]), None)
    assert any("GPU-hours" in line for line in lines)
    assert len(built) >= 2 and set(built.values()) == {1}


def test_a_network_is_a_copy_of_its_own():
    config = StudentConfig(net=DiT(preset="nano", patch=1), sampler=Deterministic(), shape=(1, 8, 8))
    one, two = (made_networks.outline_of_network(config) for _ in range(2))
    one.requires_grad_(False).bfloat16()
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_meta for p in two.parameters())

"""The number of samples of a step is a setting; devices, nodes and micro-batches share it and are no part of a run's
identity."""

from __future__ import annotations

import pytest
from conftest import TINY

from flowmap.base.schema import RecipeError
from flowmap.plan.run_folders import matches
from flowmap.recipe.recipe import read_recipe, read_resolved, recipe_from

GLOBAL = "data.global_batch_size=96"


@pytest.fixture
def read(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)  # batch 16
    return lambda *settings: read_recipe(tmp_path / "tiny.yaml", settings)


@pytest.mark.parametrize(
    ("settings", "accumulate"),
    [
        ([], 6),
        (["trainer.devices=2"], 3),
        (["trainer.devices=3"], 2),
        (["trainer.devices=3", "trainer.num_nodes=2"], 1),
        (["data.batch_size=8", "trainer.devices=4"], 3),
        (["trainer.devices=2", "trainer.accumulate=3"], 3),
    ],
)
def test_the_number_of_micro_batches_follows_from_the_global_batch(read, settings, accumulate):
    batches = read(GLOBAL, *settings).batches
    assert (batches.samples, batches.accumulate) == (96, accumulate)


def test_without_it_every_device_adds_its_batch(read):
    assert read("trainer.accumulate=3", "trainer.devices=2", "trainer.num_nodes=4").batches.samples == 16 * 3 * 2 * 4
    text = "384 samples a step: micro-batch 16 x accumulate 3 x 2 devices x 4 nodes"
    assert str(read("trainer.accumulate=3", "trainer.devices=2", "trainer.num_nodes=4").batches) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.devices=4"], "96 is no multiple of data.batch_size 16 x trainer.devices 4 x trainer.num_nodes 1 = "
         "64; nearest allowed: 64 or 128; or data.batch_size 12 or 24"),
        (["trainer.devices=5"], "= 80; nearest allowed: 80 or 160$"),
        (["trainer.devices=8", "trainer.num_nodes=2"], "= 256; nearest allowed: 256; or data.batch_size 6"),
        (["trainer.accumulate=4"], "trainer.accumulate: 4 does not agree: data.global_batch_size: 96 is 6 micro-"),
    ],
)  # fmt: skip
def test_a_global_batch_that_cannot_be_split_so_names_what_can(read, settings, message):
    with pytest.raises(RecipeError, match=message):
        read(GLOBAL, *settings)


DEVICES = ["trainer.devices=2", "trainer.num_nodes=3", "data.batch_size=8", "trainer.strategy=ddp"]


def test_who_shares_a_global_batch_is_no_part_of_the_identity(read, tmp_path):
    one, other = read(GLOBAL), read(GLOBAL, *DEVICES, "trainer.accelerator=auto")
    assert one.training() == other.training() and one.hash() == other.hash()
    assert one.training_hash() == other.training_hash()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(one.to_yaml())
    assert matches(tmp_path / "run", other) and not matches(tmp_path / "run", read("data.global_batch_size=48"))
    assert not matches(tmp_path / "run", read(GLOBAL, "trainer.strategy=fsdp")), "its checkpoints are of another form"
    assert read_resolved(tmp_path / "run" / "recipe.yaml") == one
    assert recipe_from(one.training() | {"data": {**one.training()["data"], "batch_size": 16}}, file="a").batches


def test_without_it_the_devices_are_part_of_the_identity(read):
    assert read().training() != read("trainer.devices=2").training()
    assert read().hash() != read(GLOBAL).hash()

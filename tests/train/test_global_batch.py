"""A run of a global batch goes on with other micro-batches and devices, and is the same up to the order of sums."""

from __future__ import annotations

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.train.module import DistillModule


def test_a_run_goes_on_with_other_micro_batches(tiny, tmp_path, monkeypatch):
    read = lambda *more: flowmap.read_recipe(tiny, ["data.global_batch_size=32", "trainer.steps=8", *more])
    flowmap.fit(read(), tmp_path / "whole", log=lambda line: None)
    lines: list[str] = []
    original = DistillModule.training_step

    def until_the_eighth(self, batch, batch_idx):
        if self.global_step == 7:
            raise RuntimeError("stopped here")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DistillModule, "training_step", until_the_eighth)
        with pytest.raises(RuntimeError, match="stopped here"):
            flowmap.fit(read(), tmp_path / "parts", log=lines.append)
    assert "batch: 32 samples a step: micro-batch 16 x accumulate 2 x 1 device x 1 node" in lines
    flowmap.fit(read("data.batch_size=4"), tmp_path / "parts", resume=True, log=lines.append)
    assert "resuming at step 6" in lines
    assert any(line.startswith("its steps before were split otherwise") and "micro-batch 16" in line for line in lines)
    one, two = (read_tensors(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "parts"))
    for name in one:  # Adam divides by the root of tiny second moments
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_more_processes_than_the_batch_was_split_for_are_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("lightning.Trainer.world_size", property(lambda self: 2))
    with pytest.raises(RecipeError, match=r"trainer.devices: 1 x trainer.num_nodes: 1 does not agree with the 2 proc"):
        flowmap.fit(flowmap.read_recipe(tiny, ["data.global_batch_size=16"]), tmp_path / "run", log=lambda line: None)

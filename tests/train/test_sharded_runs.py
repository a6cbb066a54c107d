"""Runs with sharded weights on two processes (FSDP2 on gloo): LoRA students, EDM2's scalars, resuming."""

from __future__ import annotations

import os
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowmap.base.files import read_tensors
from tests.train.test_lora_runs import RECIPE as LORA
from tests.train.test_lora_runs import pipeline_in
from tests.train.test_processes import assert_close
from tests.train.test_processes import fit as fit_alone

pytestmark = pytest.mark.slow
EDM2 = """\
name: tiny-edm2
data: {kind: digits, batch_size: 4}
student: {kind: edm2, channels: 16, multipliers: [1, 4], num_blocks: 1, attention_at: []}
objective: {kind: ayf_emd, warmup_steps: 4}
optimizer: {lr: 1.0e-3, clip_norm: 1.0}
sampler: {kind: deterministic, steps: [1]}
trainer: {steps: 8, checkpoint_every_steps: 4, accelerator: cpu, devices: 2}
ema: {kind: constant, decay: 0.9}
log: {wandb: false, every_steps: 1, grid_images: 8}
"""
fit = partial(fit_alone, timeout=600)  # of a busy machine
TWO = ["trainer.devices=2", "trainer.strategy=fsdp", "data.batch_size=4", "log.grid_images=4"]

BACKGROUND = """\
import os, sys, threading, time
from pathlib import Path
from flowmap.cli import main
from flowmap.train import strategy
from flowmap.train.module import DistillModule

here, rank = Path(__file__).parent, os.environ.get("LOCAL_RANK", "0")
step, write = DistillModule.training_step, strategy.write_shard
strategy.ShardedStrategy.in_background = lambda self: self._saved  # as on an accelerator

def training_step(self, batch, batch_idx):
    loss = step(self, batch, batch_idx)
    (here / f"trained-{self.global_step}-{rank}").touch()
    return loss

def write_shard(folder, shard, tensors):
    if threading.current_thread().name == "checkpoint":
        after = here / f"trained-{os.environ['AFTER']}-{rank}"  # a step that comes after the snapshot
        for _ in range(6000):  # if training waited for this file, it would never come
            if after.exists():
                break
            time.sleep(0.05)
        else:
            raise TimeoutError("training does not go on while the checkpoint is written")
        (here / f"written-{rank}").touch()
    write(folder, shard, tensors)

DistillModule.training_step, strategy.write_shard = training_step, write_shard
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def recipes(tmp_path):
    pipeline_in(tmp_path)
    (tmp_path / "lora.yaml").write_text(LORA.format(name="lora", card=tmp_path / "card.yaml", dropout=0.0))
    (tmp_path / "edm2.yaml").write_text(EDM2)
    return tmp_path


@pytest.mark.parametrize("name", ["lora", "edm2"])
def test_a_sharded_run_is_that_of_ddp_and_resumes_to_the_bit(recipes, name):
    path, settings = recipes / f"{name}.yaml", [*TWO, "trainer.steps=8", "trainer.checkpoint_every_steps=4"]
    runs = {key: recipes / key for key in ("ddp", "whole", "killed")}
    assert fit(path, runs["ddp"], *settings, "trainer.strategy=ddp")[0] == 0
    code, _, err = fit(path, runs["whole"], *settings)
    assert code == 0, err
    assert_close(runs["ddp"], runs["whole"], rtol=1e-4, atol=1e-4)
    assert fit(path, runs["killed"], *settings, spoil="kill")[0] != 0
    code, _, err = fit(path, runs["killed"], *settings, "--resume")
    assert code == 0 and "resuming at step 4" in err, err
    assert_close(runs["whole"], runs["killed"], rtol=0, atol=0)
    state = read_tensors(runs["whole"] / "student" / "model.safetensors")
    assert name == "edm2" or all("lora_" in key or "arrival" in key or "guidance" in key for key in state)
    assert name == "lora" or any(tensor.ndim == 0 for tensor in state.values()), "scalars keep their shape"


def test_a_lora_run_in_bf16_holds_its_base_in_bfloat16_on_each_process(recipes):
    code, _, err = fit(recipes / "lora.yaml", recipes / "run", *TWO, "trainer.precision=bf16")
    assert code == 0 and "Traceback" not in err, err
    state = read_tensors(recipes / "run" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_a_checkpoint_is_written_while_training_goes_on_and_has_the_weights_of_its_step(recipes, monkeypatch):
    """The second checkpoint, of step 4, is written only after step 5 has changed the weights in place."""
    steps = ["trainer.checkpoint_every_steps=2", "trainer.steps=6"]
    path, settings = recipes / "edm2.yaml", [*TWO, *steps, "trainer.keep_checkpoints=9"]
    code, _, err = fit(path, recipes / "whole", *settings)
    assert code == 0, err
    monkeypatch.setattr("tests.train.test_processes.SCRIPT", BACKGROUND)
    monkeypatch.setenv("AFTER", "5")
    code, _, err = fit(path, recipes / "background", *settings)
    assert code == 0, err
    assert all((recipes / f"written-{rank}").exists() for rank in range(2)), "by a thread, after a later step"
    for name in ("step-00000002", "step-00000004", "last"):
        one, two = (sorted((recipes / run / "checkpoints" / f"{name}.ckpt").glob("*.safetensors"))
                    for run in ("whole", "background"))  # fmt: skip
        assert len(one) == len(two) == 2
        for a, b in zip(one, two, strict=True):
            wanted, found = read_tensors(a), read_tensors(b)
            assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_a_sharded_run_with_a_quantised_base_is_that_of_ddp_and_resumes_to_the_bit(recipes):
    pytest.importorskip("bitsandbytes")
    path = recipes / "lora.yaml"
    settings = [*TWO, "trainer.steps=8", "trainer.checkpoint_every_steps=4", "quantize.frozen=nf4",
                "student.lora.targets=[to_q, net.2]"]  # fmt: skip
    runs = {key: recipes / key for key in ("ddp", "whole", "killed")}
    assert fit(path, runs["ddp"], *settings, "trainer.strategy=ddp")[0] == 0
    code, _, err = fit(path, runs["whole"], *settings)
    assert code == 0, err
    assert_close(runs["ddp"], runs["whole"], rtol=1e-4, atol=1e-4)
    assert fit(path, runs["killed"], *settings, spoil="kill")[0] != 0
    code, _, err = fit(path, runs["killed"], *settings, "--resume")
    assert code == 0 and "resuming at step 4" in err, err
    assert_close(runs["whole"], runs["killed"], rtol=0, atol=0)

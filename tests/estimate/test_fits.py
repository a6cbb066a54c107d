"""What a dry run says of memory: training and evaluation on a device, and a warning for each that does not fit."""

from dataclasses import replace

import pytest

from flowmap.estimate import fits
from flowmap.estimate.evaluation import EvaluationMemory, evaluation_bytes
from flowmap.estimate.fits import H100, OWN, device_memory, memory_lines
from flowmap.estimate.memory import Memory
from flowmap.estimate.networks import config_without_weights
from flowmap.estimate.outlines import Outlines
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe

GIB = 2**30
DDP = ("trainer.accelerator=gpu", "trainer.devices=8", "trainer.strategy=ddp")


def memory(activations=1.0, weights=1.0):
    return Memory(weights * GIB, 0, 0, 0, 0, 0, activations * GIB)


def warnings_of(settings, training, evaluation):
    lines = memory_lines(read_recipe("digits", settings), training, evaluation)
    return [line for line in lines if line.startswith("warning")]


def test_what_fits_is_not_warned_of_and_what_does_not_is_with_what_to_change(monkeypatch):
    monkeypatch.setattr(fits, "on_gpus", lambda accelerator: False)
    edge = (H100[1] - OWN) / GIB
    small = EvaluationMemory(0, GIB, 0, 0, 0, 0)
    assert warnings_of(DDP, memory(edge - 1.1), small) == []
    (training,) = warnings_of(DDP, memory(edge), small)
    assert "training does not fit an H100 (79.10 GiB" in training and "lower data.batch_size" in training
    assert "trainer.strategy=fsdp" in training and "trainer.activation_checkpointing=true" in training
    (evaluation,) = warnings_of(DDP, memory(1), EvaluationMemory(0, edge * GIB, 0, 0, 0, 0))
    assert "the evaluation does not fit" in evaluation and "evaluation.batch_size" in evaluation
    assert warnings_of(["trainer.accelerator=cpu"], memory(1000), small) == []


def test_text_encoders_of_captions_have_a_part_of_their_own():
    training = replace(memory(activations=7, weights=3), text=2 * GIB)
    line, measuring = memory_lines(read_recipe("digits"), training, EvaluationMemory(0, GIB, 0, 0, 0, 0))
    assert "3.00 GiB weights" in line and "+ 2.00 GiB text encoders +" in line and line.endswith("= 12.00 GiB")
    assert "5.00 GiB that training keeps" in measuring


def test_the_evaluation_is_beside_what_training_keeps():
    training, evaluation = memory(activations=7, weights=3), EvaluationMemory(1 * GIB, 2 * GIB, 4 * GIB, 0, 0, 5 * GIB)
    line = memory_lines(read_recipe("digits"), training, evaluation)[1]
    assert "3.00 GiB that training keeps" in line and "= 8.00 GiB; 5.00 GiB of the host" in line
    assert len(memory_lines(read_recipe("digits"), training, None)) == 1


def test_without_a_gpu_the_device_is_the_h100_of_the_assumptions(monkeypatch):
    monkeypatch.setattr(fits, "on_gpus", lambda accelerator: False)
    assert device_memory("auto") == H100


@pytest.mark.slow
def test_text_encoders_stay_on_the_device_where_prompts_of_a_file_are_encoded():
    def weights(*settings):
        run = resolve(read_recipe("sd35-medium", list(settings)))
        return evaluation_bytes(run, config_without_weights(run, Outlines().of(run, whole=False)[0])).weights

    assert weights() - weights("evaluation.captions=null", "metrics=[]") == pytest.approx(
        4 * 5.6e9 + 109e6 + 1711e6, rel=1e-3
    )


def test_a_gpu_that_is_asked_about_replaces_this_machines(monkeypatch):
    name, there = device_memory("cpu", 24)
    assert name == "a GPU of 24 GB" and there / GIB == pytest.approx(23.64)
    assert device_memory("auto", 80)[1] == pytest.approx(H100[1], rel=0.005)
    lines = memory_lines(read_recipe("digits", ["trainer.accelerator=cpu"]), memory(22), None, 24)
    assert "training does not fit a GPU of 24 GB (23.64 GiB" in lines[1]

"""The learned weight in a run: trained, averaged, checkpointed and resumed with the student; it does not ship."""

from __future__ import annotations

import signal

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.uncertainty import with_uncertainty
from flowmap.recipe import read_recipe
from flowmap.train.adversarial import last_layer
from flowmap.train.strategy import read_checkpoint
from tests.conftest import TINY
from tests.train.test_resume import assert_same_run, in_process, trace

WEIGHTED = TINY.replace("{kind: ayf_emd, warmup_steps: 12}", "{kind: lsd, weight: {kind: learned}}").replace(
    "steps: 20", "steps: 12"
)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "weighted.yaml"
    path.write_text(WEIGHTED)
    return path


@pytest.mark.parametrize(
    "overrides", [[], ["objective={kind: scm, warmup_steps: 4, weight: {kind: learned}}"]], ids=["lsd", "scm"]
)
def test_it_trains_and_does_not_ship(path, tmp_path, overrides):
    folder = flowmap.fit(read_recipe(path, overrides), tmp_path / "run", log=lambda message: None).folder
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    branch = {name: tensor for name, tensor in state.items() if name.startswith("student.uncertainty.")}
    assert branch and float(branch["student.uncertainty.leave.weight"].abs().max()) > 0, "from zero"
    shipped = [folder / "student" / "model.safetensors", *sorted((folder / "ema").glob("*.safetensors"))]
    assert len(shipped) > 1
    for file in shipped:
        assert not any("uncertainty" in name for name in read_tensors(file))
    student = flowmap.load_student(folder)
    assert student.flow_map.uncertainty is None and student.sample(3, steps=2).shape == (3, 2)
    assert float(trace(folder)[-1]["train/error"]) > 0, "the error itself is logged beside the loss"


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(path, tmp_path):
    assert in_process(path, tmp_path / "whole") == 0
    assert in_process(path, tmp_path / "killed", {"kind": "step", "count": 8}) == -signal.SIGKILL
    assert in_process(path, tmp_path / "killed") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_without_it_there_is_no_such_branch(path, tmp_path):
    folder = flowmap.fit(
        read_recipe(path, ["objective.weight.kind=none", "trainer.steps=2"]), tmp_path / "run", log=lambda message: None
    ).folder
    assert not any(
        "uncertainty" in name for name in read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    )


def test_the_branch_is_the_same_for_the_same_seed_and_is_not_the_last_layer():
    student = with_uncertainty(FlowMapNet(MLP(width=8).build((2,))), 3)
    assert last_layer(student) is dict(student.named_parameters())["net.leave.weight"]
    again = with_uncertainty(FlowMapNet(MLP(width=8).build((2,))), 3)
    for name, tensor in student.uncertainty.state_dict().items():
        assert torch.equal(tensor, again.uncertainty.state_dict()[name])

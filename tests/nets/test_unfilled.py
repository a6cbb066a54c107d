"""Large networks are loaded without memory for weights of their own: these stay in the memory-mapped file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import KEPT
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.unfilled import weights_dropped, without_weights
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student, save_student
from tests.support.families import FAMILIES
from tests.support.tiny_nets import sd3

diffusers = pytest.importorskip("diffusers")
ROLLUP = Path("/proc/self/smaps_rollup")
LARGE = dict(num_attention_heads=8, attention_head_dim=64, num_layers=6)  # about 110 MB
pytestmark = pytest.mark.skipif(not ROLLUP.is_file(), reason="only Linux says what memory is a process's own")


def own_bytes() -> int:
    """Memory that is this process's alone: not the pages of files, which all processes of a machine share."""
    return next(int(line.split()[1]) << 10 for line in ROLLUP.read_text().splitlines() if line.startswith("Anonymous:"))


def twice(load):
    """What two calls return, both kept, and the lesser of their own bytes: the allocator may also take back others."""
    kept, sizes = [], [own_bytes()]
    for _ in range(2):
        kept.append(load())
        sizes.append(own_bytes())
    return kept, min(sizes[1] - sizes[0], sizes[2] - sizes[1])


def settings():
    config = {key: value for key, value in dict(sd3().config).items() if not key.startswith("_")}
    return json.dumps(config | LARGE | {"joint_attention_dim": 32})


def spec():
    return DiffusersModel("SD3Transformer2DModel", settings(), "FlowMatchEulerDiscreteScheduler", "{}")


def test_parameters_have_no_memory_and_constants_have_values():
    with without_weights():
        net = spec().build((4, 8, 8))
    real = spec().build((4, 8, 8))
    assert {p.device.type for p in net.parameters()} == {"meta"}
    for (name, buffer), other in zip(net.named_buffers(), real.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert {p.device.type for p in real.parameters()} == {"cpu"}, "outside the context all is as before"


def test_a_student_and_a_pipeline_stay_in_their_files(tmp_path):
    config = StudentConfig(spec(), Deterministic(), (4, 8, 8))
    student = config.build()
    size = sum(p.numel() * 4 for p in student.parameters())
    save_student(tmp_path / "student", config, student.state_dict(), recipe="", card="")
    student.net.model.save_pretrained(tmp_path / "pipe" / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    parts = {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    parts["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(parts))
    want = {name: tensor[:1].clone() for name, tensor in student.state_dict().items()}
    (loaded, _), grown = twice(lambda: load_student(tmp_path / "student"))
    assert grown < 0.2 * size
    assert all(torch.equal(tensor[:1], want[name]) for name, tensor in loaded.flow_map.state_dict().items())
    pytest.importorskip("accelerate")
    ((_, net), _), grown = twice(lambda: load_pretrained(str(tmp_path / "pipe")))
    assert grown < 0.2 * size
    assert all(torch.equal(tensor[:1], want[f"net.{name}"]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["sd15", "sd35", "sana", "flux", "pixart", "dit_xl"])  # pipelines' networks
def test_a_network_that_drops_its_weights_leaves_the_generator_and_its_branches_as_they_were(name):
    torch.manual_seed(3)
    whole = FlowMapNet(FAMILIES[name].build())
    drawn = torch.rand(())
    torch.manual_seed(3)
    with weights_dropped(KEPT):
        dropped = FlowMapNet(FAMILIES[name].build())
    assert torch.equal(torch.rand(()), drawn)
    there = dict(dropped.named_parameters())
    assert all(p.is_meta or torch.equal(p, there[key]) for key, p in whole.named_parameters() if not there[key].is_meta)
    real = sum(p.numel() for p in there.values() if not p.is_meta)
    assert real <= sum(p.numel() for module in whole.modules() if isinstance(module, KEPT) for p in module.parameters())

"""A fully trained student of a sharded run starts in the memory of its teacher, and is what it would be otherwise."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import flowmap
from flowmap.plan.plan import resolve
from flowmap.train.sharding import shard
from flowmap.train.stage import Built
from tests.nets.test_stored_precision import saved
from tests.support.fake_group import lone_group
from tests.support.tiny_nets import dit, with_random_weights
from tests.train.test_lora_runs import RECIPE

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_student_takes_no_memory_of_its_own_until_it_is_sharded(tmp_path, precision):
    torch.manual_seed(0)
    source = saved(with_random_weights(dit(channels=1), scale=0.15).to(torch.bfloat16), tmp_path)
    (tmp_path / "card.yaml").write_text(f"kind: diffusers\nsource: {source}\nshape: [1, 8, 8]\nnum_classes: 10\n")
    (tmp_path / "full.yaml").write_text(RECIPE.format(name="full", card=tmp_path / "card.yaml", dropout=0.0))
    settings = ["student={kind: from_teacher}", f"trainer.precision={precision}"]
    read = lambda *more: Built.of(resolve(flowmap.read_recipe(tmp_path / "full.yaml", [*settings, *more])), print)
    plain, built = read(), read("trainer.strategy=fsdp")
    teacher = {p.data_ptr() for p in built.teacher.network.flow_map.parameters()}
    student = dict(built.module.student.named_parameters())
    own = [name for name, p in student.items() if p.data_ptr() not in teacher]
    assert own and all(".arrival." in name or ".guidance." in name for name in own)
    with lone_group():
        mesh = init_device_mesh("cpu", (1,))
        for net, wanted in zip(
            (built.module.student, *built.module.averages), (plain.module.student, *plain.module.averages), strict=True
        ):
            shard(net, mesh, dtype=torch.bfloat16 if precision == "bf16" else None)
            for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
                assert p.dtype == torch.float32 and torch.equal(p.full_tensor(), q), name
                assert p.requires_grad == q.requires_grad
        for p in built.module.student.parameters():
            p.data.zero_()
    assert all(bool(p.any()) for p in built.teacher.network.flow_map.parameters() if p.ndim > 1), "sharding has copied"

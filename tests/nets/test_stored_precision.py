"""Pipelines stored in bfloat16 are loaded without copies in float32, and give the same run."""

from __future__ import annotations

import json
import os
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowmap
from flowmap.nets.lora import fingerprint
from flowmap.nets.precision import rounded_parameters
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.weight_files import stored_in_bfloat16
from flowmap.plan.plan import resolve
from flowmap.train.stage import Built
from tests.support.tiny_nets import dit, sd3, with_random_weights
from tests.train.test_lora_runs import RECIPE

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")


class Allocated(TorchDispatchMode):
    """Tracks the bytes of new float32 tensors on the CPU that are alive at once: `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dtype == torch.float32:
                storage = x.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def saved(net, place, shard="10GB"):
    """The network's pipeline in that folder, in the precision of its weights."""
    net.save_pretrained(place / "pipe" / "transformer", max_shard_size=shard)
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(place / "pipe" / "scheduler")
    parts = {
        "_class_name": "Pipeline",
        "transformer": ["diffusers", type(net).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (place / "pipe" / "model_index.json").write_text(json.dumps(parts))
    return str(place / "pipe")


@pytest.mark.parametrize("make", [dit, sd3])
def test_layers_keep_the_precision_of_the_files_and_all_else_is_as_in_float32(tmp_path, make):
    torch.manual_seed(0)
    source = saved(with_random_weights(make()).to(torch.bfloat16), tmp_path, shard="20KB")
    assert stored_in_bfloat16(tmp_path / "pipe" / "transformer")
    _, whole = load_pretrained(source)
    with Allocated() as allocated:
        _, half = load_pretrained(source, as_stored=True)
    layers = {id(p) for p in rounded_parameters(half)}
    for (name, p), q in zip(half.named_parameters(), whole.parameters(), strict=True):
        assert p.dtype == (torch.bfloat16 if id(p) in layers else torch.float32), name
        assert torch.equal(p.float(), q), name
    for (name, p), q in zip(half.named_buffers(), whole.named_buffers(), strict=True):
        assert p.dtype == q[1].dtype and torch.equal(p, q[1]), name
    others = sum(p.numel() * 4 for p in half.parameters() if id(p) not in layers)
    others += sum(b.numel() * 4 for b in half.buffers())
    weights = sum(p.numel() * 4 for p in half.parameters() if id(p) in layers)
    with Allocated() as of_float32:
        load_pretrained(source)
    assert of_float32.peak >= weights, "in float32 all are converted"
    assert allocated.peak < 2 * others + weights / 4, "here no more than one layer at a time has room in float32"
    assert fingerprint(half.model) == fingerprint(whole.model)


def test_files_in_float32_are_loaded_in_float32(tmp_path):
    source = saved(with_random_weights(dit()), tmp_path)
    assert not stored_in_bfloat16(tmp_path / "pipe" / "transformer")
    assert {p.dtype for p in load_pretrained(source, as_stored=True)[1].parameters()} == {torch.float32}


def test_a_lora_run_on_stored_weights_is_that_on_rounded_ones(tmp_path):
    """The same adapters are drawn, and student and teacher are the same to the bit."""
    built = []
    for dtype in (torch.bfloat16, torch.float32):
        place = tmp_path / str(dtype)
        place.mkdir()
        torch.manual_seed(0)
        source = saved(with_random_weights(dit(channels=1), scale=0.15).to(torch.bfloat16).to(dtype), place)
        (place / "card.yaml").write_text(f"kind: diffusers\nsource: {source}\nshape: [1, 8, 8]\nnum_classes: 10\n")
        (place / "lora.yaml").write_text(RECIPE.format(name="lora", card=place / "card.yaml", dropout=0.0))
        built.append(Built.of(resolve(flowmap.read_recipe(place / "lora.yaml", ["trainer.precision=bf16"])), print))
    one, two = (each.module.student for each in built)
    assert built[0].config.base.sha256 == built[1].config.base.sha256
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
        assert not p.requires_grad or p.dtype == torch.float32, name
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.8]), {"class": torch.arange(3)}
    cond["guidance"] = torch.ones(3)
    values = [each.teacher.network.flow_map.velocity(x, t, cond) for each in built]
    assert torch.equal(*values) and torch.equal(values[0], one.eval().velocity(x, t, cond))

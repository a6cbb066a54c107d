"""LoRA on diffusers networks: initially the identity, trained and saved alone, dual forward, merging, file format.

Real architectures with small random weights.
"""

from __future__ import annotations

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from flowmap.flow.derivative import eulerian_derivative, value_and_rate
from flowmap.nets.adapters import AdapterAverage, share_base, shares_base
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet, clock_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import Base, LoRA, add_lora, fingerprint, load_base, merged
from flowmap.train.sharding import shard
from tests.support.tiny_nets import dit, sd, sd3, with_random_weights

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
B = 5
EVERY = ("to_q", "to_k", "to_v", "to_out.0")


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


COND = {
    "text": numbers(B, 6, 32),
    "pooled": numbers(B, 24),
    "class": torch.arange(B),
    "guidance": torch.linspace(1, 2, B),
}
FAMILIES = {
    "DiT": (dit, diffusers.DDIMScheduler, LoRA(rank=3)),
    "SD3": (
        sd3,
        diffusers.FlowMatchEulerDiscreteScheduler,
        LoRA(rank=3, alpha=5.0, targets=(*EVERY, "linear_1", "proj_out")),
    ),
    "SD": (sd, diffusers.DDIMScheduler, LoRA(rank=3, targets=(*EVERY, "conv1", "proj_in"))),  # convolutions as well
}
families = pytest.mark.parametrize("family", FAMILIES)


def teacher_of(family) -> DiffusersNet:
    make, scheduler, _ = FAMILIES[family]
    torch.manual_seed(0)
    net = with_random_weights(make())
    return DiffusersNet(net, *clock_of(scheduler()), arrival=False, guidance=False).eval().requires_grad_(False)


def student_of(family, *, loud=False) -> tuple[DiffusersNet, FlowMapNet]:
    teacher = teacher_of(family)
    net = teacher.with_branches(arrival=True, guidance=True)
    add_lora(net, FAMILIES[family][2])
    if loud:
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return teacher, FlowMapNet(net).eval()


def times():
    return torch.linspace(0.3, 0.9, B), torch.linspace(0.1, 0.5, B)


@families
def test_a_student_starts_as_its_teacher_to_the_bit_and_shares_its_weights(family):
    teacher, student = student_of(family)
    x, (t, s) = numbers(B, 4, 8, 8), times()
    with torch.no_grad():
        assert torch.equal(student.mean_velocity(x, t, s, COND), teacher(x, t, t, COND))
    base = {id(p) for p in teacher.parameters()}
    assert {id(p) for p in student.parameters() if not p.requires_grad} == base
    names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert names and all(
        ".lora_A." in n or ".lora_B." in n or n.startswith(("net.arrival.", "net.guidance.")) for n in names
    )


@families
def test_the_state_is_what_is_trained_and_goes_back_strictly(family):
    teacher, student = student_of(family, loud=True)
    before = fingerprint(teacher.model)
    state = copy.deepcopy(student.state_dict())
    assert set(state) == {name for name, p in student.named_parameters() if p.requires_grad}
    _, fresh = student_of(family)
    x, (t, s) = numbers(B, 4, 8, 8), times()
    for assign in (False, True):
        fresh.load_state_dict(state, assign=assign)
        with torch.no_grad():
            assert torch.equal(fresh.mean_velocity(x, t, s, COND), student.mean_velocity(x, t, s, COND))
    for wrong in ({k: v for k, v in list(state.items())[1:]}, state | {"net.odd": torch.ones(1)}):
        with pytest.raises(RuntimeError, match="Missing|Unexpected"):
            fresh.load_state_dict(wrong)
    both = torch.nn.ModuleList([student, copy.deepcopy(student)])  # as inside a larger module, copied
    assert len(both.state_dict()) == 2 * len(state)
    both.load_state_dict(both.state_dict())
    assert fingerprint(teacher.model) == before


@pytest.mark.parametrize("family", ["SD3", "SD"])
def test_the_tangent_rides_through_the_adapters(family):
    student = student_of(family, loud=True)[1].double()
    x, v = numbers(B, 4, 8, 8).double(), numbers(B, 4, 8, 8).flip(0).double()
    t, s = (time.double() for time in times())
    cond = {key: value.double() if value.is_floating_point() else value for key, value in COND.items()}
    value, rate = eulerian_derivative(student, x, t, s, v, cond, mode="dual")
    ordinary, reference = eulerian_derivative(student, x, t, s, v, cond, mode="forward")
    assert torch.equal(value, ordinary)
    assert (rate - reference).norm() < 1e-10 * reference.norm()
    value.sum().backward()
    ridden = [p.grad for p in student.parameters() if p.requires_grad]
    student.zero_grad()
    ordinary.sum().backward()
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(ridden, (p for p in student.parameters() if p.requires_grad), strict=True)
    )
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)


def test_under_dropout_value_and_tangent_see_one_mask():
    teacher = teacher_of("SD3")
    net = teacher.with_branches(arrival=True, guidance=False)
    add_lora(net, LoRA(rank=3, dropout=0.5))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.copy_(numbers(*p.shape))
    student = FlowMapNet(net).double().train()
    x, (t, s), cond = numbers(B, 4, 8, 8).double(), times(), {k: COND[k].double() for k in ("text", "pooled")}
    v = numbers(B, 4, 8, 8).flip(0).double()

    def at(h):
        torch.manual_seed(1)
        return student.mean_velocity(x + h * v, t, s, cond)

    torch.manual_seed(1)
    value, rate = value_and_rate(lambda x: student.mean_velocity(x, t, s, cond), (x,), (v,))
    with torch.no_grad():
        assert torch.equal(value, at(0))
        difference = (at(1e-5) - at(-1e-5)) / 2e-5
        assert (rate - difference).norm() < 1e-6 * difference.norm()
        assert not torch.equal(student.mean_velocity(x, t, s, cond), student.mean_velocity(x, t, s, cond))
        student.eval()
        assert torch.equal(student.mean_velocity(x, t, s, cond), student.mean_velocity(x, t, s, cond))


@families
def test_merged_is_the_same_map_with_the_teachers_names(family):
    teacher, student = student_of(family, loud=True)
    before = fingerprint(teacher.model)
    alone = FlowMapNet(merged(student.net)).eval()
    x, (t, s) = numbers(B, 4, 8, 8), times()
    with torch.no_grad():
        wanted, got = (net.mean_velocity(x, t, s, COND) for net in (student, alone))
        silent = teacher(x, t, t, COND)
    assert (got - wanted).abs().max() < 1e-6 * max(1, float(wanted.abs().max()))
    assert (silent - wanted).abs().max() > 1e-3
    assert set(alone.net.model.state_dict()) == set(teacher.model.state_dict())
    assert fingerprint(teacher.model) == before and student.net.frozen, "the student keeps its base and its adapters"


def test_diffusers_writes_and_reads_the_adapters_as_its_own(tmp_path):
    _, student = student_of("SD3", loud=True)
    student.net.model.save_lora_adapter(tmp_path)
    other = teacher_of("SD3")
    other.model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    student.net.arrival, student.net.guidance = None, None
    x, (t, _) = numbers(B, 4, 8, 8), times()
    with torch.no_grad():
        assert torch.equal(other(x, t, t, COND), student.mean_velocity(x, t, t, COND))


@pytest.mark.parametrize(
    ("targets", "says"),
    [(("nothing",), "'nothing' matches no layer .*to_q.*to_out.0"), (("to_q", "attn"), "'attn' matches .*, a .*to_k")],
)
def test_targets_that_match_nothing_are_named(targets, says):
    net = teacher_of("SD3")
    with pytest.raises(ValueError, match=f"^lora.targets: {says}"):
        add_lora(net, LoRA(targets=targets))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank: 0"),
        ({"alpha": 0.0}, "alpha: 0"),
        ({"targets": ()}, "targets:"),
        ({"targets": ("",)}, "targets:"),
        ({"dropout": 1.0}, "dropout: 1"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        LoRA(**settings)


def test_a_base_is_the_one_trained_on_or_refused(tmp_path):
    teacher, scheduler = teacher_of("DiT"), diffusers.DDIMScheduler()

    def write(model, folder):
        model.save_pretrained(tmp_path / folder / "transformer")
        scheduler.save_pretrained(tmp_path / folder / "scheduler")
        parts = {
            "_class_name": "DiTPipeline",
            "transformer": ["diffusers", type(model).__name__],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
        (tmp_path / folder / "model_index.json").write_text(json.dumps(parts))
        return str(tmp_path / folder)

    spec = DiffusersModel(
        "DiTTransformer2DModel",
        json.dumps(dict(teacher.model.config)),
        "DDIMScheduler",
        json.dumps(dict(scheduler.config)),
    )
    base = Base(write(teacher.model, "one"), None, fingerprint(teacher.model))
    assert fingerprint(load_base(base, spec).model) == base.sha256
    with torch.no_grad():
        next(teacher.model.parameters()).view(-1)[0] += 1e-3
    other = Base(write(teacher.model, "two"), "v2", base.sha256)
    with pytest.raises(
        ValueError,
        match=rf"two \(revision v2\): its weights have SHA-256 {fingerprint(teacher.model)[:12]}.*{base.sha256[:12]}",
    ):
        load_base(other, spec)
    with pytest.raises(ValueError, match="three: is another network .*: "):
        load_base(Base(write(sd3(), "three")), spec)
    with pytest.raises(ValueError, match="no diffusers pipeline is there"):
        load_base(Base(str(tmp_path / "four")), spec)


@pytest.mark.parametrize("sharded", [False, True])
@families
def test_an_average_of_adapters_is_the_students_network_with_other_adapters(family, sharded):
    """Against a copy of the student, and the student is as before; a forward pass of it sees its own adapters."""
    from tests.support.fake_group import lone_group

    _, student = student_of(family, loud=True)
    average, twin = AdapterAverage(student).requires_grad_(False), copy.deepcopy(student)
    x, (t, s) = numbers(B, 4, 8, 8), times()
    with torch.no_grad(), lone_group():
        before = student.mean_velocity(x, t, s, COND)
        if sharded:
            shard(student, init_device_mesh("cpu", (1,)))
            average.follow()
        assert {name for name, _ in average.named_parameters()} == set(twin.state_dict())
        assert set(average.state_dict()) == set(twin.state_dict()) and not list(average.buffers())
        assert torch.equal(average.mean_velocity(x, t, s, COND), before)
        for net in (average, twin):
            for name, p in net.named_parameters():
                if p.requires_grad or net is average:
                    p.mul_(1.5) if "lora_B" in name else p.mul_(0.5)
        assert torch.equal(average.velocity(x, t, COND), twin.velocity(x, t, COND))
        assert not torch.equal(average.mean_velocity(x, t, s, COND), before)
        assert torch.equal(student.mean_velocity(x, t, s, COND), before) and not student.training


@families
def test_under_fsdp_the_teacher_is_the_students_base_held_once(family):
    """A call between the student's forward and backward pass changes neither."""
    from tests.support.fake_group import lone_group

    net, student = student_of(family, loud=True)
    teacher, x, (t, s) = FlowMapNet(net), numbers(B, 4, 8, 8), times()
    other, _ = student_of(family, loud=True)
    assert shares_base(teacher, student) and not shares_base(FlowMapNet(other), student)
    wanted, value = teacher.velocity(x, t, COND), student.mean_velocity(x, t, s, COND)
    value.sum().backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    with lone_group():
        shard(student, init_device_mesh("cpu", (1,)))
        share_base(teacher, student)
        assert not list(teacher.parameters())
        again = student.mean_velocity(x, t, s, COND)
        assert torch.equal(teacher.velocity(x, t, COND), wanted)
        again.sum().backward()
        assert torch.equal(again, value)
        for name, p in student.named_parameters():
            assert (name in grads) == p.requires_grad
            if p.requires_grad:  # sums of other memory layouts are rounded otherwise
                scale = float(grads[name].abs().max())
                assert torch.allclose(p.grad.full_tensor(), grads[name], rtol=1e-5, atol=1e-5 * scale), name

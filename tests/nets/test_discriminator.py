"""Discriminators: one score per row, independent rows, classes by projection, frozen networks not in the state."""

from __future__ import annotations

import pytest
import torch

from flowmap.nets import DISCRIMINATORS, DiT
from flowmap.nets.discriminator import Conv
from flowmap.nets.discriminator_features import OnFeatures, OnTeacher, row_of_blocks
from flowmap.nets.edm2 import EDM2
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.objectives.adversarial import discriminator_loss, squared_gradient

SHAPE = (3, 8, 12)


def teacher(spec=None, shape=SHAPE):
    torch.manual_seed(1)
    net = (
        FlowMapNet((spec or DiT(preset="nano", depth=5)).build(shape, num_classes=7, arrival=False))
        .requires_grad_(False)
        .eval()
    )
    with torch.no_grad():
        for parameter in net.parameters():  # zero-initialised gates would hide the blocks
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return net


def colours(x):
    """A packaged network of two depths."""
    return [x.square(), torch.tanh(x[:, :, ::2, ::2])]


def built(kind):
    torch.manual_seed(0)
    if kind == "teacher":
        net = OnTeacher(width=8).build(
            SHAPE, network=teacher().net, example={"class": torch.zeros(1, dtype=torch.int64)}, num_classes=7
        )
    elif kind == "features":
        net = OnFeatures(net="some:net", size=16, width=8).build(SHAPE, call=colours, num_classes=7)
    else:
        net = Conv(width=8).build(SHAPE, num_classes=7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(5, *SHAPE, generator=generator),
        {"class": torch.tensor([0, 3, -1, 6, 3])},
        torch.randn(5, *SHAPE, generator=generator),
    )


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_score_is_a_rows_own(kind):
    net, (x, cond, noise) = built(kind), rows()
    scores = net(x, cond, noise)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x[order], {"class": cond["class"][order]}, noise[order]), scores[order])
    x[0] += 1
    assert (
        torch.equal(net(x, cond, noise)[1:] != scores[1:], torch.zeros(4, dtype=torch.bool))
        and net(x, cond, noise)[0] != scores[0]
    )


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_class_moves_the_score_and_no_class_is_the_unconditional_one(kind):
    net, (x, cond, noise) = built(kind), rows()
    if kind == "teacher":
        net.features = lambda *a, of=net.features: of(a[0], None, a[2])  # the frozen network knows the class as well
    plain, given = net(x, None, noise), net(x, cond, noise)
    assert torch.equal(plain == given, cond["class"] == -1)


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_the_penalties_reach_every_weight_through_the_second_derivative(kind):
    net, (x, cond, noise) = built(kind), rows()
    loss = discriminator_loss(net, x, x.flip(0), cond, noise, r1=1.0, r2=1.0)
    loss.value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    assert float(loss.logs["r1"]) > 0 and float(loss.logs["r2"]) > 0


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_autocast_does_not_reach_inside(kind):
    net, (x, cond, noise) = built(kind), rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x, cond, noise), net(x, cond, noise))
        inside = net(x, cond, noise)
    assert torch.equal(inside, net(x, cond, noise))


def test_the_frozen_networks_are_no_part_of_them():
    network = teacher()
    net = OnTeacher(width=8).build(SHAPE, network=network.net, example={"class": torch.zeros(1, dtype=torch.int64)})
    assert all(name.startswith("heads.") for name in net.state_dict())
    assert not {id(p) for p in net.parameters()} & {id(p) for p in network.parameters()}
    x = rows()[0].requires_grad_()
    net(x).sum().backward()
    assert all(p.grad is None for p in network.parameters()) and float(x.grad.abs().max()) > 0
    assert not any(block._forward_hooks for block in network.net.blocks), "hooks are gone after a pass"
    module = torch.nn.Conv2d(3, 4, 1)
    looking = OnFeatures(net="some:net", width=8).build(SHAPE, call=module)
    assert all(name.startswith("heads.") for name in looking.state_dict())
    assert next(looking.double()._frozen[0].parameters()).dtype == torch.float64, "it goes where the heads go"


def test_the_teacher_sees_the_noised_point_and_its_chosen_blocks():
    network, (x, _, noise) = teacher().net, rows()
    net = OnTeacher(width=8, time=0.25, blocks=(1, 4)).build(SHAPE, network=network, example={})
    heard = net.features(x, None, noise)
    t = torch.full((5,), 0.25)
    out = []
    hook = network.blocks[4].register_forward_hook(lambda block, given, result: out.append(result))
    network(0.75 * x + 0.25 * noise, t, t, None)
    hook.remove()
    assert len(heard) == 2
    torch.testing.assert_close(heard[1], out[0])
    spread = OnTeacher().build(SHAPE, network=network, example={})
    assert spread._blocks == tuple(network.blocks[i] for i in (0, 1, 3, 4))


UNET = EDM2(channels=8, multipliers=(1, 2), num_blocks=1, attention_at=(4,))


@pytest.mark.parametrize(("spec", "shape"), [(MLP(width=8), (2,)), (UNET, (3, 8, 8))])
def test_other_networks_have_blocks_too(spec, shape):
    network = teacher(spec, shape)
    net = OnTeacher(width=8).build(shape, network=network.net, example={"class": torch.zeros(1, dtype=torch.int64)})
    x = torch.randn(5, *shape).requires_grad_()
    assert float(squared_gradient(net(x), x).detach().min()) > 0


OF_DIFFUSERS = "sd3 flux sd dit pixart sana qwen flux2 hunyuan_image lumina2 z_image aura_flow".split()


@pytest.mark.parametrize("family", OF_DIFFUSERS)
def test_so_have_those_of_diffusers(family):
    from flowmap.flow.clock import FlowClock
    from flowmap.nets.diffusers_model import DiffusersNet
    from tests.support import tiny_nets

    torch.manual_seed(0)
    model = tiny_nets.with_random_weights(getattr(tiny_nets, family)(), scale=0.2)
    network = DiffusersNet(model, FlowClock(), "linear_velocity", arrival=False, guidance=False).requires_grad_(False)
    cond = {
        "text": torch.randn(2, 6, tiny_nets.TEXT),
        "pooled": torch.randn(2, tiny_nets.POOLED),
        "class": torch.tensor([1, 2]),
    }
    example = {key: value[:1] for key, value in cond.items()}
    net = OnTeacher(width=8).build((4, 8, 8), network=network, example=example)
    x = torch.randn(2, 4, 8, 8).requires_grad_()
    penalty = squared_gradient(net(x, cond), x)
    penalty.sum().backward()
    assert float(penalty.detach().min()) > 0 and bool(net.heads[0].enter.weight.grad.isfinite().all())
    assert len(row_of_blocks(network)) > 0


def test_sizes_halve_down_to_four():
    widths = lambda net: [block.second.out_channels for block in net.blocks]
    assert widths(Conv(width=8).build((1, 8, 8))) == [8, 16]
    assert widths(Conv(width=8, max_width=24).build((4, 64, 64))) == [8, 16, 24, 24, 24]
    assert widths(Conv(width=8, depth=0).build((1, 8, 8))) == [8]
    assert Conv(width=8).build((1, 14, 14))(torch.zeros(2, 1, 14, 14)).shape == (2,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Conv(width=0), "width: 0"),
        (lambda: Conv(depth=-1), "depth: -1"),
        (lambda: Conv().build((2,)), r"kind: 'conv' wants pictures or latents .*\(2,\)"),
        (lambda: Conv(depth=4).build((1, 8, 8)), "depth: 4"),
        (lambda: OnTeacher(time=1.0), "time: 1.0"),
        (
            lambda: OnTeacher(blocks=(9,)).build(SHAPE, network=teacher().net, example={}),
            r"blocks: \(9,\) must lie in 0..4",
        ),
        (lambda: OnTeacher().build(SHAPE, network=torch.nn.Linear(2, 2), example={}), "row of blocks"),
        (lambda: OnFeatures(net="inception"), "net: 'inception' is not efficientnet_lite0 or package.mod:attr"),
        (lambda: OnFeatures(size=-1), "size: -1"),
        (lambda: OnFeatures().build((4, 8, 8), call=colours), "1 or 3 channels"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()

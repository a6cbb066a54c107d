"""The diffusion transformer: sizes, patches, blocks left out, activation checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.flow.path import Linear
from flowmap.nets.dit import PRESETS, DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD, AYFLMD
from flowmap.plan.plan import resolve
from flowmap.recipe import RecipeError, read_recipe
from tests.support.oracle import GAUSSIAN, SHAPE, draw, draw_times

SMALL = DiT(width=24, depth=3, heads=2)


def built(loud=True, **options):
    torch.manual_seed(0)
    net = SMALL.build(SHAPE[1:], **options)
    if loud:
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
    return net.double()


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("preset", "published"), [("S", 33e6), ("B", 130e6), ("L", 458e6), ("XL", 675e6)])
def test_presets_are_as_large_as_the_published_ones(preset, published):
    """DiT-*/2 for 4x32x32 and 1000 classes (arXiv:2212.09748, table 4), to 0.5 %.

    A block has the published weights: SwiGLU of 8/3 w costs what a perceptron of 4 w does. What differs: biases of
    SwiGLU (16/3 w for 4 w), 64 instead of 256 time frequencies, no learned variance (half the last layer). Arrival
    and guidance branches add under 1.1 %.
    """
    with torch.device("meta"):
        plain = DiT(preset).build((4, 32, 32), num_classes=1000, arrival=False)
        full = DiT(preset).build((4, 32, 32), num_classes=1000, arrival=True, guidance=True)
    assert abs(count(plain) - published) < 0.005 * published
    assert 1 < count(full) / count(plain) < 1.011
    width, depth, _ = PRESETS[preset]
    weights = sum(p.numel() for block in plain.blocks for p in block.parameters() if p.ndim == 2)
    assert (
        abs(weights - depth * 18 * width**2) <= depth * 12 * width
    )  # 4 attention, 8 perceptron, 6 modulation; 8/3 w is rounded to a multiple of 8


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_build_with_heads_that_divide_the_width(preset):
    width, depth, heads = DiT(preset).sizes
    assert (width, depth, heads) == PRESETS[preset] and width % (4 * heads) == 0
    assert DiT(preset, width=48, depth=1, heads=3).sizes == (48, 1, 3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DiT("M"), "preset"),
        (lambda: DiT(width=50), "width"),
        (lambda: DiT("tiny", arrival_blocks=5), "arrival_blocks: 5 must be at most the depth, 4"),
        (lambda: SMALL.build((3, 5, 6)), "patch"),
        (lambda: SMALL.build((6,)), "patch"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_patches_are_cut_and_put_back_in_place():
    net, x = built(), draw()
    patches = net._patches(x)
    assert patches.shape == (5, 6, 12) and torch.equal(net._image(patches), x)
    torch.testing.assert_close(patches[:, 4], x[:, :, 2:4, 2:4].flatten(1))  # the second row of three, second column


def test_a_new_network_is_zero_and_its_blocks_are_the_identity():
    net, x, (t, s) = built(loud=False), draw(), draw_times()
    assert torch.equal(net(x, t, s), torch.zeros_like(x))
    h = draw(5, 6, 24)
    assert torch.equal(net.blocks[0](h, draw(5, 24)), h)


def test_attention_is_the_formula_with_normed_queries_and_keys():
    block, h = built().blocks[0], draw(5, 6, 24)
    q, k, v = block.qkv(h).reshape(5, 6, 3, 2, 12).permute(2, 0, 3, 1, 4)
    unit = lambda a: a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weights = torch.softmax(unit(q) @ unit(k).transpose(-1, -2) / math.sqrt(12), -1)
    torch.testing.assert_close(block._attend(h), block.merge((weights @ v).transpose(1, 2).reshape(5, 6, 24)))


def test_positions_differ_from_one_another():
    position = built(loud=False).position[0]
    assert position.shape == (6, 24) and torch.cdist(position, position).add(torch.eye(6)).min() > 0.1


def test_without_blocks_shares_the_weights_and_leaves_the_network_alone():
    net, x, (t, s) = built(), draw(), draw_times()
    before, weak = net(x, t, s), net.without_blocks((1,))
    assert len(net.blocks) == 3 and len(weak.blocks) == 2
    assert {id(p) for p in weak.parameters()} == {id(p) for p in net.parameters()} - {
        id(p) for p in net.blocks[1].parameters()
    }
    assert not torch.allclose(weak(x, t, s), before) and torch.equal(net(x, t, s), before)
    with torch.no_grad():  # block 1 made the identity: now both are the same function
        net.blocks[1].modulation.weight.zero_()
        net.blocks[1].modulation.bias.zero_()
    torch.testing.assert_close(weak(x, t, s), net(x, t, s))
    assert torch.equal(net.without_blocks(())(x, t, s), net(x, t, s))
    for skip in ((3,), (-1,)):
        with pytest.raises(ValueError, match="skip_blocks.*0..2"):
            net.without_blocks(skip)


def test_only_the_last_blocks_see_the_arrival_time():
    """Without a difference in weights, and with all of its blocks it is the plain network."""
    (t, s), x = draw_times(), draw()
    whole, late = built(), FlowMapNet(built())
    late.net.arrival_blocks, entered = 1, []
    late.net.blocks[2].register_forward_pre_hook(lambda block, given: entered.append(given[0]))
    one, other = late.mean_velocity(x, t, s), late.mean_velocity(x, t, s / 2)
    assert torch.equal(*entered) and not torch.allclose(one, other)
    assert not torch.allclose(one, whole(x, t, s))
    late.net.arrival_blocks = 3
    assert torch.equal(late.mean_velocity(x, t, s), whole(x, t, s))
    late.net.arrival_blocks = 1
    with torch.no_grad():  # a silent branch, as at the start: the velocity, whatever the arrival
        late.net.conditioning.arrival.out.weight.zero_()
        late.net.conditioning.arrival.out.bias.zero_()
    torch.testing.assert_close(late.mean_velocity(x, t, s), late.mean_velocity(x, t, t))


@pytest.mark.parametrize("kind", [AYFEMD, AYFLMD])
def test_derivatives_are_right_where_only_the_last_blocks_see_the_arrival(kind):
    sample = Linear().sample(draw(seed=1), draw(seed=2), *draw_times())
    student, found = FlowMapNet(built()), []
    student.net.arrival_blocks = 1
    for derivative in ("dual", "forward"):
        loss = kind(warmup_steps=0, derivative=derivative)(student, GAUSSIAN, sample, 0)
        found.append(torch.autograd.grad(loss.value, list(student.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_recipe_shows_the_arrival_time_to_the_last_blocks():
    late = resolve(read_recipe("digits", ["student.arrival_blocks=2"]))
    assert late.net == replace(resolve(read_recipe("digits")).net, arrival_blocks=2)
    assert late.net.build((1, 8, 8), num_classes=10).arrival_blocks == 2
    with pytest.raises(RecipeError, match="student.arrival_blocks: 9 must be at most the depth"):
        _ = resolve(read_recipe("digits", ["student.arrival_blocks=9"])).net
    edm2 = "student={kind: edm2, channels: 32, multipliers: [1, 2], num_blocks: 1, attention_at: []}"
    with pytest.raises(RecipeError, match="student.arrival_blocks: a network of kind edm2"):
        _ = resolve(read_recipe("digits", ["student.arrival_blocks=1", f"teacher.overrides=['{edm2}']"])).net


@pytest.mark.parametrize("kind", [AYFEMD, AYFLMD])
@pytest.mark.parametrize("derivative", ["dual", "forward", "difference"])
def test_activation_checkpointing_changes_no_gradient(kind, derivative):
    t, s = draw_times()
    sample = Linear().sample(draw(seed=1), draw(seed=2), t, torch.where(torch.arange(5) == 2, t, s))
    student, found = FlowMapNet(built()), []
    for on in (False, True):
        student.net.activation_checkpointing = on
        loss = kind(warmup_steps=0, derivative=derivative)(student, GAUSSIAN, sample, 0)
        found.append([loss.value.detach(), *torch.autograd.grad(loss.value, list(student.parameters()))])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)

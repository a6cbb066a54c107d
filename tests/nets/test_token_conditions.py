"""Conditions that are rows of tokens: a transformer attends to them, and never to their padding."""

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets import DiT
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet

SHAPE = (3, 1, 2)
CONDITIONS = (
    ExtraCondition("kind", 4, "number"),
    ExtraCondition("left", 9, "tokens", 4, "words"),
    ExtraCondition("right", 9, "tokens", 3, "words"),
    ExtraCondition("tags", 5, "tokens", 6, "tags"),
)
X = torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T, S = torch.linspace(0.5, 0.9, 5).double(), torch.linspace(0.0, 0.4, 5).double()
COND = {
    "kind": torch.tensor([0, 1, 2, 3, -1]),
    "left": torch.tensor([[-1, 1, 2, 3], [4, 5, 6, 7], [-1, -1, -1, 1], [-1, -1, 8, 2], [1, 2, 3, 4]]),
    "right": torch.tensor([[5, 2, -1], [2, -1, -1], [3, 4, 5], [6, 7, 8], [2, -1, -1]]),
    "tags": torch.tensor([[0, 1, 2, -1, -1, -1]] * 4 + [[-1] * 6]),
}
NOTHING = {key: torch.full_like(rows, -1) for key, rows in COND.items()}


def built(**more) -> FlowMapNet:
    torch.manual_seed(0)
    net = DiT(patch=1, width=16, depth=2, heads=2, **more).build(SHAPE, extra_conditions=CONDITIONS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return FlowMapNet(net.double())


@pytest.fixture
def net() -> FlowMapNet:
    return built()


def test_none_is_minus_one_and_absence(net):
    torch.testing.assert_close(net(X, T, S, NOTHING), net(X, T, S, None))
    one = net(X, T, S, {"left": COND["left"]})
    torch.testing.assert_close(net(X, T, S, NOTHING | {"left": COND["left"]}), one)


def test_each_token_reaches_its_own_row_alone(net):
    before = net(X, T, S, COND)
    for key, place in (("left", 3), ("left", 2), ("right", 0), ("tags", 1)):
        changed = COND[key].clone()
        changed[3, place] = 0
        moved = (net(X, T, S, COND | {key: changed}) - before).abs().flatten(1).amax(1).detach()
        assert float(moved[3]) > 1e-6 and float(moved[[0, 1, 2, 4]].max()) == 0, (key, place)


def test_the_order_of_tokens_and_their_side_matter(net):
    before = net(X, T, S, COND)
    swapped = COND | {"left": COND["left"][:, [0, 1, 3, 2]]}
    other_side = {"left": torch.full((5, 4), -1), "right": torch.tensor([[3, 4, 5]] * 5)}
    this_side = {"left": torch.tensor([[-1, 3, 4, 5]] * 5), "right": torch.full((5, 3), -1)}
    assert not torch.allclose(before, net(X, T, S, swapped))
    assert not torch.allclose(net(X, T, S, other_side), net(X, T, S, this_side))


def test_padding_has_no_effect(net):
    """Neither what the embeddings of padded places are, nor how many places are padded."""
    cond = {"left": torch.tensor([[-1, -1, 3, 4]] * 5), "right": torch.tensor([[5, -1, -1]] * 5)}
    before = net(X, T, S, cond)
    tokens = net.net.tokens
    with torch.no_grad():  # padding is embedded as token 0
        tokens.tables["words"].weight[0] += 7
        tokens.places[[0, 1, 5, 6, *range(7, 13)]] -= 9
    torch.testing.assert_close(net(X, T, S, cond), before)


def test_both_sides_share_one_vocabulary_and_gradients_reach_what_was_given(net):
    tokens = net.net.tokens
    assert set(tokens.tables) == {"words", "tags"} and tokens.places.shape == (13, 16)
    cond = {"left": torch.tensor([[-1, -1, 3, 4]] * 5), "right": torch.tensor([[5, 3, -1]] * 5)}
    net(X, T, S, cond).square().sum().backward()
    of_words, of_places = (one.grad.abs().sum(1) for one in (tokens.tables["words"].weight, tokens.places))
    assert (of_words > 0).nonzero().flatten().tolist() == [3, 4, 5]
    assert (of_places > 0).nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_the_tangent_is_exact_through_masked_tokens(net):
    v = torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dual, forward = (eulerian_derivative(net, X, T, S, v, COND, mode=mode) for mode in ("dual", "forward"))
    for a, b in zip(dual, forward, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-9)


def test_activation_checkpointing_changes_no_gradient(net):
    found = []
    for on in (False, True):
        net.checkpoint_activations(on)
        found.append(torch.autograd.grad(net(X, T, S, COND).square().sum(), list(net.parameters()), allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))

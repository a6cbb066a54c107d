"""How operations reach their rules: directly, by patched methods, by reflected operators; and none falls back."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.tangent import dual
from flowmap.flow.tangent.dual import DualTensor, dual_forward
from tests.support.families import FAMILIES, SHAPE


def given():
    generator = torch.Generator().manual_seed(4)
    x, v = torch.rand(2, 5, 3, generator=generator) + 0.5
    return x, v


REFLECTED = {
    "number": lambda x: 1.7 / x - (0.3 - x) * 2.1 + 3 * (2 + x) + 1.3**x,
    "tensor": lambda x: torch.full_like(x, 0.7) / x + (x.detach() - x) * (x.detach() * x),
    "matrix": lambda x: torch.ones(2, 5) @ x,
}


@pytest.mark.parametrize("name", REFLECTED)
def test_reflected_operators_round_as_ordinary_ones(name):
    x, v = given()
    assert torch.equal(dual_forward(REFLECTED[name], (x,), (v,))[0], REFLECTED[name](x))


def test_a_method_that_a_user_has_patched_is_called(monkeypatch):
    x, v = given()
    monkeypatch.setattr(Tensor, "exp", lambda self: 2 * self.sin())
    value, rate = dual_forward(lambda x: x.exp(), (x,), (v,))
    torch.testing.assert_close((value, rate), (2 * x.sin(), 2 * x.cos() * v))


def test_an_operation_without_effect_keeps_the_dual_tensor():
    x, v = given()
    seen = []
    dual_forward(lambda x: seen.extend([x, x.float(), x.contiguous(), x.to(torch.float32)]) or x, (x,), (v,))
    assert all(y is seen[0] for y in seen)


def test_attributes_are_those_of_the_value():
    x, v = given()
    read = operator.attrgetter("shape", "dtype", "device", "ndim")
    seen = []
    dual_forward(lambda x: seen.append((type(x), read(x.double()[0]))) or x, (x,), (v,))
    assert seen == [(DualTensor, read(x.double()[0]))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [3, 1])
def test_no_operation_of_a_network_is_left_to_torch(name, rows, monkeypatch):
    """Torch's forward derivative of an operation computes it a second time, in about a millisecond of the host."""
    left = []
    exact = dual.forward_derivative
    monkeypatch.setattr(dual, "forward_derivative", lambda f, *args: left.append(dual.name_of(f)) or exact(f, *args))
    student, t = FAMILIES[name].student(), torch.tensor([0.3, 0.6, 0.8])
    x, v = torch.randn(2, 3, *SHAPE)
    eulerian_derivative(student, x, t, t / 2, v, FAMILIES[name].conditions(3), rows=rows)
    assert not left

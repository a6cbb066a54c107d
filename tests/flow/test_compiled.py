"""The compiled dual forward: what torch.compile captures, walked with tangents, is the eager dual forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowmap.flow.derivative import eulerian_derivative, lagrangian_derivative
from flowmap.flow.tangent.compiled import Compiled
from tests.support.families import FAMILIES, SHAPE

B = 3
WALKED = lambda graph, inputs: graph.forward
"""A backend that compiles nothing: the walk runs on ordinary tensors."""


def setting(name: str, dtype=torch.float32):
    student = FAMILIES[name].student().to(dtype).train()
    draw = torch.Generator().manual_seed(1)
    x, v = (torch.randn(B, *SHAPE, generator=draw, dtype=dtype) for _ in range(2))
    t = torch.tensor([0.9, 0.5, 0.3])
    return student, x, t, t * torch.tensor([0.1, 0.6, 0.0]), v, FAMILIES[name].conditions(B, dtype)


def results(student, derive) -> list[Tensor]:
    """Value, rate and the gradients of a loss with both."""
    student.zero_grad()
    torch.manual_seed(0)
    value, rate = derive()
    assert not rate.requires_grad
    ((value - rate) ** 2).mean().backward()
    gradients = [p.grad for p in student.parameters()]
    return [value.detach(), rate, *(g for g in gradients if g is not None)]


def compiled(student, backend=WALKED) -> Compiled:
    student.net.forward = Compiled(student.net.forward, backend=backend)
    return student.net.forward


def check_equal(student, derivations, backend=WALKED, tolerance: float = 0.0) -> Compiled:
    """Each derivation gives what it gave before the network was compiled; nothing falls back."""
    before = [results(student, derive) for derive in derivations]
    ways = compiled(student, backend)
    for derive, want in zip(derivations, before, strict=True):
        found = results(student, derive)
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b) or (a - b).norm() <= tolerance * b.norm()
    assert ways.dual.fallbacks == ways.plain.fallbacks == 0 and ways.dual.stopped is None
    assert ways.dual.graphs > 0
    return ways


@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_is_the_dual_forward(name):
    student, x, t, s, v, cond = setting(name)
    check_equal(student, [lambda: eulerian_derivative(student, x, t, s, v, cond)])

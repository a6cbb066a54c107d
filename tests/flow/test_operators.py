"""Every operator's tangent is right or refused: fast for those with a rule, slow for all of torch's own tests."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from flowmap.flow.tangent.refused import name_of
from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.rules_base import constant
from tests.flow import operators
from tests.flow.test_rules import ELSEWHERE, SAMPLES, short

PARTS = 12
BAD = ("wrong", "failed")


def as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, x.flip(tuple(range(x.ndim)))) if x.is_floating_point() else x


def calls(function):
    """The samples of test_rules.py for the function, also with other values (no random functions) and complex ones."""
    generator = torch.Generator().manual_seed(0)
    for sample in SAMPLES[short(function)]:
        for value in (0.0, float("inf")):
            for change in (lambda x: x, as_complex):
                torch.manual_seed(0)
                args, kwargs = tree_map_only(torch.Tensor, change, sample())
                call = operators.Call(function, args, kwargs, lambda out: out, value, generator)
                if call.primals and operators.callable_on_plain(call):
                    yield value, call


@pytest.mark.parametrize("function", [pytest.param(f, id=f"{name_of(f)}-{i}") for i, f in enumerate(RULES)])
def test_rules_are_right_at_zeros_infinities_and_in_complex_numbers(function):
    if RULES[function] is constant or short(function) in ELSEWHERE:
        return
    for value, call in calls(function):
        for name, tangents, full in operators.choices_of(call):
            outcome, message = operators.outcome(call, tangents, full, value)
            assert outcome not in BAD, (value, name, call.primals[0].dtype, message)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_operator_of_torch_is_right_or_refused(part):
    """benchmarks/operators.py counts them."""
    found, counts = operators.survey(operators.operators()[part::PARTS], num_samples=1)
    assert not [one for one in found if one[1] in BAD]
    assert counts["right"] > counts["refused"]

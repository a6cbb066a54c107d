"""The table of tangent rules: what each operation does to a tangent that rides beside its value.

RULES is a plain dict from torch functions to rules (rules_base.py says what a rule is); a network with an operation of its own adds a row.
What is in no row takes torch's forward derivative of that one operation, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

from flowmap.flow.tangent.rules_base import Rule
from flowmap.flow.tangent.rules_constant import CONSTANT
from flowmap.flow.tangent.rules_elementwise import ELEMENTWISE
from flowmap.flow.tangent.rules_nn import NN
from flowmap.flow.tangent.rules_shape import SHAPE

RULES: dict[Callable, Rule] = {**CONSTANT, **ELEMENTWISE, **SHAPE, **NN}

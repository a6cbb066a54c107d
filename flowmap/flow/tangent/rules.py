"""The table of tangent rules: how each operation maps the tangents of its arguments to that of its output.

RULES is a plain dict from torch functions to rules (rules_base.py defines a rule); a network with a custom operation
can add an entry. An operation without an entry uses torch's forward derivative, or raises with its name.
"""

from __future__ import annotations

from collections.abc import Callable

from flowmap.flow.tangent.rules_base import Rule
from flowmap.flow.tangent.rules_constant import CONSTANT
from flowmap.flow.tangent.rules_elementwise import ELEMENTWISE
from flowmap.flow.tangent.rules_nn import NN
from flowmap.flow.tangent.rules_shape import SHAPE

RULES: dict[Callable, Rule] = {**CONSTANT, **ELEMENTWISE, **SHAPE, **NN}

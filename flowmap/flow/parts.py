"""The optional members of a recipe's parts, with their defaults. flow/types.py describes each of them.

Our parts inherit from these classes. A part of a user need not: `complete` adds the members that its class lacks.
"""

from __future__ import annotations

from typing import Any, ClassVar

from flowmap.flow.types import RecipeView


class Part:
    """A part that can be combined with any other."""

    def check(self, recipe: RecipeView) -> None:
        """Raise ValueError, the key first, where this part cannot be combined with the rest of the recipe."""


class BasePrior(Part):
    """A prior without networks."""

    learned: ClassVar[bool] = False


class BaseCoupling(Part):
    """A coupling that is neither independent nor of pairs."""

    independent: ClassVar[bool] = False
    paired: ClassVar[bool] = False


class BaseSampler(Part):
    """A sampler whose calls stop on the way."""

    @property
    def jumps_to_data(self) -> bool:
        return False

    @property
    def draws(self) -> bool:
        return True


class BaseObjective(Part):
    """An objective that trains a flow map, takes no derivative of the network and compares no pictures."""

    artifact: ClassVar[str] = "student"
    diagonal: ClassVar[bool] = False

    @property
    def derivative(self) -> str | None:
        return None

    @property
    def learns_weight(self) -> bool:
        return False

    @property
    def draws_samples(self) -> bool:
        return False

    @property
    def sees_pictures(self) -> bool:
        return False

    @property
    def loss_net(self) -> str | None:
        return None

    @property
    def null_weight(self) -> float:
        return 0.0

    @property
    def distillation(self) -> Any:
        return self

    @property
    def matching(self) -> Any:
        return None


def complete(cls: type, defaults: type) -> None:
    """Add to a class the members of `defaults` that it does not state, as attributes or as fields of a dataclass."""
    fields = vars(cls).get("__dataclass_fields__", {})
    for base in defaults.__mro__[:-1]:
        for name, value in vars(base).items():
            if not name.startswith("_") and name not in fields and not hasattr(cls, name):
                setattr(cls, name, value)

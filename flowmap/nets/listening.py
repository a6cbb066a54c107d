"""Adds a vector to what some functions of a foreign network return, such as its time embedding; weights keep their
names.
"""

from __future__ import annotations

from torch import Tensor, nn


class Extra:
    """The vector to add. Not a module, so that state_dict keeps the network's names."""

    value: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Extra:
        """Another one for the copied network, without the value of the last call, which may have a graph."""
        return Extra()


_LISTENING: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def listen(module: nn.Module, extra: Extra, method: str = "forward") -> None:
    """Make that method of the module add `extra` to the tensor that it returns. Only the module's class changes."""
    module.__class__ = _listening(type(module), method)
    module.extra = extra  # type: ignore[assignment]  # not a tensor, so not a buffer either


def _listening(cls: type[nn.Module], method: str) -> type[nn.Module]:
    """A subclass whose method adds the extra vector to its output."""
    if (cls, method) not in _LISTENING:

        def with_extra(self, *args, **kwargs):
            out = getattr(cls, method)(self, *args, **kwargs)
            value = self.extra.value
            if value is not None and out.ndim > 2:  # tokens
                value = value.reshape(value.shape[0], *out.shape[1:])
            return out if value is None else out + value.to(out.dtype)

        _LISTENING[cls, method] = type(f"Listening{cls.__name__}", (cls,), {method: with_extra})
    return _LISTENING[cls, method]

"""Networks that are built without memory for their weights, to be filled from a memory-mapped file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """A context in which parameters of modules are made on the meta device, and buffers as usual.

    Unlike with torch.device("meta"), constants that no file of weights has are there. Fill the parameters by
    load_state_dict(assign=True).
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(
            module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        )

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

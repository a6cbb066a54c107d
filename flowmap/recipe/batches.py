"""How the samples of an optimizer step are split over micro-batches, devices and nodes.

With data.global_batch_size the number of samples of a step is a setting, and the number of micro-batches follows from
it. Without it the number of samples is data.batch_size x trainer.accumulate x trainer.devices x trainer.num_nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flowmap.recipe.settings import Trainer

LARGEST = 1_000_000  # micro-batch that is suggested


class Batched(Protocol):
    """The settings of data that are read here."""

    @property
    def batch_size(self) -> int: ...

    @property
    def global_batch_size(self) -> int | None: ...


@dataclass(frozen=True)
class Batches:
    """Each of devices x nodes processes has `accumulate` micro-batches of `micro_batch` samples a step."""

    micro_batch: int
    accumulate: int
    devices: int
    nodes: int

    @property
    def processes(self) -> int:
        return self.devices * self.nodes

    @property
    def samples(self) -> int:
        """The number of samples of an optimizer step."""
        return self.micro_batch * self.accumulate * self.processes

    @property
    def split(self) -> bool:
        """Whether a step has more than one micro-batch, on one process or on several."""
        return self.accumulate * self.processes > 1

    def __str__(self) -> str:
        split = f"micro-batch {self.micro_batch} x accumulate {self.accumulate}"
        return f"{self.samples} samples a step: {split} x {_counted(self.devices, 'device')} x " + _counted(
            self.nodes, "node"
        )


def batches_of(data: Batched, trainer: Trainer) -> Batches:
    """The split of a step. ValueError, the key first, if global_batch_size cannot be split so."""
    whole, at_once = data.global_batch_size, data.batch_size * trainer.devices * trainer.num_nodes
    accumulate = trainer.accumulate
    if whole is not None:
        if whole % at_once:
            raise ValueError(_indivisible(data, trainer, whole, at_once))
        accumulate = whole // at_once
        if trainer.accumulate not in (1, accumulate):
            split = (
                f"data.global_batch_size: {whole} is {accumulate} micro-batches of data.batch_size {data.batch_size}"
            )
            raise ValueError(
                f"trainer.accumulate: {trainer.accumulate} does not agree: {split} a device; "
                f"allowed: {accumulate}, or leave it out"
            )
    return Batches(data.batch_size, accumulate, trainer.devices, trainer.num_nodes)


def _indivisible(data: Batched, trainer: Trainer, whole: int, at_once: int) -> str:
    factors = f"data.batch_size {data.batch_size} x trainer.devices {trainer.devices}"
    factors += f" x trainer.num_nodes {trainer.num_nodes}"
    below = whole // at_once * at_once
    allowed = f"{below} or {below + at_once}" if below else f"{at_once}"
    each, rest = divmod(whole, trainer.devices * trainer.num_nodes)
    sizes = [] if rest else _nearest_divisors(each, data.batch_size)
    other = f"; or data.batch_size {' or '.join(map(str, sizes))}" if sizes else ""
    return f"data.global_batch_size: {whole} is no multiple of {factors} = {at_once}; nearest allowed: {allowed}{other}"


def _nearest_divisors(number: int, near: int) -> list[int]:
    """The largest divisor of the number below `near` and the smallest one above, those that exist."""
    below = next((size for size in range(min(near, number), 0, -1) if number % size == 0), None)
    above = next((size for size in range(near + 1, min(number, LARGEST) + 1) if number % size == 0), None)
    return [size for size in (below, above) if size is not None]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def without_split(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings as plain values, without those that split a global batch and those of the hardware.

    With data.global_batch_size they change neither the samples of a step nor its gradient, except for rounding. A
    sharded run keeps its strategy, as its checkpoints are of another form.
    """
    if plain["data"].get("global_batch_size") is None:
        return dict(plain)
    apart = {"accumulate", "accelerator", "devices", "num_nodes"}
    apart |= set() if plain["trainer"]["strategy"] == "fsdp" else {"strategy"}
    data = {key: value for key, value in plain["data"].items() if key != "batch_size"}
    trainer = {key: value for key, value in plain["trainer"].items() if key not in apart}
    return {**plain, "data": data, "trainer": trainer}

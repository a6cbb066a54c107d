"""Snapshots of averaged weights in a run's ema/, and their combination after training to an average of any width.

Source: EDM2's post-hoc EMA (Karras et al. 2024, arXiv:2312.02696, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from flowmap.base.files import read_tensors, write_tensors
from flowmap.flow.averaging import posthoc_coefficients
from flowmap.nets.flow_map import mismatch

_NAME = re.compile(r"step-(\d+)-std-(\d\.\d+)\.safetensors")


def snapshot_path(run: Path, step: int, std: float) -> Path:
    return run / "ema" / f"step-{step:08d}-std-{std:.3f}.safetensors"


def save_snapshot(run: Path, step: int, std: float, weights: dict[str, Tensor]) -> None:
    write_tensors(snapshot_path(run, step, std), weights)


def list_snapshots(run: Path) -> list[tuple[int, float, Path]]:
    """(step, std, file) of every snapshot of the run, by step."""
    found = [(match, path) for path in (run / "ema").glob("*.safetensors") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), float(match[2]), path) for match, path in found)


def nearest_snapshot(run: Path, *, share: float) -> dict[str, Tensor]:
    """The narrowest average at the snapshot nearest to that share of the run."""
    snapshots = _some(run)
    last = snapshots[-1][0]
    return read_tensors(min(snapshots, key=lambda s: (abs(s[0] - share * last), s[1]))[2])


def combine(run: Path, *, std: float, step: int | None = None) -> dict[str, Tensor]:
    """The weights averaged with relative width `std` at `step` (None: the last), as a combination of the run's
    snapshots.
    """
    snapshots = [s for s in _some(run) if step is None or s[0] <= step]
    if not snapshots:
        raise ValueError(f"{run / 'ema'}: no snapshot at or before step {step}")
    weights = posthoc_coefficients(
        [s[0] for s in snapshots], [s[1] for s in snapshots], target_step=step, target_std=std
    )
    return weighted_sum(
        (weight, str(path), read_tensors(path))
        for weight, (_, _, path) in zip(weights.tolist(), snapshots, strict=True)
    )


def weighted_sum(parts: Iterable[tuple[float, str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The sum, in float64, of weight times tensor over parts (weight, file, tensors).

    Raises ValueError that names a file with other tensors.
    """
    total: dict[str, Tensor] = {}
    for weight, file, tensors in parts:
        if total and (found := mismatch(total, tensors)):
            name, expected, shape = found
            raise ValueError(f"{file}: has other tensors than the ones before it: {name} is {shape}, not {expected}")
        for name, tensor in tensors.items():
            total[name] = total[name] + weight * tensor.double() if name in total else weight * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def _some(run: Path) -> list[tuple[int, float, Path]]:
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(f"{run / 'ema'}: this run kept no snapshots; set ema.snapshot_every_steps in its recipe")
    return snapshots

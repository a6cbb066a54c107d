"""What every benchmark reports with its figures: versions, machine, commit.

It prints a table and writes JSON into benchmarks/results.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flowmap.base.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "numpy", "scikit-learn")


def environment() -> dict:
    """Versions, platform, device, threads and git commit, as plain JSON; "+" after the commit: the tree has changes."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(name: str, payload: Mapping) -> Path:
    """The payload as benchmarks/results/<name>.json, written beside and renamed."""
    path = RESULTS / f"{name}.json"
    keep(path, payload)
    print(f"wrote benchmarks/results/{path.name}")
    return path


def kept(path: Path) -> dict:
    """What an earlier run of the benchmark left there; nothing where it left nothing."""
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(path: Path, found: Mapping) -> None:
    """Leaves that for the next run, written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def spread(values: Iterable[float], bare: bool = False) -> str:
    """The median, with least and most if they differ and `bare` is false; an empty string without values."""
    if not (values := list(values)):
        return ""
    middle, least, most = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
    return middle if bare or least == most else f"{middle} ({least} to {most})"


def table(rows: Iterable[Sequence], columns: Sequence[str]) -> str:
    """A Markdown table of rows under column names; numbers have four digits and are right-aligned."""
    rows = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    left = [any(not _is_number(row[i]) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if at_left else c.rjust(w) for c, w, at_left in zip(cells, widths, left, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "| "
        + " | ".join("-" * w if at_left else "-" * (w - 1) + ":" for w, at_left in zip(widths, left, strict=True))
        + " |"
    )
    return "\n".join([line(columns), rule, *map(line, rows)])


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # not a git checkout
        return None

"""Arguments that several verbs have, and what their values mean."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from flowmap.student.student import Student


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME|PATH",
        help="a shipped recipe (see `flowmap list`) or a YAML file",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value|+FILE",
        help="settings that replace the recipe's; +FILE: those of a YAML file",
    )
    import_argument(parser)


def shard_arguments(parser: argparse.ArgumentParser, *, batch: int, out: str, what: str = "folder") -> None:
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="make part I of N (from 0), while other processes make the others",
    )
    parser.add_argument("--batch", type=int, default=batch, help="samples that the networks see at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help=f"{what} (default: {out})")


def import_argument(parser: argparse.ArgumentParser) -> None:
    what = "run this Python of yours first: it adds kinds, and a recipe may name its attributes"
    parser.add_argument("--import", dest="imports", action="append", metavar="FILE|MODULE", help=what)


def student_argument(parser: argparse.ArgumentParser, *, base: bool = False) -> None:
    parser.add_argument(
        "--student",
        required=True,
        metavar="DIR|HUB-ID",
        help="a student folder, its run folder, or a hub id",
    )
    import_argument(parser)
    if base:
        parser.add_argument("--base", metavar="DIR|HUB-ID", help="where a LoRA student's base is now, if it has moved")


def guided_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of verbs that draw from a student."""
    student_argument(parser, base=True)
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the recipe's)")
    parser.add_argument("--device", help="default: a GPU, if there is one, otherwise cpu")
    what = "hold the network's large linear layers in 1 or about half a byte a weight (extra quantize)"
    parser.add_argument("--quantize", choices=["int8", "nf4"], help=what)


def given_student(a: argparse.Namespace) -> Student:
    """The student of `guided_arguments` on its device; a line says what quantising saves."""
    from flowmap.cli.terminal import log
    from flowmap.student.folder import load_student

    student = load_student(a.student, base=a.base, quantize=a.quantize).to(device_of(a.device))
    if a.quantize is not None:
        log(student.size_line())
    return student


def device_of(name: str | None) -> torch.device:
    """The device, by default a GPU if there is one; raises ValueError if torch cannot use it on this machine."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # not a device, or none of that kind on this machine
        why = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used here (cpu always can): {why}") from error


def part_of(text: str) -> tuple[int, int]:
    """(I, N) of --shard I/N."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard: {text!r} is not of the form I/N, such as 0/4")
    return int(first), int(count)


def check_figures(path: Path, *, protocol: bool = False) -> None:
    """Raise ValueError if the file of --out exists and is not one of a student's figures.

    protocol: those of `evaluate --protocol`; neither kind replaces the other.
    """
    try:
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if "student" not in found or ("protocol" in found) != protocol:
                raise ValueError
    except (ValueError, TypeError, OSError):
        what = "figures of --protocol" if protocol else "figures of a student"
        raise ValueError(f"--out: {path} is there and has no {what}; choose another file") from None

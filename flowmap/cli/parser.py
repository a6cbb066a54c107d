"""The parser of the command line: its verbs, and words that argparse alone does not place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from flowmap import __version__
from flowmap.cli import average, cite, compare, doctor, encode, evaluate, export, fit, import_weights, list, merge, pairs, sample, show


class Verb(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


VERBS: dict[str, tuple[Verb, str]] = {
    "fit": (fit, "train a recipe, and first whatever it needs"),
    "sample": (sample, "draw samples as pictures or sentences"),
    "evaluate": (evaluate, "measure a student by its recipe's metrics"),
    "compare": (compare, "train recipes on equal terms, seed by seed, and tabulate them; goes on where it was cut"),
    "encode": (encode, "turn a recipe's pictures into latents and text embeddings on disk; goes on where it was cut"),
    "pairs": (pairs, "join noise to data by a teacher's ODE, for recipes with coupling pairs; goes on where it was cut"),
    "doctor": (doctor, "try one training step of a recipe on its real network: which derivative works, what it costs"),
    "average": (average, "combine a run's snapshots to an average (EMA) of another width, as a student"),
    "import": (import_weights, "convert published pickles to safetensors, executing nothing in them"),
    "merge": (merge, "add a finetune's difference from its base, or a LoRA, onto a student's weights, without training"),
    "export": (export, "write a student as a diffusers pipeline or LoRA or a torch program, for those without flowmap"),
    "show": (show, "print a recipe with every default"),
    "list": (list, "list recipes, teachers and kinds"),
    "cite": (cite, "print the papers behind the methods, as BibTeX"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; key=value and +FILE may stand on both sides of an option, which argparse alone does not allow."""
    parser, words = build_parser(), [*(sys.argv[1:] if argv is None else argv)]
    # compare's --recipes and --steps would take all that follows
    behind = [i for i, word in enumerate(words) if words[0] == "compare" and _is_setting(word) and words[i - 1] not in ("--out", "--import")]
    arguments, rest = parser.parse_known_args([word for i, word in enumerate(words) if i not in behind])
    odd = [word for word in rest if not _is_setting(word) or not hasattr(arguments, "overrides")]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if settings := [*(words[i] for i in behind), *rest]:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def _is_setting(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("+"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowmap", description="Distil a slow diffusion or flow teacher into a student of 1, 2 or 4 steps.")
    parser.add_argument("--version", action="version", version=f"flowmap {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (verb, help) in VERBS.items():
        one = verbs.add_parser(name, help=help, description=help)
        one.set_defaults(run=verb.run)
        verb.add_arguments(one)
    return parser

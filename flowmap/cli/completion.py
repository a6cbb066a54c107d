"""`flowmap --completion SHELL`: prints a script that completes verbs, options, recipe names and paths.

The script is made by shtab (extra `completion`) from the parser itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

SHELLS = ("bash", "zsh")
FOLDERS = ("student", "run_folder", "runs", "base")
FILES = ("imports", "files", "delta", "lora", "inpaint", "mask", "interpolate", "texts")
RECIPES = {
    "bash": """\
_flowmap_recipes() {{
  compgen -W "{names}" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": """\
_flowmap_recipes() {{
  compadd -- {names}
  _files
}}
""",
}


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--completion",
        action=Print,
        choices=SHELLS,
        help="print a completion script for the shell, and exit",
    )


class Print(argparse.Action):
    """Prints the script and exits, as --version does."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            print(script(parser, str(values)), end="")
        except ImportError:
            parser.error("--completion: needs shtab: pip install 'flowmap-distillation[completion]'")
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of that shell, with the names of the recipes as they are shipped now."""
    import shtab

    from flowmap.recipe.recipe import list_recipes

    for action in _actions(parser):
        if action.dest in ("recipe", "recipes"):
            vars(action)["complete"] = dict.fromkeys(SHELLS, "_flowmap_recipes")
        elif action.dest in FOLDERS:
            vars(action)["complete"] = shtab.DIRECTORY
        elif action.dest in FILES or action.dest == "out":
            vars(action)["complete"] = shtab.FILE
    preamble = {name: text.format(names=" ".join(list_recipes())) for name, text in RECIPES.items()}
    return str(shtab.complete(parser, shell, preamble=preamble))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of the parser and of every verb."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found += [one for verb in action.choices.values() for one in _actions(verb)]
    return found

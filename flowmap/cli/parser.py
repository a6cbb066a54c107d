"""The parser of the command line: verbs in groups, and arguments that argparse alone does not place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn, Protocol

from flowmap import __version__
from flowmap.base.distributed import is_child
from flowmap.cli import (
    average,
    cite,
    compare,
    completion,
    demo,
    doctor,
    encode,
    evaluate,
    export,
    fit,
    import_weights,
    list,
    merge,
    pairs,
    plot,
    reference,
    report,
    sample,
    show,
    sweep,
    tune,
)


class Verb(Protocol):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


GROUPS: Mapping[str, Mapping[str, tuple[Verb, str]]] = {
    "train": {
        "fit": (fit, "train a recipe, and first whatever it needs"),
        "compare": (compare, "train recipes on equal terms, or tabulate finished runs"),
        "pairs": (pairs, "make pairs of noise and data by a teacher's ODE"),
        "encode": (encode, "encode a recipe's pictures into latents on disk"),
        "reference": (reference, "compute the statistics of all training pictures"),
        "sweep": (sweep, "write the file of a W&B sweep over a recipe's settings"),
        "doctor": (doctor, "try one training step of a recipe on its real network"),
    },
    "use": {
        "sample": (sample, "draw samples as pictures or sentences"),
        "evaluate": (evaluate, "measure a student by its recipe's metrics"),
        "demo": (demo, "serve a page to try a student in the browser"),
        "export": (export, "write a student for diffusers, torch or a Space"),
        "tune": (tune, "search a student's settings for each number of steps"),
        "average": (average, "combine a run's snapshots into an average of another width"),
        "merge": (merge, "add a finetune or a LoRA to a student, without training"),
        "import": (import_weights, "convert published pickles to safetensors, running no code"),
    },
    "look": {
        "show": (show, "print a recipe with every default"),
        "list": (list, "list recipes, teachers and kinds"),
        "cite": (cite, "print the papers behind the methods, as BibTeX"),
        "plot": (plot, "draw loss, residual norm and metrics of runs side by side"),
        "report": (report, "write one HTML file about runs"),
    },
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; key=value and +FILE may be on both sides of an option, which argparse alone refuses."""
    parser, words = build_parser(), [*(sys.argv[1:] if argv is None else argv)]
    behind = _settings_behind(words)
    arguments, rest = parser.parse_known_args([word for i, word in enumerate(words) if i not in behind])
    unknown = [word for word in rest if not _is_setting(word) or arguments.overrides is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if settings := [*(words[i] for i in behind), *rest]:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def _settings_behind(words: Sequence[str]) -> Sequence[int]:
    """The places of compare's settings, which its --recipes and --steps would take, and of one that --resume would.

    None beside --runs: a run folder may have an = in its name.
    """
    if words[:1] == ["fit"]:
        after = words.index("--resume") + 1 if "--resume" in words else len(words)
        return [after + i for i, _ in enumerate(takewhile(_is_setting, words[after:]))]
    if words[:1] != ["compare"] or "--runs" in words:
        return ()
    return [i for i, word in enumerate(words) if _is_setting(word) and words[i - 1] not in ("--out", "--import")]


def _is_setting(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("+"))


def build_parser() -> argparse.ArgumentParser:
    what = "Distil a slow diffusion or flow teacher into a student of 1, 2 or 4 steps."
    parser = Grouped(prog="flowmap", description=what, formatter_class=Narrow)
    parser.add_argument("--version", action="version", version=f"flowmap {__version__}")
    completion.add_argument(parser)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=OneLine)
    for name, (verb, help) in VERBS.items():
        one = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        one.set_defaults(run=verb.run, imports=None, overrides=None)
        verb.add_arguments(one)
    parser.verbs = verbs
    return parser


class Narrow(argparse.HelpFormatter):
    """Names of verbs in a narrow column, so that each has one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=14)


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line and exit 2."""

    def error(self, message: str) -> NoReturn:
        if not is_child():  # the first process prints it
            print(f"flowmap: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


class Grouped(OneLine):
    """The parser of the verbs: its help lists them by group, and an unknown verb is answered with the closest one."""

    verbs: argparse._SubParsersAction[Any]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action is self.verbs and value not in VERBS:
            from flowmap.base.schema import suggest

            self.error(f"no verb {value!r}{suggest(str(value), VERBS)}")
        super()._check_value(action, value)

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage("flowmap VERB ...", [], [])
        formatter.add_text(self.description)
        shown = {one.dest: one for one in self.verbs._get_subactions()}
        for group, verbs in GROUPS.items():
            formatter.start_section(group)
            formatter.add_arguments([shown[name] for name in verbs])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action is not self.verbs])
        formatter.end_section()
        formatter.add_text("`flowmap VERB --help` describes the arguments of a verb.")
        return formatter.format_help()

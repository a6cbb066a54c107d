"""`flowmap fit`: trains a recipe, and first whatever it needs."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from flowmap.cli.arguments import recipe_arguments
from flowmap.cli.terminal import summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--out", help="run folder (default: runs/<recipe name>)")
    what = "; a trained run is measured again with other metrics, sampler, evaluation or log"
    auto = "; auto: also start, or find it finished, and wait for a process that still ends: for a requeued job"
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=["auto"],
        help=f"go on from the folder's last checkpoint{what}{auto}",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="go on with a finished run with another trainer.steps, optimizer.lr or optimizer.schedule",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in the folder, once the new one has a checkpoint",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, parameters, FLOPs, memory, GPU-hours and what is missing; train nothing",
    )
    parser.add_argument(
        "--throughput",
        type=float,
        default=200.0,
        metavar="T",
        help="TFLOP/s of one device, for the dry run's hours (default: 200)",
    )
    what = (
        "memory of the GPU that the run is to fit, for the dry run, which lists settings that do (default: this one's)"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help=what)


def run(a: argparse.Namespace) -> int:
    if a.memory is not None and not a.dry_run:
        raise ValueError("--memory: goes with --dry-run")
    if a.dry_run:
        with _without_collection():
            return _dry_run(a)
    from flowmap.recipe import read_recipe
    from flowmap.train.fit import fit

    recipe = read_recipe(a.recipe, a.overrides)
    made = fit(recipe, a.out, resume=a.resume, overwrite=a.overwrite, extend=a.extend)
    if made.metrics:
        print(summary(made.metrics))
        print(f"student: {made.folder / 'student'}")
    return 0


def _dry_run(a: argparse.Namespace) -> int:
    from flowmap.estimate.dry_run import MISSING, dry_run
    from flowmap.recipe import read_recipe

    lines = dry_run(read_recipe(a.recipe, a.overrides), a.out, throughput=a.throughput, memory=a.memory)
    print("\n".join(lines))
    return 3 if lines[-1].startswith(MISSING) else 0


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from searching imported libraries and networks for cycles, also at exit: a third of a dry run."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

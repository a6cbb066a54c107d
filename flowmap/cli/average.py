"""`flowmap average`: a run's snapshots combined to an average of another width, as a student."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from flowmap.cli.arguments import import_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        dest="run_folder",
        required=True,
        metavar="DIR",
        help="a run folder that kept snapshots (ema.snapshot_every_steps)",
    )
    parser.add_argument(
        "--std",
        type=float,
        required=True,
        help="relative width of the average, as EDM2 gives it: 0.05, 0.10, ...",
    )
    parser.add_argument("--step", type=int, metavar="N", help="as of that step (default: the last)")
    parser.add_argument("--out", required=True, help="folder for the student")
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.recipe.recipe import read_resolved
    from flowmap.student.folder import check_place, copy_models, load_student, save_student
    from flowmap.student.snapshots import combine
    from flowmap.train.card import model_card

    folder, out = Path(a.run_folder), Path(a.out)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"--run: {folder} is not a run folder (no recipe.yaml)")
    check_writable(out, "--out")
    if out.resolve() == (folder / "student").resolve():
        raise ValueError(f"--out: {out} is the run's own student; choose another folder")
    check_place(out, "--out")
    recipe, config = read_resolved(folder / "recipe.yaml"), load_student(folder).config
    weights = combine(folder, std=a.std, step=a.step)
    config = replace(config, step=config.step if a.step is None else a.step, tuned=())  # tuned for other weights
    copy_models(folder / "student", out)
    save_student(out, config, weights, recipe=recipe.to_yaml(), card=model_card(recipe, config, None))
    print(out)
    return 0

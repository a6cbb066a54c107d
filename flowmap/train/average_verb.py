"""`flowmap average`: a run's snapshots combined to an average of another width, as a student."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from flowmap.base.files import check_writable
from flowmap.recipe import read_resolved
from flowmap.student.folder import check_place, copy_beside, load_student, save_student
from flowmap.student.snapshots import combine
from flowmap.train.card import model_card


def average_verb(a: argparse.Namespace) -> int:
    run, out = Path(a.run_folder), Path(a.out)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"--run: {run} is not a run folder (no recipe.yaml)")
    check_writable(out, "--out")
    if out.resolve() == (run / "student").resolve():
        raise ValueError(f"--out: {out} is the run's own student; choose another folder")
    check_place(out, "--out")
    recipe, config = read_resolved(run / "recipe.yaml"), load_student(run).config
    weights = combine(run, std=a.std, step=a.step)
    config = replace(config, step=config.step if a.step is None else a.step)
    copy_beside(run / "student", out)
    save_student(out, config, weights, recipe=recipe.to_yaml(), card=model_card(recipe, config, None))
    print(out)
    return 0

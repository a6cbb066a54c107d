"""`flowmap sample`: draws samples as pictures or sentences."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmap.cli.arguments import given_student, guided_arguments
from flowmap.cli.terminal import log

if TYPE_CHECKING:
    import torch

    from flowmap.samplers import Tilted
    from flowmap.student.student import Student
    from flowmap.teachers.refiner import FrozenRefiner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    guided_arguments(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    what = "the times in which guidance acts, for students that take them as an input (teacher.guidance.interval_input)"
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=what)
    parser.add_argument("--num", type=int, help="samples for each number of steps (default: 64)")
    _condition_arguments(parser)
    _refiner_arguments(parser)
    parser.add_argument("--gamma", type=float, metavar="G", help="noise put back between steps, 0..1")
    solvers, what = ["euler", "midpoint", "heun", "rk4"], "solve the student's velocity, in the place of its sampler"
    parser.add_argument("--solver", choices=solvers, help=what)
    _reward_arguments(parser)
    _picture_arguments(parser)
    _grid_arguments(parser)
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    what = "compile the network: slower to start, then faster"
    parser.add_argument("--compile", action="store_true", default=None, help=what)
    parser.add_argument("--out", required=True, help="folder for the pictures")


def _condition_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the conditions of the samples, and the sentences to edit."""
    what = "one class, by its name or its number (default: all in turn)"
    parser.add_argument("--class", dest="label", metavar="NAME|K", help=what)
    parser.add_argument("--prompt", help="text, for students that are conditioned on it")
    what = "one sample for each prompt of this file: one a line, or COCO's captions_*.json"
    parser.add_argument("--prompts", metavar="FILE", help=what)
    what = "conditions of a student of sentences"
    parser.add_argument("--attribute", nargs="+", default=[], metavar="NAME=VALUE", help=what)
    what = "sentences to edit, one a line, for students that start from sentences"
    parser.add_argument("--texts", metavar="FILE", help=what)
    what = "edit them the other way, from the target style to the source"
    parser.add_argument("--reverse", action="store_true", help=what)
    what = "refused by distilled students, which cannot honour it"
    parser.add_argument("--negative-prompt", metavar="TEXT", help=what)


def _refiner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the pipeline that refines the drawn pictures, and its strength."""
    what = "a diffusers image-to-image pipeline that refines the pictures"
    parser.add_argument("--refiner", metavar="DIR|HUB-ID", help=what)
    what = "how much of the picture it changes, above 0 up to 1"
    parser.add_argument("--refiner-strength", type=float, default=0.3, metavar="S", help=what)


def _reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the reward by which samples are chosen, and how many particles and moves that takes."""
    what = "choose samples by a reward: a kind with its settings, or a function of --import"
    parser.add_argument("--reward", nargs="+", metavar=("KIND|MODULE:NAME", "key=value"), help=what)
    what = "settings of the choice: scale, particles, moves, move, move_size, gamma, resample, choice"
    parser.add_argument("--tilt", nargs="+", default=[], metavar="key=value", help=what)


def _picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the pictures that the code of a learned prior edits."""
    what = "redraw part of this picture, through the code of a learned prior (with --mask)"
    parser.add_argument("--inpaint", metavar="IMAGE", help=what)
    parser.add_argument("--mask", metavar="IMAGE", help="its light parts are redrawn")
    what = "samples between two pictures, through the code of a learned prior"
    parser.add_argument("--interpolate", nargs=2, metavar="IMAGE", help=what)


def _grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the grid of prompts or classes, and the teacher in it."""
    what = "write one picture, grid.png: a row for each prompt or class, columns for the steps and the teacher"
    parser.add_argument("--grid", action="store_true", help=what)
    parser.add_argument(
        "--teacher-steps", type=int, metavar="N", help="of the teacher's column (default: the recipe's)"
    )
    parser.add_argument("--no-teacher", dest="teacher", action="store_false", help="leave its column out")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable

    check_writable(Path(a.out), "--out")
    student = given_student(a)
    if a.prompt is not None and student.config.text is None and a.refiner is None:
        raise ValueError("--prompt: this student is not conditioned on text")
    if a.prompts is not None and student.config.text is None:
        raise ValueError("--prompts: this student is not conditioned on text")
    if (a.inpaint is None) != (a.mask is None):
        raise ValueError("--inpaint and --mask: go together: a picture, and the mask of what is redrawn")
    if not a.grid and (a.teacher_steps is not None or not a.teacher):
        raise ValueError(f"--{'no-teacher' if not a.teacher else 'teacher-steps'}: goes with --grid")
    if a.grid:
        print(_grid(a, student))
        return 0
    cond = _conditions(a, student)
    for path in _draw(a, student, cond) if a.texts is None else _edit(a, student, cond):
        print(path)
    return 0


def _grid(a: argparse.Namespace, student: Student) -> Path:
    """Draw the grid; returns its path."""
    from flowmap.evaluation.columns import teacher_or_none
    from flowmap.evaluation.condition_grid import check_grid, condition_grid, prompts_in

    names = "gamma solver reward tilt inpaint mask interpolate refiner compile guidance_interval"
    if (given := _given(a, f"{names} prompt negative_prompt label attribute texts reverse")) is not None:
        raise ValueError(f"--{given}: does not go with --grid, which takes --prompts, --num, --steps and --guidance")
    prompts = None if a.prompts is None else prompts_in(a.prompts)
    check_grid(student, prompts, a.num)
    teacher = teacher_or_none(student, a.teacher_steps, log) if a.teacher else None
    options: dict[str, Any] = dict(steps=a.steps, guidance=a.guidance, seed=a.seed or 0)
    return condition_grid(student, a.out, prompts=prompts, num=a.num, teacher=teacher, **options)


def _conditions(a: argparse.Namespace, student: Student) -> dict[str, Any]:
    """The conditions that the arguments give. With a refiner, --prompt may be for the refiner alone."""
    from flowmap.evaluation.samples import attribute_of
    from flowmap.student.conditions import class_of

    given = {
        "class": class_of(a.label, student.config.class_names),
        "prompt": _prompts(a, student) if student.config.text is not None else None,
        "negative_prompt": a.negative_prompt,
        "guidance_interval": a.guidance_interval,
    }
    return {key: value for key, value in given.items() if value is not None} | dict(map(attribute_of, a.attribute))


def _prompts(a: argparse.Namespace, student: Student) -> str | list[str] | None:
    """The text of all samples, or one for each."""
    from flowmap.evaluation.condition_grid import prompts_in
    from flowmap.teachers.text import check_prompt

    if a.prompts is None:
        if a.prompt is not None:
            check_prompt(student.config.text, a.prompt)
        return a.prompt
    if a.prompt is not None or a.num is not None:
        raise ValueError("--prompts: gives the texts and the number of samples; leave --prompt and --num out")
    return prompts_in(a.prompts)


def _edit(a: argparse.Namespace, student: Student, cond: dict[str, Any]) -> list[Path]:
    """Edit the sentences of --texts; returns the paths of the results."""
    from flowmap.evaluation.samples import edit_file

    _alone(a)
    return edit_file(student, Path(a.texts), Path(a.out), a.steps, cond, a.reverse)


def _draw(a: argparse.Namespace, student: Student, cond: dict[str, Any]) -> list[Path]:
    """Draw samples, or edit pictures; returns the paths of the grids."""
    from flowmap.base.progress import Progress
    from flowmap.evaluation.samples import sample

    if a.reverse:
        raise ValueError("--reverse: goes with --texts, for students that edit sentences")
    if student.config.edits:
        raise ValueError(f"--texts: is required: this student carries sentences of {' to '.join(student.config.edits)}")
    num = len(cond["prompt"]) if a.prompts is not None else 64 if a.num is None else a.num
    seed = a.seed or 0
    options = {name: getattr(a, name) for name in ("steps", "guidance", "gamma", "solver", "interpolate")}
    options["reward"] = tilted(a.reward, a.tilt)
    options |= {"inpaint": a.inpaint and (a.inpaint, a.mask), "refine": _refiner(a, seed, student.device)}
    options["compile"] = bool(a.compile)
    with Progress(num * len(a.steps), "drawing", log) as progress:
        return sample(student, a.out, num=num, cond=cond, seed=seed, progress=progress, **options)


def _refiner(a: argparse.Namespace, seed: int, device: torch.device) -> FrozenRefiner | None:
    """The pipeline of --refiner on the student's device."""
    if a.refiner is None:
        return None
    from flowmap.teachers.refiner import Refiner

    return Refiner(a.refiner, strength=a.refiner_strength, prompt=a.prompt or "", seed=seed).load().to(device)


def tilted(reward: Sequence[str] | None, tilt: Sequence[str]) -> Tilted | None:
    """The sampler of --reward KIND key=value ... and --tilt key=value ..."""
    if reward is None:
        if tilt:
            raise ValueError("--tilt: goes with --reward")
        return None
    from flowmap.recipe.recipe import sampler_from

    kind, *settings = reward
    named = {"kind": "function", "function": kind} if ":" in kind else {"kind": kind}
    return sampler_from({"kind": "tilted", "reward": named}, [f"reward.{one}" for one in settings] + list(tilt))


def _alone(a: argparse.Namespace) -> None:
    """Raise ValueError if --texts is given with an option that editing sentences ignores."""
    names = "guidance gamma solver reward tilt inpaint interpolate refiner prompt num seed compile"
    if (given := _given(a, names)) is not None:
        raise ValueError(f"--{given}: does not go with --texts, which takes --steps, --class and --attribute")


def _given(a: argparse.Namespace, names: str) -> str | None:
    """The first of these options that is given, as it is written; None without one."""
    for name in names.split():
        value = getattr(a, name)
        if value is not None and value is not False and value != []:
            return {"label": "class"}.get(name, name).replace("_", "-")
    return None

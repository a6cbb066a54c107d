"""`flowmap sample`: draws samples as pictures or sentences."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from flowmap.cli.arguments import device_of, guided_arguments
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    guided_arguments(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    parser.add_argument("--num", type=int, help="samples for each number of steps (default: 64)")
    parser.add_argument(
        "--class",
        dest="label",
        metavar="NAME|K",
        help="one class, by its name or its number (default: all in turn)",
    )
    parser.add_argument("--prompt", help="text, for students that are conditioned on it")
    parser.add_argument(
        "--attribute",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="conditions of a student of sentences",
    )
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help="sentences to edit, one a line, for students that start from sentences",
    )
    parser.add_argument(
        "--reverse",
        action="store_true",
        help="edit them the other way, from the target style to the source",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="refused by distilled students, which cannot honour it",
    )
    parser.add_argument(
        "--refiner",
        metavar="DIR|HUB-ID",
        help="a diffusers image-to-image pipeline that refines the pictures",
    )
    parser.add_argument(
        "--refiner-strength",
        type=float,
        default=0.3,
        metavar="S",
        help="how much of the picture it changes, above 0 up to 1",
    )
    parser.add_argument("--gamma", type=float, metavar="G", help="noise put back between steps, 0..1")
    parser.add_argument(
        "--solver",
        choices=["euler", "midpoint", "heun", "rk4"],
        help="solve the student's velocity, in the place of its sampler",
    )
    parser.add_argument(
        "--inpaint",
        metavar="IMAGE",
        help="redraw part of this picture, through the code of a learned prior (with --mask)",
    )
    parser.add_argument("--mask", metavar="IMAGE", help="its light parts are redrawn")
    parser.add_argument(
        "--interpolate",
        nargs=2,
        metavar="IMAGE",
        help="samples between two pictures, through the code of a learned prior",
    )
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    parser.add_argument("--out", required=True, help="folder for the pictures")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.base.progress import Progress
    from flowmap.evaluation.samples import attribute_of, edit_file, sample
    from flowmap.student.folder import load_student

    check_writable(Path(a.out), "--out")
    student = load_student(a.student, base=a.base).to(device_of(a.device))
    if a.prompt is not None and student.config.text is None and a.refiner is None:
        raise ValueError("--prompt: this student is not conditioned on text")
    if (a.inpaint is None) != (a.mask is None):
        raise ValueError("--inpaint and --mask: go together: a picture, and the mask of what is redrawn")
    edits = {"inpaint": a.inpaint and (a.inpaint, a.mask), "interpolate": a.interpolate}
    prompt = a.prompt if student.config.text is not None else None
    given = (
        ("class", class_of(a.label, student.config.class_names)),
        ("prompt", prompt),
        ("negative_prompt", a.negative_prompt),
    )
    cond = {key: value for key, value in given if value is not None}
    cond |= dict(map(attribute_of, a.attribute))
    if a.texts is not None:
        _alone(a)
        print("\n".join(map(str, edit_file(student, Path(a.texts), Path(a.out), a.steps, cond, a.reverse))))
        return 0
    if a.reverse:
        raise ValueError("--reverse: goes with --texts, for students that edit sentences")
    if student.config.edits:
        raise ValueError(f"--texts: is required: this student carries sentences of {' to '.join(student.config.edits)}")
    num, seed, refine = 64 if a.num is None else a.num, a.seed or 0, None
    if a.refiner is not None:
        from flowmap.teachers.refiner import Refiner

        refiner = Refiner(a.refiner, strength=a.refiner_strength, prompt=a.prompt or "", seed=seed)
        refine = refiner.load().to(student.device)
    with Progress(num * len(a.steps), "drawing", log) as progress:
        options = dict(
            steps=a.steps,
            num=num,
            cond=cond,
            guidance=a.guidance,
            gamma=a.gamma,
            seed=seed,
            refine=refine,
            solver=a.solver,
        )
        grids = sample(student, a.out, **options, **edits, progress=progress)
    for grid in grids:
        print(grid)
    return 0


def class_of(given: str | None, names: Sequence[str] | None) -> str | int | None:
    """The class that --class names: by its name if the student has one of that name, otherwise by its number."""
    if given is None or (names and given in names):
        return given
    return int(given) if re.fullmatch(r"-?\d{1,18}", given) else given


def _alone(a: argparse.Namespace) -> None:
    """Raise ValueError if --texts is given with an option that editing sentences ignores."""
    names = ("guidance", "gamma", "solver", "inpaint", "interpolate", "refiner", "prompt", "num", "seed")
    given = next((name for name in names if getattr(a, name) is not None), None)
    if given is not None:
        raise ValueError(f"--{given}: does not go with --texts, which takes --steps, --class and --attribute")

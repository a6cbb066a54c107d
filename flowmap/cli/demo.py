"""`flowmap demo`: serves a page to try a student in the browser."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import device_of, student_argument
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It needs gradio (the extra `demo`). The page is for this machine alone unless --host is given."
    student_argument(parser, base=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    what = "a teacher to draw next to it (default: that of its recipe, if its weights are on this machine)"
    parser.add_argument("--teacher", metavar="DIR|HUB-ID", help=what)
    parser.add_argument("--no-teacher", action="store_true", help="draw the student alone")
    what = "Euler steps of the teacher (default: its recipe's evaluation.teacher_steps)"
    parser.add_argument("--teacher-steps", type=int, metavar="N", help=what)
    parser.add_argument("--device", help="default: a GPU, if there is one, otherwise cpu")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on; 0.0.0.0: every network of this machine"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")


def run(a: argparse.Namespace) -> int:
    from flowmap.evaluation.demo import open_demo
    from flowmap.evaluation.demo_page import serve
    from flowmap.student.folder import load_student

    if a.no_teacher and (a.teacher is not None or a.teacher_steps is not None):
        raise ValueError("--no-teacher: excludes --teacher and --teacher-steps")
    student = load_student(a.student, base=a.base).to(device_of(a.device))
    teacher = a.teacher or not a.no_teacher
    demo = open_demo(student, steps=a.steps, teacher=teacher, teacher_steps=a.teacher_steps, log=log)
    serve(demo, host=a.host, port=a.port, log=log)
    return 0

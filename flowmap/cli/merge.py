"""`flowmap merge`: adds what others trained on the same base onto a student's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowmap.cli.arguments import student_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    student_argument(parser)
    parser.add_argument(
        "--delta",
        metavar="DIR|FILE",
        help="the finetune: a diffusers folder, a student folder or a safetensors file",
    )
    parser.add_argument("--base", metavar="DIR|FILE", help="what it was trained from")
    parser.add_argument("--alpha", type=float, default=1.0, metavar="A", help="how much of the difference")
    parser.add_argument("--lora", metavar="FILE", help="a LoRA in the format of diffusers or peft, safetensors")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="how much of the LoRA")
    parser.add_argument("--strict", action="store_true", help="refuse what does not fit whole")
    parser.add_argument("--overwrite", action="store_true", help="replace the merge in the folder")
    parser.add_argument("--out", required=True, help="folder for the student")


def run(a: argparse.Namespace) -> int:
    from flowmap.export.folder import check_free
    from flowmap.export.merge import STAMP, merge, write_merged
    from flowmap.student.folder import load_student

    check_free(Path(a.out), a.overwrite, stamp=STAMP, what="merge")
    student = load_student(a.student)
    merged = merge(student, delta=a.delta, base=a.base, alpha=a.alpha, lora=a.lora, scale=a.scale, strict=a.strict)
    print("\n".join(merged.lines()))
    print(write_merged(merged, student, a.out, overwrite=a.overwrite))
    return 0

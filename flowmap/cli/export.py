"""`flowmap export`: writes a student for use without flowmap, or as a Space."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowmap.cli.arguments import student_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    student_argument(parser, base=True)
    parser.add_argument(
        "--to",
        choices=["diffusers", "torch", "onnx", "lora", "lora-peft", "lora-comfyui", "space"],
        default="diffusers",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="K",
        help="steps that it is made for (default: the sampler's largest)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale that it is made for (default: the recipe's)",
    )
    parser.add_argument(
        "--custom",
        action="store_true",
        help="a pipeline with its own code, also where diffusers has a stock one",
    )
    parser.add_argument("--no-text", action="store_true", help="leave the student's text encoders out of the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the export in the folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload the folder to that repository of the hub")
    parser.add_argument("--out", required=True, help="folder for the export")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.hub import check_repository, upload
    from flowmap.export import export
    from flowmap.student.folder import load_student

    if a.push is not None:
        check_repository(a.push, "--push")
    options: dict[str, Any] = dict(to=a.to, steps=a.steps, guidance=a.guidance, custom=a.custom, text=not a.no_text)
    options["overwrite"] = a.overwrite
    print(export(load_student(a.student, base=a.base), a.out, **options))
    if a.push is not None:
        key = f"--push: {a.out} is written"
        print(upload(Path(a.out), a.push, message="flowmap export", key=key, space=a.to == "space"))
    return 0

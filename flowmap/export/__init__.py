"""Exports a student with a card: a diffusers pipeline or LoRA or a torch or ONNX program, which do not need flowmap, or
a Space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowmap.base.files import write_text
from flowmap.export.card import export_card
from flowmap.export.folder import check_free, whole_folder
from flowmap.export.plan import make_plan
from flowmap.nets.module import Module
from flowmap.nets.stacked import net_within
from flowmap.student.student import Student

LORA = ("lora", "lora-peft", "lora-comfyui")
TARGETS = ("diffusers", "torch", "onnx", *LORA, "space")


def export(
    student: Student,
    out: str | Path,
    *,
    to: str = "diffusers",
    steps: int | None = None,
    guidance: float | None = None,
    custom: bool = False,
    text: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the folder `out`, completely or not at all, and return it.

    to: "diffusers" is a stock pipeline if there is one and `custom` is not set, otherwise one with custom code;
    "lora" are the adapters of a LoRA student for the stock pipeline of its base, "lora-peft" and "lora-comfyui" the
    same with the names of PEFT and of the original checkpoint, which ComfyUI reads; "torch" and "onnx" are programs;
    "space" is an app for a hub with the page of `flowmap demo`, whose visitors choose steps and guidance.
    steps and guidance default to the student's largest number of steps and its default scale. text: include the text
    encoders. Raises a ValueError that names what is not possible.
    """
    if to not in TARGETS:
        raise ValueError(f"--to: {to!r} is not one of {', '.join(TARGETS)}")
    if custom and to != "diffusers":
        raise ValueError("--custom: is a way to export to diffusers")
    student.check_whole()
    if to == "space":
        return _space(student, Path(out), overwrite, given={"--steps": steps, "--guidance": guidance})
    if student.config.text_autoencoder is not None:
        share = "share its folder, which load_student reads"
        raise ValueError(f"student: its samples are sentences, for which diffusers has no pipeline; {share}")
    out = Path(out)
    check_free(out, overwrite)
    plan = make_plan(student, steps, guidance, merge=to not in LORA, text=text)
    kind, write = _way(plan, to, custom)
    with whole_folder(out, plan.note(kind), overwrite=overwrite) as folder:
        write_text(folder / "README.md", export_card(plan, kind, write(plan, folder)))
    return out


def _space(student: Student, out: Path, overwrite: bool, given: Mapping[str, object]) -> Path:
    from flowmap.export.space import write_space

    for key, value in given.items():
        if value is not None:
            raise ValueError(f"{key}: {value} was given, but a Space draws at all of the student's steps and scales")
    check_free(out, overwrite)
    return write_space(student, out, overwrite=overwrite)


def _way(plan, to: str, custom: bool):
    """(kind, writer); diffusers is imported only if it is needed."""
    if to == "torch":
        from flowmap.export.program import write_program

        return "torch", write_program
    if to == "onnx":
        from flowmap.export.onnx import write_onnx

        return "onnx", write_onnx
    own = net_within(plan.student.config.net)
    if isinstance(own, Module):
        what = f"the student is the module {own.module!r}, whose source flowmap does not have"
        raise ValueError(f"--to {to}: {what}; take --to torch or --to onnx, programs that do not need it")
    if to in LORA:
        from flowmap.export.lora import write_comfyui, write_lora, write_peft

        return to, {"lora": write_lora, "lora-peft": write_peft, "lora-comfyui": write_comfyui}[to]
    from flowmap.export.custom import write_custom
    from flowmap.export.stock import has_stock, write_stock

    return ("stock", write_stock) if has_stock(plan) and not custom else ("custom", write_custom)

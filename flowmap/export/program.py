"""Exports a student's sampler as one torch program (.pt2) from noise and conditions to samples, without our code."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmap.base.files import write_beside
from flowmap.export.plan import Export, Written
from flowmap.export.text import PROMPT
from flowmap.flow.types import Cond
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions as example_text
from flowmap.nets.stacked import net_within
from flowmap.student.examples import tokens_of
from flowmap.teachers.autoencoder import pictures_of

PROGRAM = "program.pt2"
FEW = 63  # the largest batch for which diffusers' upsampling takes the same code path
TOKENS = ("text", "text_mask")  # conditions with the tokens of a prompt in their second dimension
MASKED = (
    "HunyuanImageTransformer2DModel", "Lumina2Transformer2DModel",
    "SanaTransformer2DModel", "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel",
)  # fmt: skip
EXAMPLE = 3  # batch size for tracing, different from all other dimensions of a sample


class SamplerProgram(nn.Module):
    """A module from noise (B, *shape) and cond to samples, as in Student.sample, with unrolled steps."""

    shift: Tensor
    scale: Tensor

    def __init__(self, plan: Export):
        super().__init__()
        self.flow_map, self.sampler, self.steps = plan.student.flow_map, plan.sampler, plan.steps
        self.clamp = plan.student.config.clamp
        frozen = plan.autoencoder()
        self.autoencoder, self.unit = None if frozen is None else frozen.model, plan.unit
        shift, scale = ((0.0,), (1.0,)) if frozen is None else (frozen.shift, frozen.scale)
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))

    def forward(self, noise: Tensor, cond: Cond) -> Tensor:
        x = self.sampler(self.flow_map, noise, cond, steps=self.steps)
        if self.autoencoder is not None:
            x = pictures_of(self.autoencoder, x / self.scale + self.shift)
            x = 2 * x - 1 if self.unit else x
        return x.clamp(-1, 1) if self.clamp or self.autoencoder is not None else x


@dataclass(frozen=True)
class Traced:
    """A sampler as a torch program, the conditions that it was traced with, and notes for the card."""

    program: torch.export.ExportedProgram
    cond: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    def sizes(self) -> str:
        """The allowed batch sizes and numbers of tokens, in words."""
        batch = f"batch size: {sizes_of(self.program, 'noise', 0)}"
        return batch + (f"; tokens: {sizes_of(self.program, 'cond_text', 1)}" if "text" in self.cond else "")


def traced(plan: Export, to: str = "torch") -> Traced:
    """The traced sampler of the plan, on the CPU. ValueErrors name the target `to`, or the setting."""
    if plan.gamma > 0 and plan.steps > 1:
        what = f"gamma = {plan.gamma:g} draws noise between steps, which a program cannot"
        raise ValueError(f"--steps: {what}; take --steps 1")
    plan.student.to("cpu")
    cond, note = example_conditions(plan)
    module, noise = SamplerProgram(plan).eval(), torch.randn(EXAMPLE, *plan.student.config.shape)
    return Traced(export_program(module, noise, cond, to=to), cond, (note,) if note else ())


def write_program(plan: Export, folder: Path) -> Written:
    """Write program.pt2, for any batch size if torch can trace it so, and return the Python lines that call it."""
    sampler = traced(plan)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # Python writes the file: torch's writer aborts the process if the disk is full
    torch.export.save(sampler.program, buffer)
    write_beside(folder / PROGRAM, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
    return Written(_snippet(plan, sampler), sampler.notes)


def export_program(module: nn.Module, noise: Tensor, cond: Cond, *, to: str = "torch") -> torch.export.ExportedProgram:
    """The traced program, with batch size and number of tokens as dynamic as tracing allows.

    Raises a ValueError if the network cannot be traced.
    """
    dim = torch.export.Dim
    some, few, words = dim("batch", min=1), dim("batch", min=1, max=FEW), dim("tokens", min=1)
    found: Exception | None = None
    for batch, tokens in ((some, words), (few, words), *[(some, dim.STATIC)] * ("text" in cond), (dim.AUTO, dim.AUTO)):
        shapes = ({0: batch}, {key: {0: batch} | ({1: tokens} if key in TOKENS else {}) for key in cond})
        try:
            with torch.no_grad(), _silent():
                return torch.export.export(module, (noise, cond), dynamic_shapes=shapes)
        except Exception as error:
            found = found or error
    raise ValueError(f"--to {to}: this network cannot be traced: {str(found).strip().splitlines()[0]}") from found


@contextmanager
def _silent() -> Iterator[None]:
    """A context without torch's long log messages about guards."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def sizes_of(program: torch.export.ExportedProgram, name: str, dim: int) -> str:
    """A description of the allowed sizes of a dimension of "noise", or "cond_" with the name of a condition."""
    size = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[dim]
    if isinstance(size, int) or size.node.expr.is_number:
        return f"exactly {int(size)}"
    limits = program.range_constraints[size.node.expr]
    low, high = int(limits.lower), str(limits.upper)
    return f"{low} to {high}" if high.isdigit() else f"any from {low}" if low > 1 else "any"


def example_conditions(plan: Export) -> tuple[dict[str, Tensor], str]:
    """Conditions with EXAMPLE rows, and a note for the card.

    The student's text encoder encodes a prompt; without one, conditions are zeros in the shapes of the network's
    settings.
    """
    config, note = plan.student.config, ""
    if config.text is not None and plan.text:
        try:
            return plan.student.conditions(EXAMPLE, {"prompt": PROMPT}, plan.guidance), note
        except ValueError as error:
            note = (
                f"Its text encoder could not be loaded when it was exported ({error}): "
                "the conditions above are those that its network names."
            )
    cond = {"class": torch.arange(EXAMPLE) % config.num_classes} if config.num_classes else {}
    if plan.guidance is not None:
        cond["guidance"] = torch.full((EXAMPLE,), plan.guidance)
    net = net_within(config.net)
    if isinstance(net, DiffusersModel):
        cond |= example_text(net, EXAMPLE, tokens=tokens_of(net.network, config.text))
        if net.network in MASKED:
            cond["text_mask"] = torch.ones(EXAMPLE, cond["text"].shape[1], dtype=torch.bool)
    return cond, note


def _snippet(plan: Export, sampler: Traced) -> str:
    num, classes = EXAMPLE, plan.student.config.num_classes
    made = {key: _filled(value) for key, value in sampler.cond.items()}
    known = {"class": f"torch.arange({num}) % {classes}", "guidance": f"torch.full(({num},), {plan.guidance})"}
    rows = [f'"{key}": {known.get(key, text)}' for key, text in made.items()]
    shape = ", ".join(str(n) for n in (num, *plan.student.config.shape))
    lines = ["import torch", "", 'program = torch.export.load("path/to/this/folder/program.pt2").module()']
    call = f"images = program(torch.randn({shape}), {{{', '.join(rows)}}})"
    return "\n".join([*lines, f"{call}  # {sampler.sizes()}"])


def _filled(value: Tensor) -> str:
    """Python code for a tensor of that shape and dtype, for the card: ones for a mask, otherwise zeros."""
    shape = tuple(value.shape)
    return f"torch.ones({shape}, dtype=torch.bool)" if value.dtype == torch.bool else f"torch.zeros{shape}"

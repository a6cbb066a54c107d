"""Exports a student's sampler as one ONNX graph: the unrolled program of program.py, for onnxruntime and its kind."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.export.plan import Export, Written
from flowmap.export.program import EXAMPLE, TOKENS, Traced, traced

GRAPH = "program.onnx"
IN_ONE_FILE = 1_900_000_000  # bytes: a protobuf message ends at 2 GiB, so larger weights go to program.onnx.data
OUTPUT = "samples"


def write_onnx(plan: Export, folder: Path) -> Written:
    """Write program.onnx and return the lines that run it. Its inputs are "noise" and each condition by its name.

    Sizes are as dynamic as those of the torch program. Raises a ValueError if onnx or onnxscript is missing, or an
    operation of the network has no ONNX form.
    """
    check_installed()
    sampler = traced(plan, "onnx")
    graph = converted(sampler)
    folder.mkdir(parents=True, exist_ok=True)
    weights = sum(value.nbytes for value in sampler.program.state_dict.values())
    graph.save(str(folder / GRAPH), external_data=weights > IN_ONE_FILE)
    note = "Run it with onnxruntime, or anything else that reads ONNX, such as OpenVINO; torch is not needed."
    return Written(_snippet(plan, sampler), (note, *sampler.notes))


def check_installed() -> None:
    """Raise a ValueError unless the packages that write ONNX are there."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx: {error}: pip install 'flowmap-distillation[onnx]'") from error


def converted(sampler: Traced) -> Any:
    """The torch.onnx.ONNXProgram, whose dynamic sizes are called "batch" and "tokens"."""
    names = ["noise", *sampler.cond]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx's own deprecations
        try:
            graph = torch.onnx.export(
                sampler.program, dynamo=True, input_names=names, output_names=[OUTPUT],
                verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"--to onnx: this network has no ONNX form: {_reason(error)}") from error
    assert graph is not None
    _name_sizes(graph.model.graph)
    return graph


def _reason(error: BaseException) -> str:
    """The innermost message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0]


def _name_sizes(graph: Any) -> None:
    """Rename the symbols of dynamic sizes in all shapes of the graph: s77 becomes "batch" or "tokens"."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for dim, name in ((0, "batch"), *[(1, "tokens")] * (value.name in TOKENS)):
            if not isinstance(value.shape[dim], int):
                names.setdefault(value.shape[dim].value, name)
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        for dim, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:  # None: a size that is not known
                value.shape[dim] = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.value)


def _snippet(plan: Export, sampler: Traced) -> str:
    num, classes = EXAMPLE, plan.student.config.num_classes
    shape = ", ".join(str(n) for n in (num, *plan.student.config.shape))
    known = {"class": f"np.arange({num}) % {classes}", "guidance": f"np.full({num}, {plan.guidance}, np.float32)"}
    given = [f'"noise": np.random.default_rng(0).standard_normal(({shape}), np.float32)']
    given += [f'"{key}": {known.get(key) or _filled(value)}' for key, value in sampler.cond.items()]
    return "\n".join([
        "import numpy as np", "import onnxruntime", "",
        f'session = onnxruntime.InferenceSession("path/to/this/folder/{GRAPH}")',
        f"given = {{  # {sampler.sizes()}", *(f"    {one}," for one in given), "}",
        "(images,) = session.run(None, given)",
    ])  # fmt: skip


def _filled(value: Tensor) -> str:
    """Code for an array of that shape and type, for the card: ones for a mask, otherwise zeros."""
    kind = {torch.bool: "bool", torch.int64: "np.int64"}.get(value.dtype, "np.float32")
    return f"np.{'ones' if kind == 'bool' else 'zeros'}({tuple(value.shape)}, {kind})"

"""A student with quantised weights: their format, their size, and what is refused to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.quantized import check_available, check_format, form_of, quantize, quantized_layers

FLOAT32 = 4  # bytes


class Quantizable:
    """The methods of a student that concern the format of its weights."""

    flow_map: FlowMapNet
    folder: Path | None

    @property
    def quantized(self) -> str | None:
        """The format of its quantised weights, `int8` or `nf4`; None for a student loaded without `quantize`."""
        return form_of(self.flow_map)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the network's parameters as they are held."""
        return sum(p.nbytes for p in self.flow_map.parameters())

    def quantized_json(self) -> dict[str, Any]:
        """{"quantized": its format and bytes} of its figures; {} for a student loaded without `quantize`."""
        if self.quantized is None:
            return {}
        return {"quantized": {"format": self.quantized, "weight_bytes": self.weight_bytes}}

    def check_whole(self) -> None:
        """Raise ValueError if the weights are quantised: codes are neither merged nor written to files."""
        if (form := self.quantized) is not None:
            what = f"its weights are held as {form} codes, for sampling alone"
            raise ValueError(f"student: {what}; load it without quantize to export, save or merge it")

    def size_line(self) -> str:
        """A line on the format of the weights and their size: in memory, in float32, and in the student's file."""
        layers = quantized_layers(self.flow_map)
        codes = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)
        others = sum(p.numel() for p in self.flow_map.parameters()) - sum(
            layer.codes.numel() + layer.scales.numel() for layer in layers
        )
        whole = FLOAT32 * (others + sum(layer.in_features * layer.out_features for layer in layers))
        line = f"quantize: {self.quantized}: {len(layers)} linear layers in {_mib(codes)}"
        line += f"; all weights {_mib(self.weight_bytes)} instead of {_mib(whole)} in float32"
        file = None if self.folder is None else self.folder / "model.safetensors"
        return line if file is None or not file.is_file() else f"{line}; {_mib(file.stat().st_size)} on disk, unchanged"


def check_quantize(form: str | None) -> None:
    """Raise a one-line ValueError for an unknown format, or if the library that quantises is not installed."""
    if form is not None:
        check_format(form, "quantize")
        check_available("quantize")


def quantize_student(flow_map: FlowMapNet, form: str, *, adapted: bool) -> None:
    """Quantise the network's large linear layers in place, if `adapted` those of the frozen base of its adapters alone.

    Raises a one-line ValueError if it has none.
    """
    if not adapted:
        flow_map.requires_grad_(False)
    quantize([flow_map], form, key="quantize")


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"

"""Converts published EDM and EDM2 pickles to student folders (config.json, model.safetensors); executes no pickle."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from flowmap.convert.published import config_of, tensors_of_net
from flowmap.flow.averaging import posthoc_coefficients
from flowmap.nets.flow_map import mismatch
from flowmap.student.config import StudentConfig
from flowmap.student.folder import check_place, save_student
from flowmap.student.snapshots import weighted_sum
from flowmap.teachers.pickled import Record, read_pickle

SNAPSHOT = re.compile(r"-(\d+)-(\d+\.\d+)\.pkl$")


def import_weights(files: list[str], out: str | Path, *, std: float | None = None) -> StudentConfig:
    """Write the network of one pickle, or the post-hoc average of several snapshots, as a folder for load_student.

    `std` is the width of that average. Snapshots are named ...-NUMBER-STD.pkl, as EDM2's are. Raises a one-line
    ValueError for a file that cannot be used.
    """
    if (len(files) > 1) != (std is not None):
        raise ValueError("--std: is the width of an average over snapshots: give it with several files, and only then")
    check_place(Path(out), "--out")
    nets = [_network(file) for file in files]
    weights = tensors_of_net(nets[0], files[0])
    config = config_of(nets[0], weights, files[0])
    if std is not None:
        others = [tensors_of_net(net, file) for net, file in zip(nets[1:], files[1:], strict=True)]
        weights = _average([weights, *others], files, std)
    weights = _student_weights(config, weights, files[0])
    names = ", ".join(Path(f).name for f in files)
    card = f"# {Path(out).name}\n\nImported from {names}{'' if std is None else f', averaged to std {std}'}.\n"
    save_student(Path(out), config, weights, recipe="", card=card)
    return config


def _network(file: str) -> Record:
    content = read_pickle(file)
    net = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(net, Record):
        raise ValueError(f"{file}: holds no network under 'ema'")
    return net


def _average(parts: list[dict[str, Tensor]], files: list[str], std: float) -> dict[str, Tensor]:
    found = []
    for file in files:
        match = SNAPSHOT.search(file)
        if match is None:
            raise ValueError(f"{file}: its name does not end in -NUMBER-STD.pkl, the training step and the EMA width")
        found.append(match)
    steps, stds = [int(m[1]) for m in found], [float(m[2]) for m in found]
    coefficients = posthoc_coefficients(steps, stds, target_step=None, target_std=std).tolist()
    return weighted_sum(zip(coefficients, files, parts, strict=True))


def _student_weights(config: StudentConfig, weights: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """The weights by their names in a student. ValueError unless names and shapes match those of a new student."""
    with torch.device("meta"):
        expected = config.build().state_dict()
    named = {f"net.{name}": tensor.contiguous() for name, tensor in weights.items()}
    found = mismatch(expected, named)
    if found is not None:
        name, wanted, was = found
        raise ValueError(f"{file}: {name} is {was}, in a network of these settings it is {wanted}")
    return named

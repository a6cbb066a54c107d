"""Published EDM and EDM2 pickles become a folder that flowmap reads: config.json and model.safetensors. Nothing in a pickle is executed."""

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
    """Writes the network of one pickle, or the post-hoc average of width std over several snapshots, as a folder that load_student reads.

    Snapshots are named ...-NUMBER-STD.pkl, as EDM2's are. Raises ValueError, in one line, for a file that cannot be used.
    """
    if (len(files) > 1) != (std is not None):
        raise ValueError(
            "--std: is the width of an average over several snapshots: give it with more than one file, and only then"
        )
    check_place(Path(out), "--out")
    nets = [_network(file) for file in files]
    weights = tensors_of_net(nets[0], files[0])
    config = config_of(nets[0], weights, files[0])
    if std is not None:
        weights = _average(
            [weights, *(tensors_of_net(net, file) for net, file in zip(nets[1:], files[1:], strict=True))], files, std
        )
    weights = _in_place(config, weights, files[0])
    card = f"# {Path(out).name}\n\nImported from {', '.join(Path(f).name for f in files)}{'' if std is None else f', averaged to std {std}'}.\n"
    save_student(Path(out), config, weights, recipe="", card=card)
    return config


def _network(file: str) -> Record:
    held = read_pickle(file)
    net = held.get("ema") if isinstance(held, dict) else held
    if not isinstance(net, Record):
        raise ValueError(f"{file}: holds no network under 'ema'")
    return net


def _average(parts: list[dict[str, Tensor]], files: list[str], std: float) -> dict[str, Tensor]:
    found = []
    for file in files:
        match = SNAPSHOT.search(file)
        if match is None:
            raise ValueError(
                f"{file}: its name does not end in -NUMBER-STD.pkl, which says where in training it was taken"
            )
        found.append(match)
    steps, stds = [int(m[1]) for m in found], [float(m[2]) for m in found]
    coefficients = posthoc_coefficients(steps, stds, target_step=None, target_std=std).tolist()
    return weighted_sum(zip(coefficients, files, parts, strict=True))


def _in_place(config: StudentConfig, weights: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """The weights by the names that they have in a student; every tensor has its place, and none is left over."""
    with torch.device("meta"):
        expected = config.build().state_dict()
    named = {f"net.{name}": tensor.contiguous() for name, tensor in weights.items()}
    odd = mismatch(expected, named)
    if odd is not None:
        name, wants, was = odd
        raise ValueError(f"{file}: {name} is {was}, in a network of these settings it is {wants}")
    return named

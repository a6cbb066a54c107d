"""Checkpoints of runs with sharded weights: a folder, into which each process writes what it has.

    last.ckpt/
      index.json                  number of shards, shapes of the weights, the hash of each file
      rest.ckpt                   what else a checkpoint holds (checkpoint_file.py)
      shard-00000.safetensors     the first part of every weight and of its optimizer's state, and what is not split

Weights are split along their first dimension, so a run on another number of processes reads the rows that it needs.
Only the first of several replicas writes. The folder has a temporary name until all of its files are complete.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from flowmap.base.files import POLL, file_digest, naming, read_json, write_json, write_tensors

INDEX, REST = "index.json", "rest.ckpt"
OPTIMIZER, KEPT_ASIDE = "optimizer", ".before"
DEADLINE = 1800.0  # seconds that the first process waits for the files of the others


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def place_of(module: nn.Module) -> tuple[int, int, int]:
    """(replica, shard, number of shards) of this process, by the module's first sharded parameter."""
    mesh = next(p for p in module.parameters() if isinstance(p, DTensor)).device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    replica = coordinate[0] if mesh.ndim == 2 else 0
    return replica, coordinate[-1], mesh.shape[-1]


def snapshot(module: nn.Module, optimizers: list[torch.optim.Optimizer], shard: int) -> dict[str, Tensor]:
    """Copies on the CPU of what this process writes; tensors that are not split are of shard 0."""
    found = dict(_entries(module, optimizers))
    mine = {name: one.to_local() if isinstance(one, DTensor) else one for name, one in found.items()}
    wanted = (name for name in found if shard == 0 or isinstance(found[name], DTensor))
    return {name: mine[name].detach().to("cpu", copy=True) for name in wanted}


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor]) -> None:
    """Write the file, then one with its hash, which says that it is complete."""
    path = shard_file(folder, shard)
    write_tensors(path, tensors, finite=False)
    write_json(path.with_suffix(".json"), {"sha256": file_digest(path)})


def complete(folder: Path, target: Path, shapes: dict[str, list[int]], shards: int) -> None:
    """Wait for the files of all shards, write the index and rename the folder to `target`, which is replaced."""
    hashes, files = {}, [shard_file(folder, shard) for shard in range(shards)]
    started = time.monotonic()
    with naming(target, TimeoutError):
        while not all(file.with_suffix(".json").is_file() for file in files):
            if time.monotonic() - started > DEADLINE:
                raise TimeoutError(f"a process did not write its part within {DEADLINE:g} seconds")
            time.sleep(POLL / 10)
        for file in files:
            hashes[file.name] = read_json(file.with_suffix(".json"))["sha256"]
            file.with_suffix(".json").unlink()
        write_json(folder / INDEX, {"shards": shards, "shapes": shapes, "sha256": hashes})
        before = target.with_name(target.name + KEPT_ASIDE)
        if target.exists():
            target.rename(before)
        folder.rename(target)
    shutil.rmtree(before) if before.is_dir() else before.unlink(missing_ok=True)


def read_index(folder: Path) -> dict[str, Any]:
    """The index, checked. Raises ValueError with the file's name."""
    index = read_json(folder / INDEX)
    shards, shapes = index.get("shards"), index.get("shapes")
    if not isinstance(shards, int) or not 0 < shards < 1 << 20 or not isinstance(shapes, dict):
        raise ValueError(f"{folder / INDEX}: is no index of a checkpoint")
    if not all(shard_file(folder, shard).is_file() for shard in range(shards)):
        raise ValueError(f"{folder}: does not have all of its {shards} shards")
    return index


def check_shards(folder: Path) -> None:
    """Raise ValueError unless the content of every file has the hash in the index."""
    index = read_index(folder)
    for shard in range(index["shards"]):
        path = shard_file(folder, shard)
        if file_digest(path) != index["sha256"].get(path.name):
            raise ValueError(f"{path}: its content is not what was written (SHA-256)")


def shapes_in(folder: Path) -> dict[str, Tensor]:
    """Tensors on the meta device with the names and shapes of the weights."""
    return {name: torch.empty(shape, device="meta") for name, shape in read_index(folder)["shapes"].items()}


@torch.no_grad()
def restore(folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], groups: list[Any]) -> None:
    """Fill the module's weights and the optimizers' states, whatever number of processes has written them.

    groups: the parameter groups of each optimizer. Raises ValueError if something is missing or of another shape.
    """
    files = [safe_open(shard_file(folder, i), "pt") for i in range(read_index(folder)["shards"])]
    names = {p: name for name, p in module.named_parameters()}
    for name, target in _weights(module):
        value = _part(files, name, target)
        (target.to_local() if isinstance(target, DTensor) else target).copy_(value)
    for i, (optimizer, saved) in enumerate(zip(optimizers, groups, strict=True)):
        state, parameters = {}, [p for group in optimizer.param_groups for p in group["params"]]
        there = _keys_of_states(files[0], i)
        for number, p in enumerate(parameters):
            prefix = f"{OPTIMIZER}.{i}.{names[p]}."
            state[number] = {key: _like(files, prefix + key, p) for key in there.get(names[p], ())}
        optimizer.load_state_dict({"state": {n: one for n, one in state.items() if one}, "param_groups": saved})


def _entries(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    yield from _weights(module)
    names = {p: name for name, p in module.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{OPTIMIZER}.{i}.{names[p]}.{key}", value


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is in the module's state dict, as it is in the module; a buffer of several networks once."""
    saved, seen = module.state_dict().keys(), set[int]()
    there = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name in saved:
        if name in there and id(there[name]) not in seen:
            seen.add(id(there[name]))
            yield name, there[name]


def _keys_of_states(file: Any, number: int) -> dict[str, list[str]]:
    """The keys of an optimizer's state by the parameter's name. The first shard has all of them."""
    found: dict[str, list[str]] = {}
    prefix = f"{OPTIMIZER}.{number}."
    for name in file.keys():  # noqa: SIM118  (no mapping)
        if name.startswith(prefix):
            parameter, _, key = name.removeprefix(prefix).rpartition(".")
            found.setdefault(parameter, []).append(key)
    return found


def _like(files: list[Any], name: str, parameter: Tensor) -> Tensor:
    """An entry of a parameter's state: split as the parameter is, or a scalar such as the number of steps."""
    if not files[0].get_slice(name).get_shape():
        return files[0].get_tensor(name)
    value = _part(files, name, parameter)
    if not isinstance(parameter, DTensor):
        return value
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    value = value.to(parameter.device)
    return DTensor.from_local(value, parameter.device_mesh, parameter.placements, run_check=False, **whole)


def _part(files: list[Any], name: str, target: Tensor) -> Tensor:
    """The rows of an entry that this process has of `target`."""
    try:
        if not isinstance(target, DTensor):
            return files[0].get_tensor(name)
        slices = [file.get_slice(name) for file in files]
    except Exception as error:  # safetensors raises its own error for a name that is not there
        raise ValueError(f"{name}: is missing in the checkpoint") from error
    rows, local = sum(one.get_shape()[0] for one in slices), target.to_local()
    if rows != target.shape[0] or slices[0].get_shape()[1:] != list(target.shape[1:]):
        found = (rows, *slices[0].get_shape()[1:])
        raise ValueError(f"{name}: has shape {found} in the checkpoint, {tuple(target.shape)} in this run")
    start = _first_row(target)
    parts, offset = [], 0
    for one in slices:
        count = one.get_shape()[0]
        low, high = max(start - offset, 0), min(start + len(local) - offset, count)
        if low < high:
            parts.append(one[low:high])
        offset += count
    return torch.cat(parts) if parts else local.new_zeros(local.shape, device="cpu")


def _first_row(target: DTensor) -> int:
    coordinate = target.device_mesh.get_coordinate()
    assert coordinate is not None and isinstance(target.placements[-1], Shard)
    return min(coordinate[-1] * math.ceil(target.shape[0] / target.device_mesh.shape[-1]), target.shape[0])

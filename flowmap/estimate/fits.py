"""Whether a run fits its devices: lines on the memory of training and of evaluation, and what to change where not."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flowmap.base.distributed import on_gpus
from flowmap.estimate.evaluation import EvaluationMemory
from flowmap.estimate.memory import Memory
from flowmap.recipe import Recipe

H100 = ("an H100", 79.1 * 2**30)  # a GPU of 80 GB, as torch reports it
OWN = 2 * 2**30  # bytes of CUDA's context and libraries
REPORTED = 0.985  # of a GPU's memory by its name, in GiB, what torch reports: 79.1 of 80, 23.6 of 24


def memory_lines(
    recipe: Recipe, training: Memory, evaluation: EvaluationMemory | None, memory: float | None = None
) -> list[str]:
    """Return a line on the memory of training, one on that of evaluation, and a warning for each that does not fit.

    evaluation: None for a run that does not measure samples of a student. memory: as for device_memory.
    """
    lines = [_training(recipe, training)]
    if evaluation is not None:
        lines.append(_evaluation(training, evaluation))
    return [*lines, *_warnings(recipe, training, evaluation, memory)]


def device_memory(accelerator: str, memory: float | None = None) -> tuple[str, float]:
    """Return the name and the bytes of a device: the first GPU of this machine, or an H100 where it has none.

    memory: those of a GPU that is asked about instead, in GB, as its name has them.
    """
    if memory is not None:
        return f"a GPU of {memory:g} GB", REPORTED * memory * 2**30
    if not on_gpus(accelerator):
        return H100
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}", float(found.total_memory)


def staying(training: Memory) -> float:
    """Return the bytes of training that stay on the device while samples are measured: all but activations."""
    return training.total - training.activations


def measuring_bytes(training: Memory, evaluation: EvaluationMemory | None) -> float:
    """Return the bytes on the device while samples are measured; 0 for a run that measures none."""
    return 0.0 if evaluation is None else staying(training) + evaluation.device


def fits(count: float, there: float) -> bool:
    """Whether that many bytes fit a device of `there` bytes, next to CUDA's own."""
    return count + OWN <= there


def _training(recipe: Recipe, memory: Memory) -> str:
    trainer, form = recipe.trainer, recipe.quantize.frozen
    how = [trainer.precision] if trainer.precision != "32" else []
    how += ["checkpointed"] if trainer.activation_checkpointing else []
    kept = f"{gib_of(memory.activations)} activations at batch {recipe.data.batch_size}"
    parts = [f"{gib_of(memory.state)} weights, gradients, optimiser and averages"]
    parts += [f"{gib_of(memory.frozen)} frozen networks{f' ({form})' if form else ''}"] if memory.frozen else []
    parts += [f"{gib_of(memory.text)} text encoders"] if memory.text else []
    parts += [f"{gib_of(memory.working)} {_copies(recipe)}"] if memory.working else []
    parts.append(f"{kept} ({', '.join(how)})" if how else kept)
    split = f" in {trainer.shards} shards" if trainer.strategy == "fsdp" else ""
    return f"memory for each device{split}, estimated: {' + '.join(parts)} = {gib_of(memory.total)}"


def _evaluation(training: Memory, memory: EvaluationMemory) -> str:
    batch = max(memory.drawing, memory.decoding, memory.features)
    parts = [f"{gib_of(staying(training))} that training keeps"]
    parts += [f"{gib_of(memory.weights)} decoder, text encoders and feature networks"] if memory.weights else []
    parts += [f"{gib_of(memory.states)} metrics"] if memory.states >= 2**20 else []
    parts.append(f"{gib_of(batch)} a batch of samples")
    whole = f"{' + '.join(parts)} = {gib_of(measuring_bytes(training, memory))}"
    host = f"; {gib_of(memory.host)} of the host for each process" if memory.host >= 2**20 else ""
    return f"memory for each device while measuring: {whole}{host}"


def _warnings(
    recipe: Recipe, training: Memory, evaluation: EvaluationMemory | None, memory: float | None
) -> Iterator[str]:
    trainer, (name, there) = recipe.trainer, device_memory(recipe.trainer.accelerator, memory)
    if trainer.accelerator == "cpu" and memory is None:
        return
    has = f"{gib_of(there)}, about {gib_of(OWN)} of them CUDA's own"
    if not fits(training.total, there):
        changes = [*_of_activations(recipe), *_of_weights(recipe)]
        yield f"warning: training does not fit {name} ({has}): {'; '.join(changes)}"
    if not fits(measuring_bytes(training, evaluation), there):
        changes = ["lower evaluation.batch_size", "measure fewer kinds of metrics", *_of_weights(recipe)]
        yield f"warning: the evaluation does not fit {name} ({has}): {'; '.join(changes)}"


def _of_activations(recipe: Recipe) -> list[str]:
    kept = " (a step has as many samples with data.global_batch_size)" if recipe.data.global_batch_size else ""
    found = [] if recipe.trainer.activation_checkpointing else ["set trainer.activation_checkpointing=true"]
    return [f"lower data.batch_size{kept}", *found]


def _of_weights(recipe: Recipe) -> list[str]:
    trainer = recipe.trainer
    found = [] if trainer.precision == "bf16" else ["set trainer.precision=bf16"]
    if trainer.devices * trainer.num_nodes > 1 and trainer.strategy != "fsdp":
        found.append("set trainer.strategy=fsdp, which splits the weights over the devices")
    elif trainer.strategy == "fsdp" and trainer.shards < trainer.devices * trainer.num_nodes:
        found.append(f"set trainer.shard_size={trainer.devices * trainer.num_nodes}")
    return found


def _copies(recipe: Recipe) -> str:
    trainer = recipe.trainer
    copies = ["gathered blocks"] if trainer.strategy == "fsdp" else ["weights in bf16"] * (trainer.precision == "bf16")
    return " and ".join([*copies, *["a dequantised layer"] * (recipe.quantize.frozen is not None)])


def gib_of(count: float) -> str:
    """Return bytes in GiB, or in MiB where they are less than half a GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{math.ceil(count / 2**20)} MiB"

"""What `fit` would do: the plan, parameter counts, an estimate of memory, and what is missing on this machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from flowmap.build import check_teachers, missing_weights, on_this_machine, student_config
from flowmap.config import RecipeError
from flowmap.data import Dataset
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import Base
from flowmap.nets.pretrained import read_spec
from flowmap.plan import Encoding, Stage, data_of, find_card, plan, runs_root, teacher_cards
from flowmap.recipe import FromTeacher, PowerEMA, Recipe, read_recipe
from flowmap.student import StudentConfig


def dry_run(recipe: Recipe, out: str | None) -> list[str]:
    """The lines that `flowmap fit --dry-run` prints; the last says what is missing, or that nothing is."""
    stages = plan(recipe, Path(out) if out else runs_root() / recipe.name)
    lines, missing = [], []
    for i, stage in enumerate(stages):
        if isinstance(stage, Encoding):
            state = "complete" if stage.complete else "its pictures -> latents"
            lines.append(f"[{i + 1}/{len(stages)}] {stage.recipe.name}: {state} -> {stage.folder}")
            continue
        state = "complete" if stage.complete else f"{stage.recipe.trainer.steps} steps"
        lines.append(f"[{i + 1}/{len(stages)}] {stage.recipe.name}: {state} -> {stage.folder}")
        found, lacks = _look(stage)
        lines += [f"      {line}" for line in found]
        missing += [m for m in lacks if m not in missing]
    return [*lines, "missing on this machine: " + "; ".join(missing) if missing else "nothing is missing on this machine"]


def _look(stage: Stage) -> tuple[list[str], list[str]]:
    recipe = stage.recipe
    missing = [f"{key} (a value)" for key in recipe.missing()]
    cards = teacher_cards(recipe)
    missing += [line for card in cards if card.kind not in ("recipe", "exact") and (line := missing_weights(card))]
    if not missing:
        check_teachers(recipe)
    data = None
    if not any(key.startswith("data") for key in recipe.missing()):
        try:
            data = data_of(recipe).build()
        except ValueError as error:
            missing.append(str(error))
    config = _config(recipe, data)
    if config is None:
        known = [f"{card.name} {card.parameters / 1e6:.0f} M" for card in cards if card.parameters]
        return [f"parameters: {', '.join(known) or '?'} (the student's network is its teacher's)" if known else "parameters: ?"], missing
    return _sizes(recipe, config), missing


def _config(recipe: Recipe, data: Dataset | None) -> StudentConfig | None:
    """The student's configuration, its network taken from the teacher's recipe or pipeline without any weights; None where it is not known."""
    if data is None:
        return None
    if not isinstance(recipe.student, FromTeacher):
        return student_config(recipe, data, None)
    card = find_card(recipe.teacher.card)
    if card.kind == "diffusers" and on_this_machine(card):
        spec = read_spec(card.source, card.revision)
        config = student_config(replace(recipe, student=spec), data, None)
        return replace(config, lora=recipe.lora, base=Base(card.source, card.revision) if recipe.lora else None)
    if card.kind != "recipe":
        return None
    trained = read_recipe(card.recipe, recipe.teacher.overrides)
    return student_config(replace(recipe, student=trained.student), data, None)


def _sizes(recipe: Recipe, config: StudentConfig) -> list[str]:
    with torch.device("meta"):
        try:
            flow_map = config.build()
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: student: {error}") from error
    frozen = sum(p.numel() for p in flow_map.parameters() if not p.requires_grad)
    count = sum(p.numel() for p in flow_map.parameters()) - frozen
    averages = 1 + (len(recipe.ema.snapshot_stds) if isinstance(recipe.ema, PowerEMA) and recipe.ema.snapshot_every_steps else 0)
    state = 4 * (count * (4 + averages) + frozen)
    size = f"student: {counted(flow_map)}, samples of shape {tuple(config.shape)}"
    memory = f"memory for each device, estimated: {_gib(state)} weights, gradients, optimiser and averages"
    if isinstance(config.net, DiffusersModel):  # which does not run without memory
        return [size, f"{memory} + activations, which `flowmap doctor` measures"]
    activations = _activation_bytes(flow_map, config) * recipe.data.batch_size
    if recipe.trainer.activation_checkpointing:
        activations /= max(len(getattr(flow_map.net, "blocks", ())), 1)
    return [size, f"{memory} + {_gib(activations)} activations at batch {recipe.data.batch_size}"]


def counted(net: torch.nn.Module) -> str:
    """How many parameters a network has; the trained and the frozen ones apart where it has both."""
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if trained == total:
        return f"{total / 1e6:.2f} M parameters"
    return f"{total / 1e6:.2f} M parameters: {trained / 1e6:.2f} M trained, {(total - trained) / 1e6:.2f} M frozen"


def _activation_bytes(flow_map, config: StudentConfig) -> float:
    """Bytes that autograd keeps for one sample, counted on the meta device."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, t = torch.zeros(2, *config.shape), torch.zeros(2)
        cond = {"class": torch.zeros(2, dtype=torch.int64)} if config.num_classes else {}
        flow_map.mean_velocity(x, t, t, cond)
    return kept / 2


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{math.ceil(count / 2**20)} MiB"

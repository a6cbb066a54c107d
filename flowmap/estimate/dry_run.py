"""What `fit` would do: the plan, each stage's parameters, FLOPs, memory and hours, and what is missing here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from flowmap.base.schema import RecipeError, kind_of
from flowmap.build.discriminator import discriminator_on
from flowmap.build.fake_score import fake_config
from flowmap.build.student import student_config
from flowmap.data.outline import DataOutline
from flowmap.estimate.calls import Calls, calls_of
from flowmap.estimate.costs import Cost, cost_of, discriminator_cost, start_flops
from flowmap.estimate.outlines import check_outlines, known_outline
from flowmap.flow.prior import Learned
from flowmap.flow.types import Cond
from flowmap.nets.lora import Base
from flowmap.objectives import Adversarial, ScoreDistillation
from flowmap.plan.cards import pairs_cards, teacher_cards
from flowmap.plan.dependencies import pairs_spec, prior_recipes
from flowmap.plan.named_networks import missing_weights, net_of, spec_of
from flowmap.plan.pictures import check_pictures, describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, Stage, plan
from flowmap.plan.requirements import check_parts, missing_parts
from flowmap.plan.run_folders import matches, runs_root
from flowmap.plan.same_run import same_measurement
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.settings import PowerEMA
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of
from flowmap.teachers.autoencoder import first_line
from flowmap.teachers.card import Card

MISSING = "missing on this machine: "
THROUGHPUT = 200.0  # TFLOP/s of one device: about half of an H100's dense bf16 peak


def dry_run(recipe: Recipe, out: str | None, *, throughput: float = THROUGHPUT) -> list[str]:
    """Return the lines that `flowmap fit --dry-run` prints; the last states what is missing, or that nothing is."""
    if not throughput > 0:
        raise ValueError(f"--throughput: {throughput} must be above 0 (TFLOP/s of one device)")
    stages = plan(recipe, Path(out) if out else runs_root() / recipe.name)
    lines, missing = [], []
    for i, stage in enumerate(stages):
        state = _state(stage)
        lines.append(
            f"[{i + 1}/{len(stages)}] {stage.recipe.name}: {'complete' if stage.complete else state} -> {stage.folder}"
        )
        if isinstance(stage, Pairing) and not stage.complete:
            missing += _weights_missing(pairs_cards(stage.recipe))
        if isinstance(stage, Encoding):
            lines += [f"      {line}" for line in describe_pictures(stage)]
        if isinstance(stage, Stage):
            found, lacks = look(stage.recipe, throughput)
            lines += [f"      {line}" for line in found]
            missing += lacks
    if (stages[-1].folder / "recipe.yaml").is_file() and not matches(stages[-1].folder, recipe):
        lines.append(
            f"      {stages[-1].folder} holds a run of another recipe: fit wants another --out, or --overwrite"
        )
    elif stages[-1].complete and not same_measurement(stages[-1].folder, recipe):
        differs = "holds this run, measured by other settings"
        lines.append(f"      {stages[-1].folder} {differs}: fit wants --resume, which measures it again")
    missing = list(dict.fromkeys(missing))
    return [*lines, MISSING + "; ".join(missing) if missing else "nothing is missing on this machine"]


def check_stages(stages: list[Needed], *, again: bool = False) -> None:
    """Raise RecipeError, before anything is made, if a stage that is not complete could not run.

    It is all that a dry run reports, except what `fit` fetches. again: the last stage runs even if it is complete.
    """
    for stage in stages:
        if isinstance(stage, Stage) and not (stage.complete and not (again and stage is stages[-1])):
            # The message about a missing teacher is more precise than that of the dry run.
            check_parts(stage.recipe)
            blocking = [line for line in look(stage.recipe, whole=False)[1] if "fit fetches it" not in line]
            if blocking:
                raise RecipeError(f"{stage.recipe.name}: {blocking[0]}")
        elif isinstance(stage, Encoding):
            check_pictures(stage)


def look(recipe: Recipe, throughput: float = THROUGHPUT, *, whole: bool = True) -> tuple[list[str], list[str]]:
    """Return lines on the cost of the networks, and what is missing on this machine.

    The networks are built on the meta device and run once. whole: read the data even if that takes long. Raises
    RecipeError if parts of the recipe do not match each other or the data.
    """
    missing = [f"{key} (a value)" for key in recipe.missing()]
    cards = teacher_cards(recipe)
    missing += _weights_missing(cards)
    if not missing:
        check_parts(recipe)
    missing += [*missing_parts(recipe), *missing_devices(recipe)]
    data, lacks = known_outline(recipe, whole=whole)
    missing += lacks
    config = _config(recipe, data, cards)
    if config is None:
        return ["parameters: ? (nothing here says what the network is)"], missing
    check_outlines(recipe, config)
    try:
        return _lines(recipe, config, cards, throughput), missing
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, RecipeError):
            raise
        what = (
            str(error)
            if isinstance(error, ValueError)
            else f"samples of shape {config.shape} do not pass: {first_line(error)}"
        )
        raise RecipeError(
            f"{recipe.name}: {'' if what.startswith(('objective', 'data', 'teacher')) else 'student: '}{what}"
        ) from error


def missing_devices(recipe: Recipe) -> list[str]:
    """Return what the trainer needs that this machine does not have, a line each."""
    asked, devices = recipe.trainer.accelerator, recipe.trainer.devices
    gpus, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = {"cuda": gpus, "gpu": gpus or int(apple), "mps": int(apple), "auto": gpus or devices, "cpu": devices}[asked]
    if not there:
        return [f"trainer.accelerator: {asked!r}: this machine has none"]
    return [f"trainer.devices: {devices}: this machine has {there}"] if devices > there else []


def _state(stage: Stage | Encoding | Pairing) -> str:
    if isinstance(stage, Encoding):
        return f"its pictures -> {stage.makes}"
    if isinstance(stage, Pairing):
        return f"{pairs_spec(stage.recipe).num} pairs"
    return f"{stage.recipe.trainer.steps} steps"


def _weights_missing(cards: list[Card]) -> list[str]:
    return [line for card in cards if card.kind not in ("recipe", "exact") and (line := missing_weights(card))]


def _config(recipe: Recipe, data: DataOutline | None, cards: list[Card]) -> StudentConfig | None:
    """Return the student's configuration without weights or samples; None if nothing states its network."""
    spec = net_of(recipe)
    if spec is None or data is None:
        return None
    config = student_config(recipe.changed(student=spec), data, None)
    return replace(config, lora=recipe.lora, base=Base(cards[0].pipeline, cards[0].revision)) if recipe.lora else config


def _lines(recipe: Recipe, config: StudentConfig, cards: list[Card], throughput: float) -> list[str]:
    trainer = recipe.trainer
    student, teachers = (
        cost_of(config, checkpointing=trainer.activation_checkpointing),
        _teachers(recipe, config, cards),
    )
    lines = [f"student: {counted(student)}, samples of shape {tuple(config.shape)}"]
    if teachers:
        lines.append(
            "teacher: " + " + ".join(f"{cost.parameters / 1e6:.2f} M ({card.name})" for card, cost in teachers)
        )
    if config.prior is not None:
        lines.append(_prior(recipe, config))
    judge = _discriminator(recipe, config, cards) if isinstance(recipe.objective, Adversarial) else None
    if judge is not None:
        each = f"{_flops(judge.flops)} a step for one sample, penalties and their gradients among them"
        lines.append(f"discriminator: {counted(judge)}; {each}")
    fake, distillation = None, recipe.distillation
    if isinstance(distillation, ScoreDistillation):
        fake = cost_of(fake_config(recipe, config))
        steps = distillation.fake_steps
        lines.append(f"fake score: {counted(fake)}, {steps} steps of its own for each of the student's")
    lines.append(_memory(recipe, student, teachers, judge, fake))
    calls = calls_of(recipe, conditional=bool(config.num_classes or config.text))
    step = _step_flops(calls, student, [cost for _, cost in teachers]) + (judge.flops if judge is not None else 0)
    samples = recipe.data.batch_size * trainer.accumulate * trainer.devices * trainer.num_nodes
    hours = step * samples * trainer.steps / (throughput * 1e12) / 3600
    asked = [f"{calls.forward:.3g} forward", f"{calls.backward:.3g} backward"]
    asked += [f"{calls.strong + calls.weak:.3g} of the teacher's"] if teachers else []
    passes = f"passes {', '.join(asked)}; {_flops(student.flops)} a forward pass of one"
    lines.append(f"a step: {_flops(step * samples)} for {samples} samples: {passes}")
    if trainer.accelerator != "cpu" and hours >= 0.01:
        lines.append(f"{trainer.steps} steps: {hours:.3g} GPU-hours at {throughput:g} TFLOP/s a device")
    return lines


def _prior(recipe: Recipe, config: StudentConfig) -> str:
    assert isinstance(recipe.prior, Learned)
    trained = prior_recipes(recipe)[0]
    auxiliary = cost_of(replace(config, net=trained.student, prior=None, num_classes=None, guidance=None), graded=False)
    start = start_flops(recipe, config.shape)
    codes = f"codes by {kind_of(recipe.prior.z, TABLES)}; {_flops(start)} a start at sampling"
    return f"learned prior: {counted(auxiliary)} ({trained.name}), {codes}"


def _teachers(recipe: Recipe, config: StudentConfig, cards: list[Card]) -> list[tuple[Card, Cost]]:
    """Return each network that the guided velocity calls, with its cost."""
    found = []
    for card in cards:
        spec = spec_of(card, recipe) if card.kind != "exact" else None
        if spec is not None:
            num_classes = config.num_classes if card.kind == "recipe" else card.num_classes
            plain = replace(config, net=spec, arrival=False, guidance=None, lora=None, base=None)
            found.append((card, cost_of(replace(plain, num_classes=num_classes), graded=False)))
    return found


def _discriminator(recipe: Recipe, config: StudentConfig, cards: list[Card]) -> Cost | None:
    """Return the discriminator's cost without weights of its teacher; None if nothing states that network."""
    assert isinstance(recipe.objective, Adversarial)
    network: nn.Module | None = None
    example: Cond = {}
    if recipe.objective.discriminator.trunk == "teacher":
        spec = spec_of(cards[0], recipe) if cards[0].kind != "exact" else None
        if spec is None:
            return None
        plain = replace(config, net=spec, arrival=False, guidance=None, lora=None, base=None)
        with torch.device("meta"):
            network, example = plain.build().to("meta").net, conditions_of(plain, 1)
    net = discriminator_on(recipe, config, network, example).to("meta")
    return discriminator_cost(net, config, recipe.objective)


def _step_flops(calls: Calls, student: Cost, teachers: list[Cost]) -> float:
    """Return FLOPs of one sample: passes of the student and calls of the teacher.

    A weak model that is the teacher at another time costs what the teacher does.
    """
    strong = teachers[0].flops if teachers else 0
    weak = teachers[-1].flops if teachers else 0
    return (
        calls.forward * student.flops
        + calls.backward * student.backward_flops
        + calls.strong * strong
        + calls.weak * weak
    )


def _memory(
    recipe: Recipe, student: Cost, teachers: list[tuple[Card, Cost]], judge: Cost | None, fake: Cost | None
) -> str:
    trainer = recipe.trainer
    ema, objective, distillation = recipe.ema, recipe.objective, recipe.distillation
    averages = len({ema.std, *ema.snapshot_stds}) if isinstance(ema, PowerEMA) and ema.snapshot_every_steps else 1
    shares = trainer.devices * trainer.num_nodes if trainer.strategy == "fsdp" else 1
    state = 4 * (student.trained * (4 + averages) / shares + student.frozen)
    # A LoRA student shares its base with the teacher.
    shared = teachers[0][1].parameters if recipe.lora else 0
    frozen = 4 * (sum(cost.parameters for _, cost in teachers) - shared)
    kept = one = student.kept_bytes * recipe.data.batch_size + student.shared_bytes
    if fake is not None:
        assert isinstance(distillation, ScoreDistillation)
        state += 16 * fake.trained
        kept *= max(distillation.steps) if distillation.through == "all" else 1
    # The graphs of the samples and of the distillation loss exist at once; the discriminator's own loss comes later.
    if judge is not None:
        assert isinstance(objective, Adversarial)
        state += 16 * judge.trained
        graphs = max(objective.steps) if objective.through == "all" else 1
        kept = max(kept + graphs * one, judge.kept_bytes * recipe.data.batch_size + judge.shared_bytes)
    activations = kept * (0.5 if trainer.precision == "bf16" else 1)
    how = [trainer.precision] if trainer.precision != "32" else []
    if trainer.activation_checkpointing:
        how.append("checkpointed")
    parts = [f"{_gib(state)} weights, gradients, optimiser and averages"]
    parts += [f"{_gib(frozen)} teacher"] if frozen else []
    parts.append(
        " ".join(
            [
                f"{_gib(activations)} activations at batch {recipe.data.batch_size}",
                *([f"({', '.join(how)})"] if how else []),
            ]
        )
    )
    return "memory for each device, estimated: " + " + ".join(parts)


def counted(net: nn.Module | Cost) -> str:
    """Return the number of a network's parameters in words; trained and frozen ones apart if it has both."""
    if isinstance(net, Cost):
        total, trained = net.parameters, net.trained
    else:
        total = sum(p.numel() for p in net.parameters())
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if trained == total:
        return f"{total / 1e6:.2f} M parameters"
    return f"{total / 1e6:.2f} M parameters: {trained / 1e6:.2f} M trained, {(total - trained) / 1e6:.2f} M frozen"


def _flops(count: float) -> str:
    for size, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count / 1e6:.3g} MFLOP"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{math.ceil(count / 2**20)} MiB"

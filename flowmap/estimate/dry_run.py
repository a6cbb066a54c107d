"""What `fit` would do: the plan, each stage's parameters, FLOPs, memory and hours, and what is missing here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from flowmap.plan.dependencies import pairs_spec
from flowmap.plan.named_networks import missing_weights
from flowmap.plan.pictures import check_pictures, describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, ResolvedRun, Stage, resolve
from flowmap.plan.requirements import check_parts, missing_parts
from flowmap.plan.run_folders import matches
from flowmap.plan.same_run import same_measurement
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES, StudentSpec
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
    run = resolve(recipe, Path(out) if out else None)
    stages = run.stages
    lines, missing = [], []
    for i, stage in enumerate(stages):
        state = _state(stage)
        lines.append(
            f"[{i + 1}/{len(stages)}] {stage.recipe.name}: {'complete' if stage.complete else state} -> {stage.folder}"
        )
        if isinstance(stage, Pairing) and not stage.complete:
            missing += _weights_missing(resolve(stage.recipe).pairs_cards)
        if isinstance(stage, Encoding):
            lines += [f"      {line}" for line in describe_pictures(stage)]
        if isinstance(stage, Stage):
            found, lacks = look(stage, throughput)
            lines += [f"      {line}" for line in found]
            missing += lacks
    if (run.folder / "recipe.yaml").is_file() and not matches(run.folder, recipe):
        lines.append(f"      {run.folder} holds a run of another recipe: fit wants another --out, or --overwrite")
    elif run.complete and not same_measurement(run.folder, recipe):
        differs = "holds this run, measured by other settings"
        lines.append(f"      {run.folder} {differs}: fit wants --resume, which measures it again")
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
            blocking = [line for line in look(stage, whole=False)[1] if "fit fetches it" not in line]
            if blocking:
                raise RecipeError(f"{stage.recipe.name}: {blocking[0]}")
        elif isinstance(stage, Encoding):
            check_pictures(stage)


def look(run: ResolvedRun, throughput: float = THROUGHPUT, *, whole: bool = True) -> tuple[list[str], list[str]]:
    """Return lines on the cost of the networks, and what is missing on this machine.

    The networks are built on the meta device and run once. whole: read the data even if that takes long. Raises
    RecipeError if parts of the recipe do not match each other or the data.
    """
    recipe = run.recipe
    missing = [f"{key} (a value)" for key in recipe.missing()]
    missing += _weights_missing(run.cards)
    if not missing:
        check_parts(recipe)
    missing += [*missing_parts(recipe), *missing_devices(recipe)]
    data, lacks = known_outline(recipe, whole=whole)
    missing += lacks
    config = _config(run, data)
    if config is None:
        return ["parameters: ? (nothing here says what the network is)"], missing
    check_outlines(run, config)
    try:
        return _lines(run, config, throughput), missing
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


def _config(run: ResolvedRun, data: DataOutline | None) -> StudentConfig | None:
    """Return the student's configuration without weights or samples; None if nothing states its network."""
    recipe = run.recipe
    if run.net is None or data is None:
        return None
    config = student_config(recipe.changed(student=run.net), data, None)
    if recipe.lora is None:
        return config
    card = run.cards[0]
    return replace(config, lora=recipe.lora, base=Base(card.pipeline, card.revision))


@dataclass(frozen=True)
class _Costs:
    """The costs of the networks that take part in a training step."""

    student: Cost
    teachers: list[tuple[Card, Cost]]
    discriminator: Cost | None
    fake: Cost | None


def _costs(run: ResolvedRun, config: StudentConfig) -> _Costs:
    recipe = run.recipe
    return _Costs(
        cost_of(config, checkpointing=recipe.trainer.activation_checkpointing),
        _teachers(run, config),
        _discriminator(run, config) if isinstance(recipe.objective, Adversarial) else None,
        cost_of(fake_config(recipe, config)) if isinstance(recipe.distillation, ScoreDistillation) else None,
    )


def _lines(run: ResolvedRun, config: StudentConfig, throughput: float) -> list[str]:
    costs, distillation = _costs(run, config), run.recipe.distillation
    lines = [f"student: {counted(costs.student)}, samples of shape {tuple(config.shape)}"]
    if costs.teachers:
        nets = (f"{cost.parameters / 1e6:.2f} M ({card.name})" for card, cost in costs.teachers)
        lines.append("teacher: " + " + ".join(nets))
    if config.prior is not None:
        lines.append(_prior(run, config))
    if costs.discriminator is not None:
        each = f"{_flops(costs.discriminator.flops)} a step for one sample, penalties and their gradients among them"
        lines.append(f"discriminator: {counted(costs.discriminator)}; {each}")
    if costs.fake is not None:
        assert isinstance(distillation, ScoreDistillation)
        steps = distillation.fake_steps
        lines.append(f"fake score: {counted(costs.fake)}, {steps} steps of its own for each of the student's")
    split = [f"batch: {run.recipe.batches}"] if run.recipe.batches.split else []
    return [*lines, _memory(run.recipe, costs), *split, *_step(run.recipe, config, costs, throughput)]


def _step(recipe: Recipe, config: StudentConfig, costs: _Costs, throughput: float) -> list[str]:
    """Return a line on the FLOPs of a step and, for a run on accelerators, one on the hours of all steps."""
    trainer, judge = recipe.trainer, costs.discriminator
    calls = calls_of(recipe, conditional=bool(config.num_classes or config.text))
    each = _step_flops(calls, costs.student, [cost for _, cost in costs.teachers])
    each += judge.flops if judge is not None else 0
    samples = recipe.batches.samples
    hours = each * samples * trainer.steps / (throughput * 1e12) / 3600
    asked = [f"{calls.forward:.3g} forward", f"{calls.backward:.3g} backward"]
    asked += [f"{calls.strong + calls.weak:.3g} of the teacher's"] if costs.teachers else []
    passes = f"passes {', '.join(asked)}; {_flops(costs.student.flops)} a forward pass of one"
    lines = [f"a step: {_flops(each * samples)} for {samples} samples: {passes}"]
    if trainer.accelerator != "cpu" and hours >= 0.01:
        lines.append(f"{trainer.steps} steps: {hours:.3g} GPU-hours at {throughput:g} TFLOP/s a device")
    return lines


def _prior(run: ResolvedRun, config: StudentConfig) -> str:
    assert isinstance(run.recipe.prior, Learned)
    trained = run.priors[0]
    auxiliary = cost_of(replace(config, net=trained.student, prior=None, num_classes=None, guidance=None), graded=False)
    start = start_flops(run.recipe, config.shape)
    codes = f"codes by {kind_of(run.recipe.prior.z, TABLES)}; {_flops(start)} a start at sampling"
    return f"learned prior: {counted(auxiliary)} ({trained.name}), {codes}"


def _teachers(run: ResolvedRun, config: StudentConfig) -> list[tuple[Card, Cost]]:
    """Return each network that the guided velocity calls, with its cost."""
    found = []
    for card, spec in zip(run.cards, run.teacher_nets, strict=True):
        if spec is not None:
            num_classes = config.num_classes if card.kind == "recipe" else card.num_classes
            plain = replace(_of_teacher(config, spec), num_classes=num_classes)
            found.append((card, cost_of(plain, graded=False)))
    return found


def _of_teacher(config: StudentConfig, spec: StudentSpec) -> StudentConfig:
    """Return the configuration of a teacher with that network, for the student's samples."""
    return replace(config, net=spec, arrival=False, guidance=None, lora=None, base=None)


def _discriminator(run: ResolvedRun, config: StudentConfig) -> Cost | None:
    """Return the discriminator's cost without weights of its teacher; None if nothing states that network."""
    objective = run.recipe.objective
    assert isinstance(objective, Adversarial)
    network: nn.Module | None = None
    example: Cond = {}
    if objective.discriminator.trunk == "teacher":
        spec = run.teacher_nets[0]
        if spec is None:
            return None
        plain = _of_teacher(config, spec)
        with torch.device("meta"):
            network, example = plain.build().to("meta").net, conditions_of(plain, 1)
    net = discriminator_on(run.recipe, config, network, example).to("meta")
    return discriminator_cost(net, config, objective)


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


def _memory(recipe: Recipe, costs: _Costs) -> str:
    trainer = recipe.trainer
    state = _state_bytes(recipe, costs)
    # A LoRA student shares its base with the teacher.
    shared = costs.teachers[0][1].parameters if recipe.lora else 0
    frozen = 4 * (sum(cost.parameters for _, cost in costs.teachers) - shared)
    activations = _activation_bytes(recipe, costs) * (0.5 if trainer.precision == "bf16" else 1)
    how = [trainer.precision] if trainer.precision != "32" else []
    how += ["checkpointed"] if trainer.activation_checkpointing else []
    parts = [f"{_gib(state)} weights, gradients, optimiser and averages"]
    parts += [f"{_gib(frozen)} teacher"] if frozen else []
    kept = f"{_gib(activations)} activations at batch {recipe.data.batch_size}"
    parts.append(f"{kept} ({', '.join(how)})" if how else kept)
    return "memory for each device, estimated: " + " + ".join(parts)


def _state_bytes(recipe: Recipe, costs: _Costs) -> float:
    """Return the bytes of weights, gradients, moments and averages of all networks that are trained."""
    trainer, ema, student = recipe.trainer, recipe.ema, costs.student
    averages = len({ema.std, *ema.snapshot_stds}) if isinstance(ema, PowerEMA) and ema.snapshot_every_steps else 1
    shares = trainer.devices * trainer.num_nodes if trainer.strategy == "fsdp" else 1
    others = sum(cost.trained for cost in (costs.discriminator, costs.fake) if cost is not None)
    return 4 * (student.trained * (4 + averages) / shares + student.frozen) + 16 * others


def _activation_bytes(recipe: Recipe, costs: _Costs) -> float:
    """Return the bytes that a step keeps for its backward passes, in float32."""
    batch, objective, distillation = recipe.data.batch_size, recipe.objective, recipe.distillation
    student = costs.student
    kept = one = student.kept_bytes * batch + student.shared_bytes
    if isinstance(distillation, ScoreDistillation):
        kept *= max(distillation.steps) if distillation.through == "all" else 1
    judge = costs.discriminator
    if judge is None:
        return kept
    assert isinstance(objective, Adversarial)
    # The graphs of the samples and of the distillation loss exist at once; the discriminator's own loss comes later.
    graphs = max(objective.steps) if objective.through == "all" else 1
    return max(kept + graphs * one, judge.kept_bytes * batch + judge.shared_bytes)


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

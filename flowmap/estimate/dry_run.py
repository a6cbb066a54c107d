"""What `fit` would do: the plan, each stage's parameters, FLOPs, memory and hours, and what is missing here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from flowmap.base.schema import RecipeError, kind_of
from flowmap.build.fake_score import fake_config
from flowmap.build.module import check_module
from flowmap.estimate.calls import Calls, calls_of, drawn_by, late_share, sampling_calls
from flowmap.estimate.costs import Cost, cost_of, discriminator_cost, start_flops
from flowmap.estimate.evaluation import evaluation_bytes
from flowmap.estimate.fits import memory_lines
from flowmap.estimate.frozen_networks import live_text_bytes
from flowmap.estimate.memory import Memory, memory_of
from flowmap.estimate.networks import Networks, config_without_weights, outline_of_network, teacher_configs
from flowmap.estimate.outlines import Outlines, check_outlines
from flowmap.estimate.price import Prices, preparation_lines, price_lines
from flowmap.estimate.smaller import Peaks, smaller_lines
from flowmap.flow.prior import Learned
from flowmap.objectives import Adversarial
from flowmap.objectives.adversarial import start_warnings
from flowmap.plan.named_networks import missing_weights
from flowmap.plan.pictures import check_pictures, describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, ResolvedRun, Stage, resolve
from flowmap.plan.references import ReferenceStatistics
from flowmap.plan.requirements import check_parts, missing_parts
from flowmap.plan.run_folders import matches
from flowmap.plan.same_run import same_measurement
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.settings import Autoguidance
from flowmap.student.config import StudentConfig
from flowmap.teachers.autoencoder import first_line
from flowmap.teachers.card import Card

MISSING = "missing on this machine: "
WORTH_PRICING = 0.01  # GPU-hours; shorter runs are not priced
MOST = 10_000.0  # GB of a GPU
THROUGHPUT = 200.0  # TFLOP/s of one device: about half of an H100's dense bf16 peak


def dry_run(
    recipe: Recipe, out: str | None, *, throughput: float = THROUGHPUT, memory: float | None = None
) -> list[str]:
    """Return the lines that `flowmap fit --dry-run` prints; the last states what is missing, or that nothing is.

    memory: of the GPU that the recipe's run is to fit, in GB; None for this machine's, or an H100's.
    """
    if not throughput > 0:
        raise ValueError(f"--throughput: {throughput} must be above 0 (TFLOP/s of one device)")
    if memory is not None and not 0 < memory < MOST:
        raise ValueError(f"--memory: {memory:g} must be above 0 and below {MOST:g} (GB of one GPU)")
    run, prices = resolve(recipe, Path(out) if out else None), Prices(throughput)
    stages, outlines = run.stages, Outlines()
    lines, missing = [], []
    for i, stage in enumerate(stages):
        state = _state(stage)
        lines.append(
            f"[{i + 1}/{len(stages)}] {stage.recipe.name}: {'complete' if stage.complete else state} -> {stage.folder}"
        )
        if isinstance(stage, Pairing) and not stage.complete:
            missing += _weights_missing(stage.run.pairs_cards)
        if isinstance(stage, Encoding):
            lines += [f"      {line}" for line in describe_pictures(stage)]
        if isinstance(stage, Stage):
            found, lacks = look(stage, outlines, prices, memory=memory if stage is stages[-1] else None)
            lines += [f"      {line}" for line in found]
            missing += lacks
    if (run.folder / "recipe.yaml").is_file() and not matches(run.folder, recipe):
        lines.append(f"      {run.folder} holds a run of another recipe: fit wants another --out, or --overwrite")
    elif run.complete and not same_measurement(run.folder, recipe):
        differs = "holds this run, measured by other settings"
        lines.append(f"      {run.folder} {differs}: fit wants --resume, which measures it again")
    missing = list(dict.fromkeys(missing))
    if any("GPU-hours" in line for line in lines):
        lines.append(prices.assumptions)
    return [*lines, MISSING + "; ".join(missing) if missing else "nothing is missing on this machine"]


def check_stages(stages: list[Needed], *, again: bool = False) -> None:
    """Raise RecipeError, before anything is made, if a stage that is not complete could not run.

    It is all that a dry run reports, except what `fit` fetches. again: the last stage runs even if it is complete.
    """
    outlines = Outlines()
    for stage in stages:
        if isinstance(stage, Stage) and not (stage.complete and not (again and stage is stages[-1])):
            # The message about a missing teacher is more precise than that of the dry run.
            check_parts(stage)
            blocking = [line for line in look(stage, outlines, whole=False)[1] if "fit fetches it" not in line]
            if blocking:
                raise RecipeError(f"{stage.recipe.name}: {blocking[0]}")
        elif isinstance(stage, Encoding):
            check_pictures(stage)


def look(
    run: ResolvedRun,
    outlines: Outlines,
    prices: Prices | None = None,
    *,
    whole: bool = True,
    memory: float | None = None,
) -> tuple[list[str], list[str]]:
    """Return lines on the cost of the networks, and what is missing on this machine.

    The networks are built on the meta device and run once. prices: also return the hours of a run on accelerators.
    whole: read the data even if that takes long. memory: as for dry_run. Raises RecipeError if parts of the recipe do
    not match each other or the data.
    """
    recipe = run.recipe
    missing = [f"{key} (a value)" for key in recipe.missing()]
    missing += _weights_missing(run.cards)
    if not missing:
        check_parts(run)
        check_module(run)
    missing += [*missing_parts(run), *missing_devices(recipe)]
    data, lacks = outlines.of(run, whole=whole)
    missing += lacks
    config = config_without_weights(run, data)
    if config is None:
        return ["parameters: ? (nothing here says what the network is)"], missing
    check_outlines(run, config, outlines)
    try:
        return _lines(run, config, prices, memory), missing
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, RecipeError):
            raise
        what = (
            str(error)
            if isinstance(error, ValueError)
            else "no weight takes part in its output, so that there is nothing to train"
            if "does not require grad" in str(error)
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


def _state(stage: Needed) -> str:
    if isinstance(stage, (Encoding, ReferenceStatistics)):
        return f"its pictures -> {stage.makes}"
    if isinstance(stage, Pairing):
        return stage.makes
    return f"{stage.recipe.trainer.steps} steps"


def _weights_missing(cards: list[Card]) -> list[str]:
    return [line for card in cards if card.kind not in ("recipe", "exact") and (line := missing_weights(card))]


@dataclass(frozen=True)
class NetworkCosts:
    """The costs of the networks that take part in a training step."""

    student: Cost
    teachers: list[tuple[Card, Cost]]
    discriminator: Cost | None
    fake: Cost | None


def networks_costs(run: ResolvedRun, config: StudentConfig) -> NetworkCosts:
    objective, networks = run.recipe.objective, Networks.of(run, config)
    judge, fake = networks.discriminator, networks.fake
    return NetworkCosts(
        cost_of(config, checkpointing=run.recipe.trainer.activation_checkpointing, built=networks.student),
        [(card, cost_of(one, graded=False)) for card, one in teacher_configs(run, config)],
        discriminator_cost(judge, config, objective)
        if judge is not None and isinstance(objective, Adversarial)
        else None,
        cost_of(fake_config(run, config), built=fake) if fake is not None else None,
    )


def _lines(run: ResolvedRun, config: StudentConfig, prices: Prices | None, memory: float | None) -> list[str]:
    costs = networks_costs(run, config)
    lines = [f"student: {counted(costs.student)}, samples of shape {tuple(config.shape)}"]
    if costs.teachers:
        nets = (f"{cost.parameters / 1e6:.2f} M ({card.name})" for card, cost in costs.teachers)
        lora = "" if run.recipe.teacher is None else run.recipe.teacher.with_lora
        lines.append("teacher: " + " + ".join(nets) + lora)
    if config.prior is not None:
        lines.append(_prior(run, config))
    if costs.discriminator is not None:
        each = f"{_flops(costs.discriminator.flops)} a step for one sample, penalties and their gradients among them"
        begins = getattr(run.recipe.objective, "discriminator_start", 0)
        each += f"; from step {begins:,} of {run.recipe.trainer.steps:,} on" if begins else ""
        lines.append(f"discriminator: {counted(costs.discriminator)}; {each}")
        lines += [f"warning: {line}" for line in start_warnings(run.recipe.objective, run.recipe.trainer.steps)]
    if costs.fake is not None:
        steps = run.recipe.objective.matching.term.fake_steps
        lines.append(f"fake score: {counted(costs.fake)}, {steps} steps of its own for each of the student's")
    split = [f"batch: {run.recipe.batches}"] if run.recipe.batches.split else []
    peaks = partial(_peaks, config, run.recipe, costs)
    now = peaks(run)
    lines += [*memory_lines(run.recipe, *now, memory), *split, *_step(run, config, costs, prices)]
    return [*lines, *smaller_lines(run, now, peaks, memory)]


def _step(run: ResolvedRun, config: StudentConfig, costs: NetworkCosts, prices: Prices | None) -> list[str]:
    """Return a line on the FLOPs of a step and, for a run on accelerators, lines on hours and disk."""
    recipe, judge = run.recipe, costs.discriminator
    calls = calls_of(recipe, conditional=bool(config.num_classes or config.text))
    each = _step_flops(calls, costs.student, [cost for _, cost in costs.teachers])
    each += late_share(recipe) * judge.flops if judge is not None else 0
    samples = recipe.batches.samples
    asked = [f"{calls.forward:.3g} forward", f"{calls.backward:.3g} backward"]
    asked += [f"{calls.strong + calls.weak:.3g} of the teacher's"] if costs.teachers else []
    passes = f"passes {', '.join(asked)}; {_flops(costs.student.flops)} a forward pass of one"
    lines = [f"a step: {_flops(each * samples)} for {samples} samples: {passes}"]
    if prices is not None and recipe.trainer.accelerator != "cpu" and recipe.artifact == "student":
        hours = each * samples * recipe.trainer.steps / (prices.throughput * 1e12) / 3600
        if hours >= WORTH_PRICING:
            lines += prices.new(preparation_lines(run, config, prices))
            lines += price_lines(run, config, costs.student.trained, prices, omitted_flops(recipe, costs))
    return lines


def omitted_flops(recipe: Recipe, costs: NetworkCosts) -> float:
    """Return the FLOPs of a sample in a step that `step_of` omits: samples that are drawn, and a discriminator's."""
    drawn, kept = sampling_calls(recipe)
    judge = late_share(recipe) * costs.discriminator.flops if costs.discriminator is not None else 0
    return drawn * costs.student.flops + kept * costs.student.backward_flops + judge


def _prior(run: ResolvedRun, config: StudentConfig) -> str:
    assert isinstance(run.recipe.prior, Learned)
    trained = run.priors[0].recipe
    auxiliary = cost_of(replace(config, net=trained.student, prior=None, num_classes=None, guidance=None), graded=False)
    start = start_flops(run, config.shape)
    codes = f"codes by {kind_of(run.recipe.prior.z, TABLES)}; {_flops(start)} a start at sampling"
    return f"learned prior: {counted(auxiliary)} ({trained.name}), {codes}"


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


def networks_memory(run: ResolvedRun, config: StudentConfig, costs: NetworkCosts) -> Memory:
    """Return the memory of one device while the run trains."""
    recipe = run.recipe
    configs = [one for _, one in teacher_configs(run, config)]
    student, *teachers = (outline_of_network(one) for one in (config, *configs))
    guidance = recipe.teacher.guidance if recipe.teacher is not None else None
    if isinstance(guidance, Autoguidance) and guidance.snapshot is not None:  # the weak model is a copy
        teachers.append(outline_of_network(configs[0]))
    kept = _activation_bytes(recipe, costs) * (0.5 if recipe.trainer.precision == "bf16" else 1)
    others = sum(cost.trained for cost in (costs.discriminator, costs.fake) if cost is not None)
    for net in teachers:
        net.requires_grad_(False)
    found = memory_of(recipe, student, teachers, activations=kept, others=others)
    return replace(found, text=live_text_bytes(recipe, config))


def _peaks(config: StudentConfig, counted: Recipe, costs: NetworkCosts, run: ResolvedRun) -> Peaks:
    """Return the memory of a device while the run trains, and while it measures samples of a student if it does.

    costs: of the networks as the recipe `counted` runs them.
    """
    if run.recipe.trainer.activation_checkpointing != counted.trainer.activation_checkpointing:
        costs = networks_costs(run, config)
    evaluation = evaluation_bytes(run, config) if run.recipe.artifact == "student" else None
    return networks_memory(run, config, costs), evaluation


def _activation_bytes(recipe: Recipe, costs: NetworkCosts) -> float:
    """Return the bytes that a step keeps for its backward passes, in float32."""
    batch, objective, matching = recipe.data.batch_size, recipe.objective, recipe.objective.matching
    student = costs.student
    kept = one = student.kept_bytes * batch + student.shared_bytes
    if matching is not None:  # beside the base's graph, if there is a base
        kept *= matching.graphs + (matching.base is not None)
    if (drawing := drawn_by(objective)) is not None:  # the graphs of samples and of the distillation loss exist at once
        kept += drawing.graphs * one
    judge = costs.discriminator  # whose own loss comes later
    return kept if judge is None else max(kept, judge.kept_bytes * batch + judge.shared_bytes)


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

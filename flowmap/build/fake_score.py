"""Build the fake score of a score distillation: the network that learns the velocity of the student's samples."""

from __future__ import annotations

from dataclasses import replace

from flowmap.build.student import build_student
from flowmap.build.teacher import BuiltTeacher
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.stacked import net_within
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.settings import FromRecipe, FromTeacher
from flowmap.student.config import StudentConfig


def fake_config(run: ResolvedRun, config: StudentConfig, teacher: BuiltTeacher | None = None) -> StudentConfig:
    """Return the configuration of the fake: the student's network (one of a stack), with the student's conditions.

    It takes an arrival time if the term names jumps by it, or if the teacher's network has one.
    """
    by_jump = run.recipe.objective.matching.term.by_jump
    network = None if teacher is None else teacher.network
    arrival = by_jump or (network is not None and network.config.arrival and _starts_as_teacher(run, teacher))
    return replace(config, net=net_within(config.net), arrival=arrival)


def build_fake(
    run: ResolvedRun, config: StudentConfig, teacher: BuiltTeacher | None, *, start: FlowMapNet | None = None
) -> FlowMapNet | None:
    """Return the fake at step 0; None if the objective has none.

    Its weights are the teacher's if the student starts from the teacher or from another recipe, else drawn with the
    recipe's seed. start: as for build_student. Raises RecipeError if the student's network is not the teacher's.
    """
    matching = run.recipe.objective.matching
    if matching is None or not matching.term.fake_steps:
        return None
    as_teacher = _starts_as_teacher(run, teacher) and run.recipe.lora is None
    of = run.changed(student=FromTeacher()) if as_teacher else _without_lora_start(run)
    return build_student(of, fake_config(run, config, teacher), teacher, start=start)


def _without_lora_start(run: ResolvedRun) -> ResolvedRun:
    """Return the run whose adapters start at zero: the fake's velocity is the teacher's at first."""
    begin = run.recipe.start
    if not isinstance(begin, FromTeacher) or begin.lora_start is None:
        return run
    return run.changed(student=replace(begin, lora_start=None))


def _starts_as_teacher(run: ResolvedRun, teacher: BuiltTeacher | None) -> bool:
    return (
        teacher is not None and teacher.network is not None and isinstance(run.recipe.start, (FromTeacher, FromRecipe))
    )

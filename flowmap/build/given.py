"""From modules and data that Python gives to settings of a recipe: `fit(recipe, teacher=, student=, data=)`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flowmap.base.schema import RecipeError
from flowmap.data import Given
from flowmap.data.given import as_data
from flowmap.nets.lora import fingerprint
from flowmap.nets.module import Module, takes_arrival
from flowmap.nets.module_builders import give, name_of
from flowmap.nets.module_clock import MODULE_CLOCKS, ModuleClock
from flowmap.recipe import Recipe
from flowmap.recipe.module_teacher import ModuleTeacher


@dataclass(frozen=True)
class Wrapped:
    """A module of one's own, with its settings."""

    settings: Module


class _Function(nn.Module):
    """A function (x, t) or (x, t, label) as a module without weights."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def wrap(
    module: Callable[..., Any],
    *,
    prediction: str = "velocity",
    clock: str | ModuleClock = "flow",
    range: tuple[float, float] = (-1.0, 1.0),
    classes: int | None = None,
    null_class: int | None = None,
    time_embedding: str | None = None,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Wrapped:
    """A teacher or student from a module (or, as a teacher, any function) net(x, t, label), without label if
    classes is None.

    prediction: velocity (dx/dt of its clock), x0, epsilon, v, or edm. clock: "flow" (t = 0 data, 1 noise), "reversed"
    (0 noise, 1 data), "ddpm" (places 0 .. 999 of a table) or "sigma", or one of nets/module_clock.py with its
    settings. range: what the module has for our -1 and 1. classes, null_class: how many labels it knows, and the one
    for no class. time_embedding: the submodule or method whose output is the time embedding; a student needs it. name,
    arguments: how load_student builds the module later (by default as the module's own class, without arguments).
    settings: the others of nets/module.py. Raises ValueError that names what is wrong.
    """
    if isinstance(clock, str):
        if clock not in MODULE_CLOCKS:
            raise ValueError(f"clock: {clock!r} is not one of {', '.join(MODULE_CLOCKS)}")
        found_clock: ModuleClock = MODULE_CLOCKS[clock]()
    else:
        found_clock = clock
    _check_source(module)
    made = module if isinstance(module, nn.Module) else _Function(module)
    digest = fingerprint(made) if made.state_dict() else None
    name = name_of(module) if name is None else name
    found = Module(
        module=name,
        arguments=json.dumps(dict(arguments or {}), sort_keys=True),
        prediction=prediction,
        clock=found_clock,
        range=(float(range[0]), float(range[1])),
        classes=classes,
        null_class=null_class,
        time_embedding=time_embedding,
        digest=digest,
        **settings,
    )
    give(name, made.eval(), digest)
    return Wrapped(found)


def _check_source(module: Any) -> None:
    """Raise ValueError for a module without the Python source that costs and derivatives go through."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("module: is a torch.jit.ScriptModule; give the torch.nn.Module that it was made of")
    if type(module).__name__ == "OptimizedModule":  # of torch.compile
        raise ValueError("module: is compiled; give it before torch.compile, and set trainer.compile=true")


def with_given(recipe: Recipe, teacher: Any = None, student: Any = None, data: Any = None) -> Recipe:
    """The recipe with what Python gives in place of its own teacher, student and data.

    teacher: what `wrap` returns. student: the same, or a module net(x, t, s) that gives a mean velocity on our clock.
    data: what `flowmap.as_data` returns or takes. Raises RecipeError for anything else.
    """
    changes: dict[str, Any] = {}
    try:
        if data is not None:
            changes["data"] = _data(recipe, data, teacher)
        if teacher is not None:
            changes["teacher"] = _teacher(recipe, teacher, changes.get("data", recipe.data))
        if student is not None:
            changes["student"] = _student(student)
        return recipe.changed(**changes) if changes else recipe
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error


def _data(recipe: Recipe, data: Any, teacher: Any) -> Given:
    found = data if isinstance(data, Given) else as_data(data)
    ours = recipe.data
    known = teacher.settings.classes if isinstance(teacher, Wrapped) else None
    classes = found.num_classes
    if classes is not None and known is not None and classes <= known:
        classes = known  # a class that no sample has is one all the same
    return replace(
        found,
        batch_size=ours.batch_size,
        global_batch_size=ours.global_batch_size,
        shuffle=ours.shuffle,
        drop_condition=ours.drop_condition if found.conditional else 0.0,
        conditional=found.conditional and (known is not None or not isinstance(teacher, Wrapped)),
        num_classes=classes,
    )


def _teacher(recipe: Recipe, teacher: Any, data: Any) -> ModuleTeacher:
    if not isinstance(teacher, Wrapped):
        what = "does not say what it predicts; give flowmap.wrap(module, prediction=, clock=, range=)"
        raise ValueError(f"teacher: a {type(teacher).__name__} {what}")
    spec, outline = teacher.settings, data.outline()
    if outline is None:
        raise ValueError("data.shape: is not stated; give data= too, or the shape of the teacher's samples")
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    return ModuleTeacher(**spec.settings(), digest=spec.digest, shape=tuple(outline[0]), guidance=guidance)


def _student(student: Any) -> Module:
    _check_source(student)
    if isinstance(student, nn.Module) and takes_arrival(student):
        student = wrap(student)
    if not isinstance(student, Wrapped):
        what = "takes no arrival time s; give flowmap.wrap(module, prediction=, clock=, time_embedding=)"
        raise ValueError(f"student: a {type(student).__name__} {what}")
    return student.settings

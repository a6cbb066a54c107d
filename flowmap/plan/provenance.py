"""The provenance of pairs: teacher and weights, guidance, solver and data, as values that compare equal anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowmap.base.files import weights_hash
from flowmap.base.hub import is_repository
from flowmap.base.schema import RecipeError, to_plain
from flowmap.data import Encoded, Folder, Pairs, TeacherSlot
from flowmap.data.pairs import CLOCK, FORMAT
from flowmap.data.sources import READER
from flowmap.flow.prior import FlowCodes, Learned
from flowmap.nets.lora_file import lora_path
from flowmap.plan.data_folders import WHERE
from flowmap.plan.dependencies import pairs_spec, trained_by
from flowmap.plan.named_networks import weights_of
from flowmap.plan.resolved import Resolved
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.settings import Autoguidance
from flowmap.teachers.card import Card


def scale_of(run: Resolved) -> float | None:
    """Return the guidance scale that the recipe's pairs are made with, or None if their teacher has no guidance."""
    recipe, spec = run.recipe, pairs_spec(run.recipe)
    teacher = spec.teacher if spec.recipe is None else run.pairs_teachers[0].recipe.teacher
    guidance = None if teacher is None else teacher.guidance
    if guidance is None and spec.recipe is not None and spec.guidance is not None:
        raise RecipeError(
            f"{recipe.name}: coupling.guidance: {spec.guidance} was given, but {spec.recipe!r} takes no guidance"
        )
    if guidance is None:
        return None
    return guidance.default if spec.guidance is None else spec.guidance


def baked_scale(run: Resolved) -> float | None:
    """Return the guidance scale that the recipe's pairs contain, or None.

    It is the scale of their teacher or, if that has no guidance, of the pairs that the teacher was trained on.
    """
    if not isinstance(run.recipe.coupling, Pairs):
        return None
    scale = scale_of(run)
    made_by = run.pairs_teachers if scale is None else []
    return baked_scale(made_by[0]) if made_by else scale


def pairs_identity(run: Resolved) -> dict[str, Any]:
    """Return everything that the recipe's pairs depend on, as JSON would read it back.

    Weights are None where they are not on this machine.
    """
    spec, prior = pairs_spec(run.recipe), run.recipe.prior
    made_by = _of_teacher(run, spec.teacher) if spec.teacher is not None else _of_run(run.pairs_teachers[0])
    found = {
        "format": FORMAT,
        "clock": CLOCK,
        "teacher": made_by,
        "guidance": scale_of(run),
        "solver": to_plain(spec.solver, TABLES, hashed=True),
        "num": spec.num,
        "inverted": spec.inverted,
        "seed": spec.seed,
        "dtype": spec.dtype,
        "data": _of_data(run),
    }
    if isinstance(prior, Learned):
        found["prior"] = _of_prior(run, prior)
    return json.loads(json.dumps(found))


def _of_prior(run: Resolved, prior: Learned) -> dict[str, Any]:
    """Return what decides where pairs start; whether a network reads the code is not part of it."""
    auxiliary, *flow = run.priors
    found = {**_of_run(auxiliary), "scale": prior.scale}
    if isinstance(prior.z, FlowCodes):
        return {**found, "z": None, "flow": _of_run(flow[0]), "steps": prior.z.steps}
    return {**found, "z": to_plain(prior.z, TABLES, hashed=True)}


def _of_run(trained: Resolved) -> dict[str, Any]:
    recipe = trained.recipe
    return {"recipe": recipe.name, "hash": recipe.hash(), "weights": weights_hash(_weights(trained))}


def _weights(trained: Resolved) -> Path:
    return trained.folder / "student" / "model.safetensors"


def _of_teacher(run: Resolved, teacher: TeacherSlot) -> dict[str, Any]:
    guidance = teacher.guidance
    found = _of_card(run, teacher, run.pairs_cards[0])
    if teacher.lora is not None:
        found["lora"] = {**_of_lora(run, teacher.lora), "scale": teacher.lora_scale}
    if guidance is not None:
        plain = to_plain(guidance, TABLES, hashed=True)
        found["guidance"] = {
            key: value for key, value in plain.items() if key not in ("scale", "default", "interval_input")
        }
    if isinstance(guidance, Autoguidance) and guidance.weak is not None:
        found["weak"] = _of_card(run, teacher, run.pairs_cards[1])
    return found


def _of_lora(run: Resolved, source: str) -> dict[str, Any]:
    """Return what identifies a LoRA: the weights of a file, the name of one on a hub."""
    if not Path(source).exists() and is_repository(source):
        return {"source": source}
    try:
        return {"weights": weights_hash(lora_path(source, "coupling.teacher.lora"))}
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error


def _of_card(run: Resolved, teacher: TeacherSlot, card: Card) -> dict[str, Any]:
    # A source that is a folder or a file of this machine is identified by its weights, not by its path.
    is_here = card.source is not None and Path(card.source).exists()
    source = None if is_here else card.source
    found: dict[str, Any] = {"card": card.name, "kind": card.kind, "source": source, "revision": card.revision}
    trained = trained_by(run.recipe, teacher, card)
    found |= {"recipe": None if trained is None else trained.name, "hash": None if trained is None else trained.hash()}
    found |= {"network": card.network} if card.kind == "module" else {}
    folder = weights_of(card) if trained is None else _weights(run.of(trained))
    return {key: value for key, value in found.items() if value is not None} | {"weights": weights_hash(folder)}


def _of_data(run: Resolved) -> dict[str, Any]:
    data = run.data
    if isinstance(data, Encoded):
        return {"kind": "encoded", "conditional": data.conditional, **data.identity(), **data.chosen()}
    found = {key: value for key, value in to_plain(run.recipe.data, TABLES, hashed=True).items() if key not in WHERE}
    return found | ({"reader": READER} if isinstance(data, Folder) else {})

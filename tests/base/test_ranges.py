"""Every number among the settings has a range, is held to it wherever it is made, and says what is allowed."""

import dataclasses
import math
import typing

import pytest

from flowmap.base.ranges import Range, ranges_in
from flowmap.base.schema import RecipeError
from flowmap.data import Pairs, TeacherSlot
from flowmap.metrics import METRICS
from flowmap.metrics.rewards import Ink
from flowmap.nets.discriminator import Conv
from flowmap.nets.mlp import MLP
from flowmap.objectives import FlowMatching
from flowmap.objectives.reverse_kl import ReverseKL
from flowmap.recipe import Recipe, read_recipe
from flowmap.recipe.kinds import TABLES

NEEDED = {  # what has no default, for the kinds that cannot be made of defaults alone
    "Adversarial": {"base": FlowMatching(), "discriminator": Conv()},
    "Autoencoder": {"source": "there"},
    "Autoguidance": {"weak": "digits"},
    "Codes": {"recipe": "there"},
    "DiffusersModel": {
        "network": "DiTTransformer2DModel", "settings": "{}", "scheduler": "DDIMScheduler", "scheduler_settings": "{}",
    },
    "Encoded": {"images": None},
    "FlowCodes": {"recipe": "there"},
    "Joint": {"base": FlowMatching(), "term": ReverseKL()},
    "Learned": {"recipe": "there"},
    "Pair": {"encoder": "there", "decoder": "there"},
    "Pairs": {"teacher": TeacherSlot("digits")},
    "PipelineText": {"source": "there"},
    "Pretrained": {"source": "there"},
    "RewardTuning": {"base": FlowMatching(), "reward": Ink()},
    "rewards.Classifier": {"weights": "there"},
    "Tilted": {"reward": Ink()},
    "TeacherSlot": {"card": "digits"},
    "text_joint.TextJoint": {"flow": MLP()},
    "WebDatasetImages": {"shards": ("there",)},
}  # fmt: skip


def numbers_in(hint) -> int:
    """How many numbers a type hint names."""
    if hint in (int, float):
        return 1
    parts = (hint.__origin__,) if typing.get_origin(hint) is typing.Annotated else typing.get_args(hint)
    return sum(map(numbers_in, parts))


def all_settings() -> dict[str, type]:
    """Every dataclass that a recipe is made of, by name."""
    found: dict[str, type] = {}

    def walk(cls):
        if f"{cls.__module__}.{cls.__name__}" in found:
            return
        found[f"{cls.__module__}.{cls.__name__}"] = cls
        for hint in typing.get_type_hints(cls).values():
            for part in (hint, *typing.get_args(hint)):
                if isinstance(part, type) and dataclasses.is_dataclass(part):
                    walk(part)

    for cls in (
        Recipe,
        *(kind for table in TABLES.values() for kind in table.values() if kind not in METRICS.values()),
    ):
        walk(cls)
    return found


SETTINGS = all_settings()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_has_a_range(name):
    cls = SETTINGS[name]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        assert numbers_in(hints[field.name]) == len(ranges_in(hints[field.name])), field.name


@pytest.mark.parametrize("name", SETTINGS)
def test_no_number_leaves_its_range(name):
    """Values outside the range at either end, infinite ones and NaN are refused by the field's own name.

    This is so wherever the settings are made.
    """
    cls = SETTINGS[name]
    ranged = {field: hint for field, hint in typing.get_type_hints(cls, include_extras=True).items() if ranges_in(hint)}
    needed = next((given for key, given in NEEDED.items() if name.endswith(f".{key}")), {})
    settings = read_recipe("digits") if cls is Recipe else cls(**needed) if ranged else None
    for field, hint in ranged.items():
        for allowed in ranges_in(hint)[:1]:
            below = allowed.least if allowed.above else allowed.least - 1
            for value in (below, allowed.most * 2 + 1, math.inf, math.nan, 1e40):
                given = getattr(settings, field)
                many = isinstance(given, tuple) or (given is None and "tuple" in str(hint))
                value = (value,) * (len(given) if given else 1) if many else value
                with pytest.raises(ValueError, match=rf"^{field}\b.* must (be|lie) "):
                    dataclasses.replace(settings, **{field: value})


def test_a_range_says_which_of_its_ends_belong_to_it():
    closed, opened = Range(0, 1), Range(0, 1, above=True, below=True)
    assert [x in closed for x in (0, 0.5, 1)] == [True] * 3 and [x in opened for x in (0, 0.5, 1)] == [
        False,
        True,
        False,
    ]
    assert not any(math.nan in one for one in (closed, opened))
    assert (str(closed), str(opened)) == ("must lie in [0, 1]", "must lie in (0, 1)")
    assert str(Range(1, 1000)) == "must be 1 or more, at most 1000"
    assert str(Range(0, 1e6, above=True)) == "must be above 0, at most 1e+06"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.warmup_steps=-4", "optimizer.warmup_steps: -4 must be 0 or more"),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm: -1.0 must be 0 or more"),
        ("optimizer.betas=[-1, 0.9]", "optimizer.betas[0]: -1.0 must lie in [0, 1)"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1]: 1.0 must lie in [0, 1)"),
        ("optimizer.eps=-1e-8", "optimizer.eps: -1e-08 must lie in (0, 1]"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: -1.0 must be 0 or more"),
        ("optimizer.lr=1e40", "optimizer.lr: 1e+40 must be above 0, at most 100"),
        ("ema.snapshot_every_steps=-1", "ema.snapshot_every_steps: -1 must be 0 or more"),
        ("student={kind: mlp, width: 0}", "student.width: 0 must be 1 or more"),
        ("student={kind: mlp, depth: -1}", "student.depth: -1 must be 1 or more"),
        (f"student={{kind: mlp, width: {10**40}}}", "student.width: "),
        ("student={kind: mlp, cycles: 0}", "student.cycles: 0.0 must be above 0"),
        ("student={kind: dit, patch: 0}", "student.patch: 0 must be 1 or more"),
        ("student={kind: dit, heads: -1}", "student.heads: -1 must be 1 or more"),
        ("student={kind: dit, depth: 0}", "student.depth: 0 must be 1 or more"),
        ("student={kind: from_teacher, dropout: 2}", "student.dropout: 2.0 must lie in [0, 1)"),
        ("data={kind: toy, radius: -1}", "data.radius: -1.0 must be 0 or more"),
        ("objective={kind: scm, c: -1}", "objective.c: -1.0 must be 0 or more"),
        ("sampler.shift=0", "sampler.shift: 0.0 must be above 0"),
        ("sampler.rho=1e40", "sampler.rho: 1e+40 must be 0.1 or more, at most 100"),
        ("sampler.steps=[1000000000]", "sampler.steps[0]: 1000000000 must be 1 or more, at most 100000"),
        (
            "objective={kind: cmt, solver: {kind: heun, steps: 1000000000}}",
            "objective.solver.steps: 1000000000 must be 1 or more, at most 100000",
        ),
    ],
)
def test_nonsense_in_a_recipe_is_named(override, says):
    with pytest.raises(RecipeError) as caught:
        read_recipe("digits", [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_hold_their_solver_to_the_same_range():
    with pytest.raises(RecipeError, match="coupling.solver.steps: 1000000000 must be 1 or more, at most 100000"):
        read_recipe("rfpp/digits", ["coupling.solver.steps=1000000000"])


def test_settings_made_in_python_are_held_to_their_ranges():
    with pytest.raises(ValueError, match="width: 0 must be 1 or more"):
        MLP(width=0)
    with pytest.raises(ValueError, match="num: 0 must be 1 or more"):
        Pairs(teacher=TeacherSlot("digits"), num=0)

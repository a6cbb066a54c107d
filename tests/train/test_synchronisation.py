"""No objective, network, guidance or draw makes the host wait for the device: a step of each on the meta device."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset, StepBatches
from flowmap.data.steps import first_place
from flowmap.flow.times import diagonal_rows
from flowmap.objectives import Adversarial
from flowmap.teachers.guidance import Autoguidance, ClassifierFree, with_drawn_scales
from flowmap.train.draw import draw_sample, generator_for
from flowmap.train.module import DistillModule
from tests.support.synchronisation import Synchronisations
from tests.train.one_step import STEP, built
from tests.train.test_split import BY_BATCH, KINDS, recipe_of

META = torch.device("meta")
BATCH = 8


class Half:
    """A teacher of one line, on any device."""

    network_calls = 1

    def velocity(self, x, t, cond=None):
        return x / 2


def of(recipe, monkeypatch):
    """The recipe's module on the meta device, and a batch for it."""
    module = built(recipe)
    teacher = module.teacher
    module.teacher = None if teacher is None else BuiltTeacher(Half(), None)
    optimizers = module.configure_optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    trainer = SimpleNamespace(world_size=1, optimizers=optimizers)
    for name, value in {"global_step": STEP, "global_rank": 0, "trainer": trainer}.items():
        monkeypatch.setattr(DistillModule, name, value)
    wrapped = [SimpleNamespace(optimizer=one) for one in optimizers]
    for name, value in {"_step": lambda *a, **k: None, "optimizers": lambda self: wrapped}.items():
        monkeypatch.setattr(type(module), name, value, raising=False)
    batches = StepBatches(len(module.samples), BATCH, seed=recipe.seed)
    x0, cond, *paired = module.samples.__getitems__(batches.indices(STEP))
    batch = (x0.to(META), {key: value.to(META) for key, value in cond.items()}, *(x.to(META) for x in paired))
    return module.to(META), batch


@pytest.mark.parametrize("kind", [*KINDS, *BY_BATCH])
def test_a_step_waits_for_nothing(kind, tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, *{**KINDS, **BY_BATCH}[kind])
    recipe = replace(
        recipe,
        data=replace(recipe.data, batch_size=BATCH),
        trainer=replace(recipe.trainer, check_finite_every_steps=50),
    )
    module, batch = of(recipe, monkeypatch)
    module._empty(META)  # copied once in a run
    with Synchronisations() as found:
        loss = module.training_step(batch, 0)
        if loss is not None:
            loss.backward()
    assert not found, "\n".join(found)
    assert isinstance(recipe.objective, Adversarial) or module.last_loss is not None


@pytest.fixture
def full_scale(monkeypatch):
    """benchmarks/lib/full_scale.py, in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("lib.full_scale")


def at_toy_size(name, full_scale, monkeypatch):
    """The module of a full-scale recipe with toy networks of its own classes on the meta device, and a batch."""
    settings = ["trainer.precision=32", "trainer.strategy=auto"]  # the meta device has no autocast
    if name.startswith(("rfpp", "instaflow")):
        settings.append("objective={kind: rectified}")  # instead of LPIPS, which needs files
    scale = full_scale.FullScale.of(name, toy=True, overrides=settings)
    built = full_scale.Built.of(scale, torch.device("cpu"), half=False)
    guided, rows = built.teacher, scale.rows
    names = ("teacher", "strong", "weak")
    networks = [getattr(guided, name) for name in names if hasattr(guided, name)] or [guided] * (guided is not None)
    teacher = None if guided is None else BuiltTeacher(guided, None, tuple(one.flow_map for one in networks))
    x0 = torch.randn(rows, *scale.config.shape)
    module = DistillModule(scale.run, built.student, teacher, Dataset("random", x0, x0))
    trainer = SimpleNamespace(world_size=1, optimizers=[SimpleNamespace(param_groups=[{}])])
    for name, value in {"global_step": 10**6, "global_rank": 0, "trainer": trainer}.items():
        monkeypatch.setattr(DistillModule, name, value)
    cond = {key: value for key, value in built.cond.items() if key != "guidance"}
    return module, (x0, cond, *[x0] * scale.recipe.coupling.paired)


SLOW = ("sd15", "sana", "flux-dev-lora", "imagenet512-lmd", "imagenet512-scd", "rfpp/cifar10", "rfpp/imagenet64",
        "instaflow/sd15-reflow")  # fmt: skip


@pytest.mark.parametrize(
    "name", ["dit256", "imagenet512", "sd35-medium", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_whole_step_of_the_recipes_own_networks_waits_for_nothing(name, full_scale, monkeypatch):
    """From the batch on the host until the averages have the step; torch's own optimizer is not run."""
    pytest.importorskip("diffusers")
    module, batch = at_toy_size(name, full_scale, monkeypatch)
    module.to(META)
    if module.teacher is not None:
        module.teacher.to(META)
    scale = torch.ones(len(batch[0]))
    with torch.no_grad():  # tables are copied to the device in the first call
        module.student.velocity(*move_data_to_device((batch[0], scale, {**batch[1], "guidance": scale}), META))
    with Synchronisations() as found:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.on_after_batch_transfer(move_data_to_device(batch, META), 0)
        module.training_step(batch, 0).backward()
        module.on_before_optimizer_step(None)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        module.check_finite(1)
        module.average()
    assert not found, "\n".join(found)
    assert module.last_sample.t.device == META


@pytest.mark.parametrize("guided", [ClassifierFree(Half()), Autoguidance(Half(), Half())])
def test_guidance_waits_for_nothing(guided):
    x, t = torch.randn(5, 3, device=META), torch.rand(5, device=META)
    cond = {"class": torch.arange(5, device=META), "guidance": torch.ones(5, device=META)}
    with Synchronisations() as found:
        with_drawn_scales(guided, (1.0, 3.0)).velocity(x, t, cond)
        with_drawn_scales(guided, (1.0, 3.0)).velocity(x, t, {"class": cond["class"]})
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_draw_knows_the_samples_with_s_equal_to_t(kind, tmp_path):
    recipe = recipe_of(tmp_path, *KINDS[kind])
    first, device = first_place(STEP, 0, batch_size=64), torch.device("cpu")
    t, s = recipe.times(64, generator=generator_for(recipe.seed, STEP, first, 64, device))
    assert torch.equal(diagonal_rows(recipe.times, torch.arange(first, first + 64)), t == s)
    sample = draw_sample(recipe, torch.zeros(64, 2), {}, generator_for(recipe.seed, STEP, first, 64, device))
    assert torch.equal(sample.places(STEP), torch.arange(first, first + 64)) and sample.still is not None


def test_the_search_finds_what_waits():
    x = torch.zeros(3, device=META)
    for wait in (
        lambda: torch.tensor(1.0, device=META),
        lambda: torch.as_tensor([1.0], device=META),
        lambda: x.new_tensor([1.0]),
        lambda: torch.ones(2).to(META),
        lambda: x[torch.tensor([0, 1])],
        lambda: x.index_put((torch.tensor([0]),), x[:1]),
    ):
        with Synchronisations() as found:
            wait()
        assert len(found) == 1, found
    for wait in (lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.tolist()):
        with Synchronisations(), pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with Synchronisations() as found:
        (
            torch.ones(2).to(META, non_blocking=True),
            x[torch.zeros(2, dtype=torch.int64, device=META)],
            x + torch.tensor(1),
        )
    assert not found

"""Kernels of a step counted on the meta device, against counts by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from flowmap.estimate.attention import fused_attention
from flowmap.estimate.flops import FORMULAS
from flowmap.estimate.frozen_networks import caption_flops, live_text
from flowmap.estimate.networks import config_without_weights, teacher_configs
from flowmap.estimate.outlines import Outlines
from flowmap.estimate.price import (
    Prices,
    _text_share,
    evaluation_parts,
    pairs_bytes,
    preparation_lines,
    price_lines,
    sample_bytes,
    solver_calls,
)
from flowmap.estimate.roofline import (
    FLOAT32_SHARE,
    TF32_SHARE,
    Counter,
    Device,
    Traffic,
    float32_share,
    step_of,
    step_traffic,
    sustained,
)
from flowmap.flow.solver import Heun
from flowmap.flow.tangent.dual import dual_forward
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe

BOTH = (Device(), sustained(200))


def counted(call, half: bool = False) -> Traffic:
    counter = Counter(BOTH, half)
    with torch.device("meta"), fused_attention():
        arguments = call(None)
        with counter:
            call(arguments)
    return counter.found


def test_a_product_is_one_kernel_with_its_flops_bytes_and_seconds():
    n = 512

    def product(given):
        return torch.zeros(2, n, n).unbind() if given is None else given[0] @ given[1]

    found = counted(product, half=True)
    assert (found.kernels, found.flops, found.bytes) == (1, 2 * n**3, 3 * n * n * 2)
    assert found.seconds == max(2 * n**3 / 450e12, 6 * n * n / 2.7e12, 2e-6)
    assert found.slow_seconds == max(2 * n**3 / 200e12, 6 * n * n / 1.35e12, 12e-6)


def test_an_expanded_dimension_is_read_once():
    def add(given):
        return (torch.zeros(64, 32), torch.zeros(32)) if given is None else given[0] + given[1].expand(64, 32)

    assert counted(add).bytes == 4 * (64 * 32 + 32 + 64 * 32)


def test_attention_is_one_kernel_and_its_tangent_another():
    shape = (2, 4, 64, 16)

    def attention(given):
        return [torch.zeros(3, *shape)] if given is None else F.scaled_dot_product_attention(*given[0])

    def dual(given):
        if given is None:
            return [torch.zeros(3, *shape), torch.zeros(3, *shape)]
        return dual_forward(F.scaled_dot_product_attention, given[0].unbind(), given[1].unbind())

    plain, carried = counted(attention, half=True), counted(dual, half=True)
    assert (plain.kernels, plain.flops) == (1, 4 * 2 * 4 * 64 * 64 * 16)
    scores = 2 * 4 * 64 * 64
    assert carried.flops == plain.flops + 5 * 2 * scores * 16  # q k', dq k', q dk', ds v, w dv
    assert (carried.kernels, carried.bytes) == (
        2,
        plain.bytes + 8 * 2 * 2 * 4 * 64 * 16,
    )  # 3 + 1 arrays, their tangents
    assert F.scaled_dot_product_attention.__module__ != "flowmap.estimate.attention"


def test_the_products_of_attentions_tangent_are_those_of_the_tangents_given():
    q, k, v, o = ((2, 4, 64, 16), (2, 4, 48, 16), (2, 4, 48, 8), (2, 4, 64, 8))
    scores = 2 * 2 * 4 * 64 * 48
    flops = lambda *tangents: FORMULAS[torch.ops.flowmap.attention_tangent](q, k, v, o, *tangents, False, 0.1, False)
    assert flops(q, k, v, None, None) == scores * (3 * 16 + 2 * 8)
    assert flops(q, None, None, None, None) == scores * (2 * 16 + 8)
    assert flops(None, k, v, None, None) == scores * (2 * 16 + 2 * 8)
    assert flops(None, None, v, None, None) == scores * (16 + 8)
    assert flops(None, None, None, (64, 48), (64, 48)) == scores * (16 + 8)


def test_a_number_that_is_read_stops_nothing():
    def read(given):
        return torch.zeros(()) if given is None else (float(given), bool(given > 0), int(given.long()))

    assert counted(read).kernels >= 0


@pytest.fixture(scope="module")
def digits():
    run = resolve(read_recipe("digits", ["trainer.accelerator=auto"]))
    config = config_without_weights(run, Outlines().of(run)[0])
    return run, config, [one for _, one in teacher_configs(run, config)]


def test_the_parts_of_a_step(digits):
    run, config, teachers = digits
    found = step_traffic(run.recipe, config, teachers)
    assert set(found) == {"teacher", "student", "backward", "optimizer", "averages"}
    plain = step_traffic(run.recipe.changed(objective=read_recipe("digits-teacher").objective), config, ())
    assert found["student"].flops > 1.9 * plain["student"].flops  # value and tangent
    assert plain["teacher"] == Traffic() and found["teacher"].flops > 0
    trained = sum(p.numel() for p in config.build().parameters())
    assert found["optimizer"].bytes == 28 * trained


def test_prices_of_a_run_grow_with_its_steps_and_batches(digits):
    run, config, teachers = digits
    one = Prices().training(run.recipe, config, teachers)
    trainer = replace(run.recipe.trainer, steps=2 * run.recipe.trainer.steps)
    twice = Prices().training(run.recipe.changed(trainer=trainer), config, teachers)
    assert twice.seconds == pytest.approx(2 * one.seconds) and one.slow_seconds > one.seconds
    text = "\n".join(price_lines(run, config, 1000, Prices()))
    assert "GPU-hours" in text and "the last evaluation" in text and "disk" in text


def test_pairs_are_priced_by_the_calls_of_their_solver(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    run = resolve(read_recipe("rfpp/digits"))
    assert solver_calls(run.pairs) == 32
    assert solver_calls(replace(run.pairs, solver=Heun(18, "rho", euler_last=True))) == 35
    config = config_without_weights(run, Outlines().of(run)[0])
    assert pairs_bytes(run.recipe, config.shape) == pytest.approx(
        run.pairs.num * (math.prod(config.shape) + 24) + run.pairs.num_inverted * 2 * math.prod(config.shape)
    )
    assert any(line.startswith(f"{run.pairs.num:,} pairs:") for line in preparation_lines(run, config, Prices()))


def test_what_stages_share_is_priced_once():
    prices = Prices()
    assert prices.new(["encoding", "pairs"]) == ["encoding", "pairs"] and prices.new(["pairs", "more"]) == ["more"]
    assert prices == Prices(), "the rates"


def test_what_a_step_does_beside_its_distillation_is_priced_by_its_flops(digits):
    """The samples and the discriminator of an adversarial objective."""
    run, config, teachers = digits
    plain, more = (Prices().step(run.recipe, config, teachers, extra) for extra in (0.0, 1e12))
    samples = run.recipe.data.batch_size * run.recipe.batches.accumulate
    expected = samples * 1e12 / (Device().flops * float32_share(run.recipe.trainer))
    assert more.computed.seconds - plain.computed.seconds == pytest.approx(expected)


def test_a_step_in_float32_is_of_tensorfloat32_where_the_recipe_allows(digits):
    run, config, teachers = digits
    fast, slow = (
        step_of(run.recipe.changed(trainer=replace(run.recipe.trainer, tf32=on)), config, teachers, Prices().devices)
        for on in (True, False)
    )
    assert fast.parts["student"].flops == slow.parts["student"].flops
    assert fast.parts["student"].slow_seconds <= slow.parts["student"].slow_seconds


def test_a_step_whose_objective_learns_a_weight_is_counted(digits):
    """It trains a branch that the student's file does not have."""
    run, config, teachers = digits
    recipe = read_recipe("digits-scm")
    assert recipe.distillation.learns_weight
    assert step_of(recipe, config, teachers, Prices().devices).student_graded >= 1


def test_a_step_counts_the_calls_of_its_networks(digits):
    run, config, teachers = digits
    found = step_of(run.recipe, config, teachers, Prices().devices)
    assert found.student_graded >= 1 and found.student_calls >= found.student_graded
    assert len(found.teacher_calls) == len(teachers) and all(found.teacher_calls)


def test_the_evaluation_is_priced_in_parts():
    run = resolve(read_recipe("imagenet512"))
    config = config_without_weights(run, Outlines().of(run, whole=False)[0])
    parts = dict(evaluation_parts(FewKernels(), run, config, [config]))
    assert list(parts) == [
        "50,000 samples of the student, at 1, 2, 4 steps",
        "50,000 samples of the teacher, at 64 steps",
        "decoding of 200,000 samples",
        "inception of 211,000 pictures",
    ]
    student, teacher, decoding, features = parts.values()
    assert teacher.seconds == pytest.approx(student.seconds * 64 / 7) and decoding.seconds == 200_000
    assert features.flops == 211_000 * 11.4e9


class FewKernels(Prices):
    """Every call costs a second."""

    def forward(self, config, recipe):
        return Traffic(1, 1.0, 1.0, 1.0, 1.0)

    def autoencoder(self, side, *, decodes, half):
        return Traffic(1, 1.0, 1.0, 1.0, 1.0)


def test_captions_cost_two_flops_for_each_parameter_and_token_in_float32():
    run = resolve(read_recipe("sd15"))
    config = config_without_weights(run, Outlines().of(run, whole=False)[0])
    text = Prices().text(config)
    assert text.flops == 2 * 0.12e9 * 77 and text.seconds == pytest.approx(text.flops / (Device().flops * 0.1))
    padded, captions = (
        sample_bytes(run.recipe.changed(data=replace(run.recipe.data, stored_text=stored)), config)
        for stored in ("padded", "captions")
    )
    assert padded - captions == 2 * 77 * 768 - 100
    assert not live_text(run.recipe.changed(data=replace(run.recipe.data, stored_text="padded")))
    assert live_text(run.recipe.changed(data=replace(run.recipe.data, stored_text="captions")))


@pytest.mark.parametrize(("name", "clip", "t5"), [("sd35-medium", 0.82e9, 77), ("flux-dev-lora", 0.12e9, 256)])
def test_clip_and_t5_encode_a_caption_each_its_own_tokens(name, clip, t5):
    run = resolve(read_recipe(name))
    config = config_without_weights(run, Outlines().of(run, whole=False)[0])
    assert caption_flops(config) == 2 * (clip * 77 + 4.76e9 * t5)


def test_captions_are_encoded_at_the_rate_of_their_precision():
    share = lambda *settings: _text_share(read_recipe("sd15", settings))
    whole = "trainer.precision=32"
    assert (share(), share(whole), share(whole, "trainer.tf32=false")) == (1, TF32_SHARE, FLOAT32_SHARE)

"""A step is the same however its batch is split over micro-batches and processes, and draws by (seed, step) alone."""

from __future__ import annotations

import pytest
import torch

from flowmap.recipe.kinds import TABLES, Objective
from flowmap.recipe.recipe import list_recipes, read_recipe
from flowmap.train.draw import generator_for
from tests.conftest import TINY
from tests.support.tiny_text import wordnet_files
from tests.train.one_step import gradients_of_a_step
from tests.train.test_autoencoder_runs import RECIPE as AUTOENCODER
from tests.train.test_lediflow_runs import PRIOR
from tests.train.test_text_joint_runs import JOINT
from tests.train.test_text_runs import VAE

DIGITS = """\
data: {kind: digits, drop_condition: 0.3}
student: {kind: dit, preset: nano, depth: 1}
times: {kind: mixture, base: {kind: interval}, one_step: 0.125, diagonal: 0.25}
sampler: {kind: deterministic, steps: [1]}
log: {wandb: false}
"""
SHARES = "times={kind: mixture, base: {kind: uniform, pairs: sorted}, one_step: 0.125, diagonal: 0.25}"
GAMMA = "sampler={kind: gamma, gamma: 1.0, steps: [1, 2]}"
CONV = "discriminator: {kind: conv, width: 4}, balance: none, start: 0"
PAIRED = "coupling={kind: pairs, teacher: {card: exact}, num: 500}"
BASE = "{kind: ayf_mixed, warmup_steps: 0, own_lagrangian: 1.0}"
KINDS = {  # by objective kind: the recipe, and what is changed in it
    "flow_matching": (TINY, "objective={kind: flow_matching}", "times={kind: u_shaped, pairs: sorted}"),
    "ayf_emd": (TINY, "objective={kind: ayf_emd, warmup_steps: 0}", SHARES),
    "ayf_lmd": (TINY, "objective={kind: ayf_lmd, warmup_steps: 0}", SHARES),
    "ayf_mixed": (
        TINY,
        "objective={kind: ayf_mixed, warmup_steps: 0, lagrangian: 0.25, own_lagrangian: 0.5, own_eulerian: 0.5}",
        SHARES,
    ),
    "meanflow": (TINY, "objective={kind: meanflow}", SHARES),
    "alpha_flow": (TINY, "objective={kind: alpha_flow, end_steps: 4, gamma: 1.0}", SHARES),
    "rcgm": (TINY, "objective={kind: rcgm, interval: 0.1}", SHARES),
    "pi_flow": (TINY, "objective={kind: pi_flow}", "student={kind: mlp, width: 16, points: 3}", SHARES),
    "scm": (TINY, "objective={kind: scm, warmup_steps: 0, weight: {kind: learned}}", "times={kind: consistency}"),
    "facm": (TINY, "objective={kind: facm}", "times={kind: consistency}"),
    "esd": (TINY, "objective={kind: esd, weight: {kind: learned}}", SHARES),
    "lsd": (TINY, "objective={kind: lsd}", SHARES),
    "psd": (TINY, "objective={kind: psd, split: uniform}", SHARES),
    "shortcut": (TINY, "objective={kind: shortcut}", "times={kind: dyadic, finest: 8, diagonal: 0.25}"),
    "freeflow": (TINY, "objective={kind: freeflow}", SHARES),
    "consistency": (TINY, "objective={kind: consistency}", "times={kind: consistency}"),
    "cmt": (TINY, "objective={kind: cmt, points: 2}", SHARES),
    "score_distillation": (TINY, "objective={kind: score_distillation, fake_steps: 2}", GAMMA),
    "joint": (TINY, f"objective={{kind: joint, base: {BASE}, term: {{kind: reverse_kl, fake_steps: 2}}}}"),
    "reward_tuning": (TINY, "objective={kind: reward_tuning, base: {kind: meanflow}, reward: {kind: ink}}", SHARES),
    "rectified": (TINY, "objective={kind: rectified}", PAIRED, "times={kind: u_shaped}", "teacher=null"),
    "endpoint": (TINY, "objective={kind: endpoint}", PAIRED, "teacher=null"),
    "adversarial": (DIGITS, f"objective={{kind: adversarial, base: {{kind: meanflow}}, {CONV}}}"),
    "reconstruction": (AUTOENCODER,),
    "variance_guided": (PRIOR,),
}
BY_BATCH = {  # these look at means over the batch: docs/guide/numerics.md
    "text_elbo": (VAE,),
    "text_joint": (JOINT,),
}


def recipe_of(tmp_path, text, *changes):
    path = tmp_path / "one.yaml"
    path.write_text(text.replace("WORDNET", str(wordnet_files(tmp_path / "wordnet")) if "WORDNET" in text else ""))
    return read_recipe(path, changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_however_its_batch_is_split(kind, tmp_path, monkeypatch):
    """Eight samples at once, in four micro-batches, in two on each of two processes, and on four: the same gradients.

    In float64, so that nothing but the order of sums differs.
    """
    recipe = recipe_of(tmp_path, *KINDS[kind])
    whole = gradients_of_a_step(monkeypatch, recipe, batch=8, double=True)
    for split in (dict(batch=2, accumulate=4), dict(batch=2, accumulate=2, world=2), dict(batch=2, world=4)):
        found = gradients_of_a_step(monkeypatch, recipe, **split, double=True)
        assert found.keys() == whole.keys()
        for name, grads in whole.items():
            scale = max(float(g.abs().max()) for g in grads)
            assert scale > 0
            for a, b in zip(grads, found[name], strict=True):
                torch.testing.assert_close(
                    b, a, rtol=0, atol=1e-12 * scale, msg=lambda m, name=name, split=split: f"{name}, {split}: {m}"
                )


@pytest.mark.parametrize("balance", ["base", "adversarial"])
def test_a_balance_of_two_losses_is_that_of_the_whole_step(balance, tmp_path, monkeypatch):
    objective = KINDS["adversarial"][1].replace("balance: none", f"balance: {balance}")
    recipe = recipe_of(tmp_path, DIGITS, objective)
    whole, split = (
        gradients_of_a_step(monkeypatch, recipe, **how, double=True)
        for how in (dict(batch=8), dict(batch=2, accumulate=4))
    )
    for name, grads in whole.items():
        scale = max(float(g.abs().max()) for g in grads)
        for a, b in zip(grads, split[name], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * scale, msg=lambda m, name=name: f"{name}: {m}")


def test_every_kind_of_objective_is_among_them():
    assert KINDS.keys() | BY_BATCH.keys() == TABLES[Objective].keys()


SMALL = "num_blocks: 1, attention_at: [], dropout: 0.5"
EMD, NET = "objective={kind: ayf_emd}", f"student={{kind: edm2, channels: 8, multipliers: [1, 2], {SMALL}}}"
NETS = {  # with dropout
    "edm2": (DIGITS, NET, EMD),
    "edm2, adversarial": (DIGITS, NET, f"objective={{kind: adversarial, base: {{kind: ayf_emd}}, {CONV}}}"),
    "edm": (DIGITS, f"student={{kind: edm_ddpmpp, channels: 32, multipliers: [1], {SMALL}}}", "objective={kind: psd}"),
    "adm": (DIGITS, f"student={{kind: edm_adm, channels: 64, multipliers: [1], {SMALL}}}", EMD),
}


@pytest.mark.parametrize("name", [*KINDS, *BY_BATCH, *NETS])
def test_a_step_does_not_see_torchs_own_generator(name, tmp_path, monkeypatch):
    """Two states of it, one gradient: a resumed run, with another state, is as an uninterrupted one."""
    recipe = recipe_of(tmp_path, *{**KINDS, **BY_BATCH, **NETS}[name])
    one, other = (gradients_of_a_step(monkeypatch, recipe, batch=2, accumulate=2, state=state) for state in (1, 2))
    assert one.keys() == other.keys() and all(
        torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True)
    )


SHIPPED = [
    name
    for name in list_recipes()
    if hasattr(read_recipe(name).times, "diagonal") or hasattr(read_recipe(name).distillation, "lagrangian")
]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_trains_every_share_of_its_own(name):
    """Before as many samples as make two of the share: with small batches some recipes never trained a pair (1, 0)."""
    recipe = read_recipe(name)
    batch = recipe.data.batch_size
    shares = {key: getattr(recipe.times, key, 0.0) for key in ("one_step", "diagonal")}
    shares["lagrangian"] = getattr(recipe.distillation, "lagrangian", 0.0)
    found = dict.fromkeys(shares, 0)
    num = -(-2 // (min(share for share in shares.values() if share) * batch))
    for step in range(int(num)):
        generator = generator_for(0, step, step * batch, batch, torch.device("cpu"))
        t, s = recipe.times(batch, generator=generator)
        found["one_step"] += int(((t == 1) & (s == 0)).sum())
        found["diagonal"] += int((t == s).sum())
        found["lagrangian"] += int(recipe.distillation.rows(generator.rows)[0].sum()) if shares["lagrangian"] else 0
    assert all(found[key] >= int(num * batch * share) - 1 > 0 for key, share in shares.items() if share), (
        found,
        shares,
    )

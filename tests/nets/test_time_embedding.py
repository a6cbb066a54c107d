"""A new embedding of t: close to the old one in the output, with a bounded tangent at both ends, and kept in the
student's configuration.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowmap.base.schema import RecipeError
from flowmap.flow.clock import SMALL_UNIT
from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.diffusers_model import DiffusersNet
from flowmap.nets.edm2 import EDM2
from flowmap.nets.flow_map import FlowMapNet, start_from
from flowmap.nets.preconditioning import noise_level
from flowmap.nets.teacher_settings import clock_of
from flowmap.nets.time_embedding import AT_NOISE, last_layer, time_embeddings
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student, save_student
from tests.nets.test_diffusers_model import FAMILIES, made, points, scheduler_of
from tests.nets.test_edm2 import filled

SMALL = EDM2(channels=64, multipliers=(1, 2), num_blocks=1, attention_at=())
EMBEDS_T = "Lumina 2"  # embeds 1 - t already
SHAPE, ROWS = (3, 8, 8), 32


def teacher():
    net = filled(SMALL.build(SHAPE, num_classes=10, arrival=False))
    net.unet.emb_fourier.freqs.mul_(2 * torch.pi)  # the bandwidth of the published networks
    return FlowMapNet(net).eval()


def student(seed=0):
    torch.manual_seed(seed)
    new = FlowMapNet(SMALL.embedding_t().build(SHAPE, num_classes=10, guidance=True)).eval()
    start_from(new, teacher())
    return new


def at(time):
    """(x, t, conditions) of 32 points at that time."""
    x = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x, torch.full((ROWS,), time), {"class": torch.arange(ROWS) % 10}


@torch.no_grad()
def output_error(time):
    x, t, cond = at(time)
    old, new = teacher().velocity(x, t, cond), student().velocity(x, t, cond)
    return float((new - old).norm() / old.norm())


def tangent_norm(flow_map, time):
    x, t, cond = at(time)
    with torch.no_grad():
        v = teacher().velocity(x, t, cond)
    return float(eulerian_derivative(flow_map, x, t, torch.zeros_like(t), v, cond)[1].flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("time", (0.2, 0.4, 0.6, 0.8))
def test_the_output_stays_close_away_from_the_ends(time):
    assert 0 < output_error(time) < 0.05


def rates_of(embedding):
    """The norm of the embedding's derivative in t, at times from 0.001 to 0.999, and over its magnitude."""
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    out = torch.func.jvp(embedding, (t,), (torch.ones_like(t),))[1]
    return out.square().mean(1).sqrt() / embedding(t).square().mean().sqrt()


def test_the_rate_of_the_embedding_is_bounded_at_both_ends():
    """Of log(sigma) / 4 the derivative is 1 / (4 t (1 - t)): 100 at t = .0025."""
    old, new = (flow_map.requires_grad_(False).double().net.unet for flow_map in (teacher(), student()))
    before, after = rates_of(lambda t: old._embedding(noise_level(t), t.dtype)), rates_of(new.emb_time)
    assert before.max() > 500 and after.max() < 30
    assert after[500] == pytest.approx(float(before[500]), rel=0.2)
    assert tangent_norm(student(), 0.005) < 0.2 * tangent_norm(teacher(), 0.005)


def test_the_fit_has_no_large_weights_that_cancel():
    """The square of a least-squares fit, summed over what it was fitted at, is at most that of the target (Bessel).

    The cosines are orthogonal at the even times, where it is the sum of the squares of the weights. Those of a random
    hidden layer were up to 8 for a target of 1, and AYF-EMD diverged when training moved them.
    """
    old, new = teacher().net.unet, student().net.unet
    t = (torch.arange(4096) + 0.5) / 4096
    with torch.no_grad():
        target = old._embedding(noise_level(t), t.dtype).square().mean(0)
        target += AT_NOISE * old._embedding(noise_level(torch.ones(1)), t.dtype)[0].square()
        found = new.emb_time.weight.square() / torch.tensor([1.0] + [2.0] * (new.emb_time.in_features - 1))
        found = found.sum(1) + AT_NOISE * new.emb_time(torch.ones(1))[0].square()
    assert (found <= 1.001 * target).all() and (found > 0.5 * target).all()


def test_the_fit_is_close_where_every_sample_starts():
    """At t = 1, where the target is flat and an even fit of the cosines is not."""
    old, new, noise = teacher().net.unet, student().net.unet, torch.ones(1)
    with torch.no_grad():
        target = old._embedding(noise_level(noise), noise.dtype)
        assert (new.emb_time(noise) - target).norm() < 0.15 * target.norm()


def test_all_other_weights_are_the_teachers():
    old, new = teacher().state_dict(), student().state_dict()
    assert not [name for name in new if "emb_fourier" in name or "emb_noise" in name]
    assert all(torch.equal(new[name], old[name]) for name in new if name in old)
    again = student(seed=1).state_dict()
    assert torch.equal(new["net.unet.emb_time.weight"], again["net.unet.emb_time.weight"])  # the fit draws nothing


def test_the_fit_is_a_no_op_on_the_meta_device():
    """As in the check of a recipe before its run, which builds the student there."""
    with torch.device("meta"):
        net = SMALL.build(SHAPE, num_classes=10, arrival=False).with_embedding_of_t()
        assert net.embeds_t and net.unet.emb_time.weight.is_meta


def test_a_saved_student_keeps_its_embedding(tmp_path):
    config = StudentConfig(SMALL.embedding_t(), Deterministic(), SHAPE, num_classes=10, guidance=(1.0, 3.0, 2.0))
    save_student(tmp_path, config, student().state_dict(), recipe="", card="")
    loaded, (x, t, cond) = load_student(tmp_path), at(0.3)
    assert loaded.config.net.time_embedding == "t"
    assert torch.equal(loaded.velocity(x, t, cond), student().velocity(x, t, cond))


def smooth(family, kind):
    """A network of that family on its schedule, of which the time embeddings read the slow sinusoids alone."""
    net = made(FAMILIES[family][0])
    for _, module in time_embeddings(net):
        first = module.mlp[0] if last_layer(module) == "mlp.2" else module.linear_1
        first.weight.data.mul_(20)  # 0.05 at random, next to which time would not matter
        half = first.in_features // 2
        fast = 10_000 ** (-torch.arange(half) / half) * 1000 > 20
        first.weight.data[:, torch.cat([fast, fast])] = 0
    return FlowMapNet(DiffusersNet(net, *clock_of(scheduler_of(kind)), arrival=False, guidance=False)).eval()


@pytest.mark.parametrize("family, kind", [(n, row[3][0]) for n, row in FAMILIES.items() if n != EMBEDS_T])
@torch.no_grad()
def test_a_diffusers_network_embeds_t_at_low_frequencies(family, kind):
    old = smooth(family, kind)
    new = FlowMapNet(old.net.with_embedding_of_t()).eval()
    assert not old.net.embeds_t and new.net.embeds_t and new.net.clock.unit == SMALL_UNIT
    x, t, _, cond = points(family)
    before, after, swapped = old.velocity(x, t, cond), new.velocity(x, t, cond), old.velocity(x, t.flip(0), cond)
    assert (after - before).norm() < 0.1 * (swapped - before).norm()


def test_a_diffusers_student_starts_with_the_fitted_embedding(tmp_path):
    from tests.nets.test_diffusers_model import student_of

    teacher, before = student_of("SD3", "flow")
    expected = teacher.net.with_embedding_of_t().state_dict()
    after = FlowMapNet(DiffusersNet(before.net.model, before.net.clock.with_unit(SMALL_UNIT), "linear_velocity",
                                    arrival=True, guidance=True))  # fmt: skip
    start_from(after, teacher)
    assert all(torch.equal(after.net.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_recipe_asks_for_it_and_mistakes_are_named():
    start = ["teacher.card=digits", "student.kind=from_teacher", "student.time_embedding=t"]
    edm2 = "student={kind: edm2, channels: 32, multipliers: [1, 2], num_blocks: 1, attention_at: []}"
    assert resolve(read_recipe("digits", [*start, f"teacher.overrides=['{edm2}']"])).net.embeds_t
    assert not resolve(read_recipe("digits", [*start[:2], f"teacher.overrides=['{edm2}']"])).net.embeds_t
    with pytest.raises(RecipeError, match="student.time_embedding: a network of kind dit has no embedding of log"):
        _ = resolve(read_recipe("digits", start)).net
    with pytest.raises(RecipeError, match="student.time_embedding: 'sigma' is not one of t, null"):
        read_recipe("digits", ["student.time_embedding=sigma"])
    with pytest.raises(ValueError, match="time_embedding: a LoRA student"):
        read_recipe("flux-dev-lora", ["student.time_embedding=t"])
    with pytest.raises(ValueError, match="time_embedding: 'sigma' is not one of log_sigma, t"):
        replace(SMALL, time_embedding="sigma")


@pytest.mark.parametrize("name", ("imagenet64", "imagenet512"))
def test_the_recipes_of_imagenet_embed_t(name):
    assert read_recipe(name).student.time_embedding == "t"

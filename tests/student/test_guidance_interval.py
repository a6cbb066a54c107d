"""The interval of guidance as an input: drawn in training, zero effect at the start, learned, chosen when sampling."""

from dataclasses import replace

import pytest
import torch

from flowmap.export.plan import make_plan
from flowmap.flow.path import Linear
from flowmap.nets import ADM, EDM2, MLP, DiT
from flowmap.nets.flow_map import start_from
from flowmap.objectives import FlowMatching
from flowmap.recipe import read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student, save_student
from flowmap.student.student import Student
from flowmap.teachers.exact import GaussianTeacher
from flowmap.teachers.guidance import INTERVAL, Autoguidance, IntervalGuidance
from flowmap.train.draw import draw_sample, generator_for
from tests.support.oracle import draw
from tests.support.random_student import random_student

CONFIG = StudentConfig(
    DiT(preset="nano", depth=1),
    Deterministic(),
    (3, 4, 6),
    num_classes=7,
    guidance=(1.0, 3.0, 1.5),
    guidance_interval=(0.2, 0.8),
)


def built(config=CONFIG) -> Student:
    return random_student(config)


@pytest.mark.parametrize("chosen", ["classifier_free", "autoguidance, skip_blocks: [0]"])
def test_training_draws_an_end_in_each_half_of_the_interval(chosen):
    settings = f"{{kind: {chosen}, interval: [0.2, 0.8], interval_input: true}}"
    recipe = read_recipe("digits", [f"teacher.guidance={settings}"])
    x0, cond = torch.zeros(2000, 1, 2, 3), {"class": torch.zeros(2000, dtype=torch.int64)}
    sample = draw_sample(recipe, x0, cond, generator_for(0, 1, 0, 2000, x0.device))
    low, high = sample.cond[INTERVAL].unbind(1)
    for ends, (least, most) in ((low, (0.2, 0.5)), (high, (0.5, 0.8))):
        assert least <= float(ends.min()) < least + 0.01 and most - 0.01 < float(ends.max()) <= most
        assert float(ends.mean()) == pytest.approx((least + most) / 2, abs=0.01)  # 4 of its standard deviations
    assert float(torch.corrcoef(torch.stack([low, high, sample.cond["guidance"]])).triu(1).abs().max()) < 0.1


def test_other_draws_and_the_recipes_hash_are_those_without_it():
    settings = "teacher.guidance={kind: classifier_free, interval_input: %s}"
    off, on = (read_recipe("digits", [settings % value]) for value in ("false", "true"))
    assert off.hash() == read_recipe("digits", ["teacher.guidance={kind: classifier_free}"]).hash() != on.hash()
    x0 = torch.zeros(5, 1, 2, 3)
    one, other = (draw_sample(recipe, x0, {}, generator_for(0, 1, 0, 5, x0.device)) for recipe in (off, on))
    assert torch.equal(one.xt, other.xt) and torch.equal(one.cond["guidance"], other.cond["guidance"])
    assert INTERVAL not in one.cond and other.cond[INTERVAL].shape == (5, 2)


@pytest.mark.parametrize(
    "net", [DiT(preset="nano", depth=1, patch=1), MLP(width=16), EDM2(channels=8, multipliers=(1, 2), num_blocks=1)]
)
def test_a_student_with_the_teachers_weights_is_the_teacher_whatever_the_interval(net):
    student = replace(CONFIG, net=net, shape=(3, 4, 4))
    teacher = built(replace(student, arrival=False, guidance=None, guidance_interval=None)).flow_map
    flow_map = student.build()
    start_from(flow_map, teacher)
    x, t = draw(5, 3, 4, 4).float(), torch.rand(5)
    cond = {"class": torch.arange(5)}
    expected = teacher.velocity(x, t, cond)
    for interval in ({}, {INTERVAL: torch.rand(5, 2)}):
        assert torch.equal(flow_map.mean_velocity(x, t, t / 2, cond | interval), expected)


def test_a_trained_student_is_guided_in_its_interval_alone():
    """At one time t with closed forms of both velocities: within the interval v - w, outside it v."""
    strong, weak, w = GaussianTeacher(mean=(0.7,), std=0.4), GaussianTeacher(mean=(-0.7,), std=0.4), 2.0
    teacher = IntervalGuidance(Autoguidance(strong, weak), 0.0, 1.0, default=w)
    config = replace(CONFIG, net=MLP(width=32, depth=1), shape=(2,), num_classes=None, guidance_interval=(0.0, 1.0))
    torch.manual_seed(0)
    student = config.build()
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    for step in range(400):
        t, ends = torch.full((64,), 0.5), torch.stack([torch.rand(64) / 2, (1 + torch.rand(64)) / 2], 1)
        ends[::2] = (ends[::2] + torch.tensor([0.55, 0.0])).clamp(max=1)  # half of them do not contain t
        sample = Linear().sample(
            torch.randn(64, 2), torch.randn(64, 2), t, t, {"guidance": torch.full_like(t, w), INTERVAL: ends}
        )
        optimizer.zero_grad()
        FlowMatching()(student, teacher, sample, step).value.backward()
        optimizer.step()
    x, t = torch.zeros(5, 2), torch.full((5,), 0.5)
    for interval, expected in (
        ((0.2, 0.9), w * strong.velocity(x, t) - (w - 1) * weak.velocity(x, t)),
        ((0.8, 0.9), strong.velocity(x, t)),
    ):
        cond = {"guidance": torch.full((5,), w), INTERVAL: torch.tensor([interval]).expand(5, 2)}
        torch.testing.assert_close(student.velocity(x, t, cond).detach(), expected, rtol=0, atol=0.2)


def test_sampling_takes_the_interval_and_by_default_that_of_training(tmp_path):
    save_student(tmp_path, CONFIG, built().flow_map.state_dict(), recipe="name: r\n", card="# r\n")
    student = load_student(tmp_path)
    assert student.config == CONFIG
    whole = student.sample(5, steps=2)
    assert torch.equal(whole, student.sample(5, steps=2, guidance_interval=(0.2, 0.8)))
    narrow = student.sample(5, steps=2, guidance_interval=(0.3, 0.6))
    assert not torch.allclose(whole, narrow)
    rows = torch.tensor([[0.2, 0.8], [0.3, 0.6], [0.2, 0.8], [0.3, 0.6], [0.2, 0.8]])
    each = student.sample(5, steps=2, cond={INTERVAL: rows})
    torch.testing.assert_close(each[::2], whole[::2])
    torch.testing.assert_close(each[1::2], narrow[1::2])


@pytest.mark.parametrize("wrong", [(0.6, 0.3), (-0.1, 0.5), (0.5, 1.1), (0.5,), "wide", (float("nan"), 0.5)])
def test_what_is_no_interval_is_refused(wrong):
    with pytest.raises(ValueError, match="guidance_interval"):
        built().sample(2, guidance_interval=wrong)


def test_what_was_not_trained_on_is_a_warning_and_without_the_input_an_error():
    with pytest.warns(UserWarning, match=r"not within 0\.2\.\.0\.8"):
        built().sample(2, guidance_interval=(0.0, 0.8))
    with pytest.raises(ValueError, match="'guidance_interval' is no condition"):
        built(replace(CONFIG, guidance_interval=None)).sample(2, guidance_interval=(0.2, 0.8))


def test_where_the_input_has_no_place_it_is_refused():
    with pytest.raises(ValueError, match="interval_input: a network of kind edm_adm"):
        replace(CONFIG, net=ADM())
    with pytest.raises(ValueError, match="guidance_interval: .* must be two rising times"):
        replace(CONFIG, guidance_interval=(0.8, 0.2))
    with pytest.raises(ValueError, match="interval of guidance"):
        make_plan(built(), None, None)

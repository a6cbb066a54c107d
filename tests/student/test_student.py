"""A saved student is loaded as it was, samples what its seed says, and refuses what it was not trained for."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import flowmap
from flowmap.nets import MLP, DiT
from flowmap.samplers import Deterministic
from flowmap.student.conditions import codes_of, texts_of
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import load_student, save_student
from flowmap.student.student import Student
from tests.support.coco import Lengths
from tests.support.random_student import random_student
from tests.support.straight_page import straight_student

CONFIG = StudentConfig(
    DiT(preset="nano", depth=1), Deterministic(), (3, 4, 6), num_classes=7, guidance=(1.0, 3.0, 1.5), recipe="r", step=9
)


def built(config=CONFIG) -> Student:
    return random_student(config)


def saved(folder, config=CONFIG) -> Student:
    student = built(config)
    save_student(folder, config, student.flow_map.state_dict(), recipe="name: r\n", card="# r\n")
    return student


@pytest.mark.parametrize(
    "config", [CONFIG, StudentConfig(MLP(width=16), Deterministic(), (2,), samples=Pixels(clamp=False), arrival=False)]
)
def test_a_round_trip_is_exact(tmp_path, config):
    before, after = saved(tmp_path, config), load_student(tmp_path)
    assert after.config == config
    assert torch.equal(before.sample(5, steps=3, seed=1), after.sample(5, steps=3, seed=1))
    assert not any(p.requires_grad for p in after.parameters()) and not after.flow_map.training
    assert load_student(str(tmp_path)).config == config


def test_sampling_is_carrying_its_own_start():
    student, generator = built(), torch.Generator().manual_seed(3)
    start = student.start(5, generator)
    assert torch.equal(
        start.x1[:4], torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    )  # 4: whole sixteens, as torch draws them
    carried = student.carry(start, student.conditions(5, {"class": 2}), 2, generator)
    assert torch.equal(carried, student.sample(5, steps=2, cond={"class": 2}, seed=3))


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_a_sample_is_the_same_whatever_the_batch_and_the_number(gamma):
    student, options = built(), dict(steps=4, cond={"class": 2}, gamma=gamma, seed=3)
    whole = student.sample(10, **options)
    close = dict(rtol=1e-4, atol=1e-5)  # a matrix product's rounding depends on its rows
    for size in (1, 3, 7):
        torch.testing.assert_close(student.sample(10, batch_size=size, **options), whole, **close)
    for num in (1, 2, 5, 9):
        torch.testing.assert_close(student.sample(num, **options), whole[:num], **close)
        assert torch.equal(
            student.start(num, torch.Generator().manual_seed(3)).x1,
            student.start(10, torch.Generator().manual_seed(3)).x1[:num],
        )


def test_half_precision_weights_are_read_as_float32(tmp_path):
    from flowmap.base.files import read_tensors, write_tensors

    saved(tmp_path)
    write_tensors(
        tmp_path / "model.safetensors",
        {k: v.bfloat16() for k, v in read_tensors(tmp_path / "model.safetensors").items()},
    )
    assert {p.dtype for p in load_student(tmp_path).parameters()} == {torch.float32}


def test_a_sample_is_what_its_seed_says():
    student = built()
    x = student.sample(10, steps=2, seed=3)
    assert x.shape == (10, 3, 4, 6) and float(x.abs().max()) <= 1
    assert torch.equal(x, student.sample(10, steps=2, seed=3)) and not torch.equal(
        x, student.sample(10, steps=2, seed=4)
    )
    torch.testing.assert_close(student.sample(10, steps=2, seed=3, batch_size=3), x, rtol=1e-4, atol=1e-5)
    state = torch.random.get_rng_state()
    student.sample(2)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


def test_classes_come_in_turn_and_guidance_has_its_default():
    student = built()
    cond = student.conditions(9)
    assert cond["class"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1] and cond["guidance"].tolist() == [1.5] * 9
    assert torch.equal(
        student.sample(9, seed=1), student.sample(9, cond={"class": [0, 1, 2, 3, 4, 5, 6, 0, 1]}, guidance=1.5, seed=1)
    )
    assert student.conditions(2, {"class": np.array([3, 4])})["class"].tolist() == [3, 4]
    assert student.conditions(2, {"class": -1}, guidance=2)["guidance"].tolist() == [2, 2]
    assert not torch.equal(student.sample(4, guidance=1.0), student.sample(4, guidance=3.0))


def test_the_map_is_the_identity_on_the_diagonal():
    student, x, t = built(), torch.randn(5, 3, 4, 6), torch.rand(5)
    assert torch.equal(student(x, t, t, {"class": torch.arange(5)}), x)
    assert torch.equal(student(x, t, t), x)


def test_progress_counts_the_samples():
    seen = []
    built().sample(10, batch_size=4, progress=seen.append)
    assert seen == [4, 4, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(num=0), "num: 0"),
        (dict(num=10**9), "num"),
        (dict(num=1, steps=0), "steps: 0"),
        (dict(num=1, seed=2**64), "seed"),
        (dict(num=1, gamma=-0.1), "gamma"),
        (dict(num=1, cond={"class": 7}), "class: 7 is not one of 0..6"),
        (dict(num=1, cond={"class": -2}), "class: -2"),
        (dict(num=1, cond={"class": 1.5}), "class: 1.5 is not a whole number"),
        (dict(num=1, cond={"class": "cat"}), "class: 'cat'"),
        (dict(num=3, cond={"class": [1, 2]}), "class: has shape (2,), wants one value or 3"),
        (dict(num=1, cond={"clas": 1}), "'clas' is no condition of this student; allowed: class, guidance"),
        (dict(num=1, guidance=float("nan")), "guidance"),
        (dict(num=1, guidance=-1), "guidance"),
    ],
)
def test_what_it_was_not_trained_for_is_named(arguments, says):
    with pytest.raises(ValueError) as caught:
        built().sample(**arguments)
    assert says in str(caught.value)


def test_guidance_where_there_is_none():
    with pytest.raises(ValueError, match="not trained with a guidance scale"):
        built(replace(CONFIG, guidance=None)).sample(1, guidance=2.0)
    with pytest.raises(ValueError, match="'class' is no condition"):
        built(replace(CONFIG, num_classes=None)).sample(1, cond={"class": 1})


def test_public_names(finished, tmp_path):
    assert flowmap.load_student(finished).sample(3).shape == (3, 2)
    assert [p.name for p in flowmap.sample(finished, tmp_path / "drawn", steps=[2], num=3)] == ["steps-2.png"]
    assert set(flowmap.evaluate(finished, [1])["student"]) == {"1"}
    assert flowmap.read_recipe("digits", ["objective.warmup_steps=500"]).objective.warmup_steps == 500
    with pytest.raises(AttributeError, match="nothing"):
        _ = flowmap.nothing


def test_gamma_keeps_the_grid_of_the_students_sampler():
    from flowmap.samplers import Deterministic, Gamma, asked_for

    assert asked_for(Deterministic(steps=(2,), grid="shifted", shift=3.0, t_max=0.9), gamma=0.3) == Gamma(
        (2,), "shifted", 3.0, t_max=0.9, gamma=0.3
    )


def test_what_a_distilled_student_cannot_honour_is_refused_with_its_reason():
    student = built()
    with pytest.raises(
        ValueError,
        match="negative_prompt: 'blurred' was given, but a distilled student makes one prediction a step"
        ".*sample the teacher",
    ):
        student.sample(2, cond={"negative_prompt": "blurred"})
    plain = Student(replace(student.config, guidance=None), student.flow_map)
    for call in (dict(guidance=2.0), dict(cond={"guidance": 2.0})):
        with pytest.raises(
            ValueError,
            match="guidance: 2.0 was given, but this student was not trained with a guidance scale as input$",
        ):
            plain.sample(2, **call)
    baked = Student(replace(plain.config, baked_guidance=6.0), student.flow_map)
    with pytest.raises(
        ValueError, match="scale as input: 6 is baked in by the pairs that it learned from; leave it out"
    ):
        baked.sample(2, guidance=2.0)


def test_conditions_of_another_kind_are_one_line():
    for call, says in (
        (lambda: codes_of("a", 3, 2), "z: 'a' is no (3, 2) numbers"),
        (lambda: codes_of([[1, 2], [3]], 2, 2), "z: [[1, 2], [3]] is no (2, 2) numbers"),
        (lambda: codes_of(torch.zeros(2, 3), 3, 2), "z: has shape (2, 3), wants (3, 2)"),
        (lambda: texts_of(3, 2, "left"), "left: 3 was given; allowed: one text, or 2 texts"),
        (lambda: texts_of(None, 2, "left"), "left: None was given; allowed: one text, or 2 texts"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            call()
    assert torch.equal(codes_of([[1, 2]], 1, 2), torch.tensor([[1.0, 2.0]]))


def test_many_prompts_are_encoded_in_batches_each_once(monkeypatch):
    student, sizes = straight_student(), []
    student.config = replace(student.config, text=Lengths())
    encode = Lengths.__call__
    monkeypatch.setattr(Lengths, "__call__", lambda self, texts: sizes.append(len(texts)) or encode(self, texts))
    prompts = ["a" * (i + 1) for i in (4, 0, 2, 2, 3, 1, 0, 5)]
    student.sample(8, cond={"prompt": prompts}, batch_size=4)
    assert sizes == [4, 2]
    seen = torch.cat([cond["text"] for cond in student.flow_map.seen])
    assert seen.flatten().tolist() == [float(len(one)) for one in prompts]

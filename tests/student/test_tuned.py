"""Settings for a number of steps: kept in config.json, used where a call does not give them, absent in old files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowmap.base.files import read_json, write_json
from flowmap.export.plan import make_plan
from flowmap.nets import DiT
from flowmap.samplers import Anchored, Deterministic, Gamma
from flowmap.student.config import StudentConfig
from flowmap.student.config_file import config_json, read_config
from flowmap.student.student import Student
from flowmap.student.tuned import Tuned

PLAIN = StudentConfig(
    DiT(preset="nano"), Deterministic(middle=(0.35,)), (1, 8, 8), num_classes=10, guidance=(1.0, 3.0, 2.0)
)
TUNED = (Tuned(1, guidance=2.5), Tuned(2, guidance=1.5, gamma=0.5, middle=(0.6,)))


def student_of(config):
    torch.manual_seed(0)
    flow_map = config.build().eval().requires_grad_(False)
    for p in flow_map.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return Student(config, flow_map)


def test_they_are_kept_in_the_configuration(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, config_json(replace(PLAIN, tuned=TUNED)))
    assert read_json(path)["tuned"]["2"] == {"guidance": 1.5, "gamma": 0.5, "middle": [0.6]}
    assert read_config(path) == replace(PLAIN, tuned=TUNED)


def test_a_configuration_without_them_is_as_before(tmp_path):
    plain = config_json(PLAIN)
    assert "tuned" not in plain
    write_json(tmp_path / "config.json", plain)
    assert read_config(tmp_path / "config.json") == PLAIN


@pytest.mark.parametrize("steps, sampler, guidance", [
    (1, Deterministic(), 2.5), (2, Gamma(gamma=0.5, middle=(0.6,)), 1.5), (4, Deterministic(), 2.0),
])  # fmt: skip
def test_a_call_uses_those_of_its_number_of_steps(steps, sampler, guidance):
    tuned, plain = student_of(replace(PLAIN, tuned=TUNED)), student_of(replace(PLAIN, sampler=sampler))
    assert torch.equal(tuned.sample(5, steps=steps), plain.sample(5, steps=steps, guidance=guidance))


def test_what_a_call_gives_is_used_instead():
    tuned = student_of(replace(PLAIN, tuned=TUNED))
    by_hand = student_of(replace(PLAIN, sampler=Deterministic(middle=(0.6,))))
    assert torch.equal(tuned.sample(5, steps=2, gamma=0.0, guidance=3.0), by_hand.sample(5, steps=2, guidance=3.0))
    assert torch.equal(
        tuned.sample(5, steps=2, solver="heun"), student_of(PLAIN).sample(5, steps=2, solver="heun")
    )  # the student's velocity, for which nothing was tuned
    given = {"guidance": 3.0}
    assert torch.equal(tuned.sample(5, steps=1, cond=given), student_of(PLAIN).sample(5, steps=1, guidance=3.0))


def test_an_export_takes_those_of_its_steps_and_warns_of_others():
    with pytest.warns(UserWarning, match="those tuned for 1 steps are left out"):
        plan = make_plan(student_of(replace(PLAIN, tuned=TUNED)), 2, None)
    assert (plan.gamma, plan.times, plan.guidance) == (0.5, (1.0, 0.6, 0.0), 1.5)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"middle: \(\) must be 1 times"):
        Tuned(2)
    with pytest.raises(ValueError, match="falling times"):
        replace(PLAIN, tuned=(Tuned(3, middle=(0.2, 0.6)),))
    with pytest.raises(ValueError, match="sampler: Anchored cannot be tuned"):
        replace(PLAIN, sampler=Anchored(), tuned=TUNED)
    write_json(tmp_path / "config.json", config_json(PLAIN) | {"tuned": [1]})
    with pytest.raises(ValueError, match=r'config.json: tuned: is not \{"1": '):
        read_config(tmp_path / "config.json")

"""A student's sampler leaves as one torch program, and gives the same samples in a Python without flowmap, for any batch."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.export import export
from flowmap.nets import MLP, DiT
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic, Gamma
from flowmap.student.config import StudentConfig
from tests import parity, tiny_nets
from tests.export.alone import alone, foreign, shaken, snippet

diffusers = pytest.importorskip("diffusers")
STUDENTS = {
    "dit": (4, lambda: shaken(StudentConfig(DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, guidance=(1.0, 3.0, 1.5)))),
    "edm2": (1, lambda: shaken(StudentConfig(EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,)), Gamma(), (3, 8, 8)))),
    "mlp": (2, lambda: shaken(StudentConfig(MLP(width=16, depth=1), Deterministic(middle=(0.6,)), (2,), clamp=False))),
    "table_unet": (1, lambda: foreign(tiny_nets.unet(sample_size=8), diffusers.DDIMScheduler(), (3, 8, 8))),
    "sd3": (1, lambda: foreign(tiny_nets.sd3(), diffusers.FlowMatchEulerDiscreteScheduler(), (4, 8, 8))),
}
SCRIPT = """
import json
for name, code in json.load(open("jobs.json")).items():
    exec(code)
    given = torch.load(name + "-given.pt")
    torch.save([program(noise, cond) for noise, cond in given], name + "-done.pt")
assert "diffusers" not in sys.modules
"""


def rows(student, num):
    generator = torch.Generator().manual_seed(num)
    noise = torch.randn(num, *student.config.shape, generator=generator)
    cond = student.conditions(num, guidance=2.5 if student.config.guidance else None)
    if getattr(student.config.net, "network", "") == "SD3Transformer2DModel":
        cond |= {"text": torch.randn(num, 8, 32, generator=generator), "pooled": torch.randn(num, 24, generator=generator)}
    return noise, cond


def exported(names, at):
    """The folder in which the programs lie, with what another Python was given and what they made of it."""
    jobs = {}
    for name in names:
        steps, make = STUDENTS[name]
        student = make()
        jobs[name] = snippet(export(student, at / name, to="torch", steps=steps))
        torch.save([rows(student, num) for num in ((2, 5) if name == "table_unet" else (1, 2, 70))], at / f"{name}-given.pt")
    (at / "jobs.json").write_text(json.dumps(jobs))
    alone(SCRIPT, at)
    return at


def from_the_student(folder, name):
    """The program's samples against the student's own, the largest over the batch sizes: see parity.relative."""
    steps, make = STUDENTS[name]
    student, worst = make(), 0.0
    for (noise, cond), got in zip(torch.load(folder / f"{name}-given.pt"), torch.load(folder / f"{name}-done.pt"), strict=True):
        wanted = student.config.sampler(student.flow_map, noise, cond, steps=steps)
        worst = max(worst, parity.relative(got, wanted.clamp(-1, 1) if student.config.clamp else wanted))
    return worst


def check(name, folder):
    assert from_the_student(folder, name) < 1e-5
    sizes = "2 to 63" if name == "table_unet" else "any"  # diffusers' up-sampling does otherwise from 64 rows on
    assert f"# batch size: {sizes}\n" in (folder / name / "README.md").read_text()


def test_a_program_gives_the_students_samples(tmp_path):
    folder = exported(["dit", "mlp"], tmp_path)
    check("dit", folder)
    check("mlp", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm2", "table_unet", "sd3"])
def test_the_program_of_a_larger_network_does_too(tmp_path, name):
    check(name, exported([name], tmp_path))


def test_noise_between_steps_is_refused(tmp_path):
    student = shaken(StudentConfig(MLP(width=16), Gamma(), (2,), clamp=False))
    with pytest.raises(ValueError, match="--steps 1"):
        export(student, tmp_path / "out", to="torch", steps=2)
    assert not list(tmp_path.iterdir())

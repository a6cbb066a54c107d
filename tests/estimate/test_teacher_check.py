"""The check of a teacher before training: closed forms of its statistics, its warnings and its refusals.

It draws no other random numbers.
"""

from __future__ import annotations

import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors, write_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.teacher import BuiltTeacher, build_teacher
from flowmap.data import Dataset
from flowmap.estimate.teacher_check import Statistics, check_teacher, look
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.teachers.exact import GaussianTeacher
from flowmap.train.csv_log import read_log


@pytest.fixture
def latents(tmp_path):
    """A recipe of latents N(0, 1) of three channels, whose teacher a test puts in its place."""
    x0 = torch.randn(600, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "x" / "0.safetensors", {"x0": x0})
    (tmp_path / "r.yaml").write_text(
        f"data: {{kind: latents, root: {tmp_path / 'x'}}}\nteacher: {{card: exact}}\nstudent: {{kind: dit, patch: 2}}\n"
        "objective: {kind: ayf_emd}\nsampler: {kind: deterministic, steps: [1]}\n"
    )
    return read_recipe(tmp_path / "r.yaml")


class Scaled:
    """A Gaussian teacher whose channels have these means and standard deviations."""

    def __init__(self, means, stds):
        self.parts = [GaussianTeacher(mean=(mean,), std=std) for mean, std in zip(means, stds, strict=True)]

    def velocity(self, x, t, cond=None):
        return torch.stack(
            [part.velocity(x[:, i].flatten(1), t).view_as(x[:, i]) for i, part in enumerate(self.parts)], 1
        )


class Broken:
    """NaN from t = 0.5 on."""

    def velocity(self, x, t, cond=None):
        return torch.where(torch.as_tensor(t).flatten()[0] > 0.5, 0.0, torch.nan) * x


def said(recipe, teacher, **more):
    lines = []
    logs = check_teacher(recipe, BuiltTeacher(teacher, None), build_data(resolve(recipe)), log=lines.append, **more)
    return lines, logs


def test_the_statistics_are_those_of_each_channel():
    x = torch.stack([torch.full((5, 4, 6), 2.0), torch.full((5, 4, 6), -1.0)], 1)
    x[:, 0, 0, 0] = 0.5
    found = Statistics.of(x, bound=2.0)
    torch.testing.assert_close(found.mean, torch.tensor([2 - 1.5 / 24, -1.0]))
    assert found.saturated == pytest.approx(23 / 48) and float(found.std[1]) == 0
    assert Statistics.of(torch.ones(5, 7), None).mean.shape == (1,)


def test_a_teacher_of_the_data_is_one_line(latents):
    lines, logs = said(latents, Scaled((0, 0, 0), (1, 1, 1)))
    assert (
        len(lines) == 1
        and lines[0].startswith("teacher: 32 samples at 16 steps: mean ")
        and lines[0].count("(data ") == 2
    )
    assert logs["teacher_check/std"] == pytest.approx(1, abs=0.1) and logs["teacher_check/data_std"] == pytest.approx(
        1, abs=0.05
    )
    assert {"teacher_check/mean_2", "teacher_check/data_std_0"} < set(logs) and "teacher_check/saturated" not in logs
    assert said(latents, Scaled((0, 0, 0), (1, 1, 1)))[1] == logs, "a function of the recipe's seed"


@pytest.mark.parametrize(
    ("means", "stds", "says"),
    [
        ((0, 0, 0), (1, 1, 4.0), "its samples' std is 3.* \\(channel 2\\), the data's is"),
        ((0, 0, 0), (1, 0.25, 1), "its samples' std is 0.2.* \\(channel 1\\)"),
        ((3.0, 0, 0), (1, 1, 1), "its samples' mean is 3.* \\(channel 0\\), the data's is"),
    ],
)
def test_a_teacher_of_other_data_is_warned_of_by_channel(latents, means, stds, says):
    lines, _ = said(latents, Scaled(means, stds))
    assert len(lines) == 2 and lines[1].startswith("warning: teacher 'exact': ")
    with pytest.raises(ValueError, match=says):
        raise ValueError(lines[1])


def test_a_velocity_that_is_not_finite_is_refused_with_its_time(latents):
    with pytest.raises(RecipeError, match="its velocity is NaN at t = 0.5 .* nothing was trained"):
        said(latents, Broken())


def test_it_draws_from_generators_of_its_own_and_says_nothing_without_a_teacher(latents):
    before = torch.get_rng_state()
    said(latents, Scaled((0, 0, 0), (1, 1, 1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert check_teacher(latents, None, build_data(resolve(latents)), log=lambda line: pytest.fail(line)) == {}


def test_a_run_is_the_same_with_it_and_without_it(tiny, tmp_path, monkeypatch):
    """The student's weights bit for bit; the log has the figures, and only the log."""
    import flowmap.train.stage as stage_module

    recipe, lines = read_recipe(tiny), []
    flowmap.fit(recipe, tmp_path / "with", log=lines.append)
    monkeypatch.setattr(stage_module, "check_teacher", lambda *a, **k: {})
    flowmap.fit(recipe, tmp_path / "without", log=lambda line: None)
    ours, theirs = (read_tensors(tmp_path / name / "student" / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [line for line in lines if line.startswith("teacher: 32 samples at 4 steps")] and not [
        line for line in lines if "warning" in line
    ]
    rows, plain = (read_log(tmp_path / name / "log.csv") for name in ("with", "without"))
    assert (
        len(rows) == len(plain)
        and {"teacher_check/std", "train/loss"} <= set(rows[0])
        and "teacher_check/std" not in rows[1]
    )


def test_a_resumed_run_is_not_checked_anew(finished, tiny):
    lines = []
    (finished / "metrics.json").unlink()
    flowmap.fit(read_recipe(tiny), finished, resume=True, log=lines.append)
    assert [line for line in lines if line.startswith("resuming at step")]
    assert not [line for line in lines if line.startswith("teacher:")]


def folder_teacher(tmp_path, **scheduler):
    """A recipe whose teacher is a small random UNet with that scheduler, on 8 x 8 grey digits."""
    diffusers = pytest.importorskip("diffusers")
    from tests.support.tiny_nets import with_random_weights

    torch.manual_seed(0)
    net = with_random_weights(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ), scale=0.1,
    )  # fmt: skip
    diffusers.DDPMPipeline(
        net, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **scheduler)
    ).save_pretrained(tmp_path / "pipe")
    (tmp_path / "card.yaml").write_text(f"kind: diffusers\nsource: {tmp_path / 'pipe'}\nshape: [1, 8, 8]\n")
    teacher = f"teacher={{card: {tmp_path / 'card.yaml'}}}"
    return read_recipe(
        "digits", [teacher, "data.conditional=false", "teacher.guidance=null", "metrics=[]", "log.wandb=false"]
    )


def test_an_unclipped_ddpm_teacher_is_told_by_its_spread(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    recipe = folder_teacher(tmp_path, clip_sample=False)
    data = build_data(resolve(recipe))
    found = look(recipe, build_teacher(resolve(recipe), data), data, device="cpu")
    assert float(found.teacher.std.max()) > 10 and any(
        "its samples' std is" in line and "prediction_type" in line for line in found.warnings
    )
    clipped = replace(folder_teacher(tmp_path, clip_sample=True))
    found = look(clipped, build_teacher(resolve(clipped), data), data, device="cpu")
    assert float(found.teacher.std.max()) < 1.1 and found.teacher.saturated is not None


def test_conditions_guidance_and_the_end_of_an_odd_data_set_are_handed_over():
    """Every condition that training hands to the teacher, one row for each of the few samples that there are."""
    seen = []

    class Spy:
        def velocity(self, x, t, cond=None):
            seen.append((len(x), {key: len(value) for key, value in (cond or {}).items()}, float(cond["guidance"][0])))
            return 0 * x

    recipe = read_recipe("digits")
    data = Dataset("few", torch.zeros(5, 1, 8, 8), torch.zeros(0, 1, 8, 8), torch.arange(5), num_classes=10)
    look(recipe, BuiltTeacher(Spy(), None), data, device="cpu")
    assert set(map(str, seen)) == {str((5, {"class": 5, "guidance": 5}, 1.5))} and len(seen) == 16


def test_a_warning_of_guidance_that_cannot_be_known_is_said_too(latents):
    recipe = read_recipe("digits", ["teacher.card=edm-cifar10", "teacher.guidance={kind: classifier_free}"])
    lines = []
    data = Dataset(
        "few", torch.randn(40, 1, 8, 8).clamp(-1, 1), torch.zeros(0, 1, 8, 8), torch.zeros(40).long(), num_classes=10
    )
    check_teacher(recipe, BuiltTeacher(GaussianTeacher(std=0.6), None), data, log=lines.append)
    assert "classifier_free asks 'edm-cifar10' without a class" in lines[-1] and lines[-1].startswith("warning: ")

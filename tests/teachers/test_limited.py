"""A diffusers teacher honours clip_sample and thresholding: our Euler steps equal diffusers' clipped samples.

Twins: diffusers' DDIMScheduler (with the noise that belongs to the clipped data, `use_clipped_model_output`) and
DDPMScheduler's means.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.build.teacher import build_teacher
from flowmap.flow.limit import Clip, Threshold, limited
from flowmap.plan.plan import resolve
from tests.support import parity
from tests.support.tiny_nets import unet, with_random_weights

diffusers = pytest.importorskip("diffusers")
B, STEPS = 3, 8
COSINE = {
    "beta_schedule": "squaredcos_cap_v2"
}  # its end has almost no signal: a prediction of noise makes data 20,000 times as large
RECIPE = """
data: {{kind: encoded, root: {root}/none, images: {{kind: folder, root: {root}/none, size: 16}}}}
teacher: {{card: {root}/card.yaml}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd}}
"""


def folder_of(root, scheduler):
    """A DDPMPipeline with a small random UNet, a card for it and a recipe that names the card."""
    torch.manual_seed(0)
    net = with_random_weights(unet(), scale=0.1).eval()
    diffusers.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(root / "pipe")
    (root / "card.yaml").write_text(f"kind: diffusers\nsource: {root / 'pipe'}\nshape: [3, 16, 16]\n")
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    return net, root / "recipe.yaml"


def grid_of(scheduler):
    """The scheduler's times on our clock, and its states' sizes: a state is ours times a + b."""
    bars = [float(scheduler.alphas_cumprod[k]) for k in scheduler.timesteps] + [1.0]
    sizes = [bar**0.5 + (1 - bar) ** 0.5 for bar in bars]
    return [(1 - bar) ** 0.5 / size for bar, size in zip(bars, sizes, strict=True)], sizes


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "limit",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.4},
        {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9},
        {"thresholding": True, "clip_sample": True, "clip_sample_range": 0.4},
    ],
)
@torch.no_grad()
def test_euler_on_the_schedulers_grid_is_the_limited_scheduler(limit, kind, tmp_path):
    scheduler = diffusers.DDIMScheduler(
        **{"clip_sample": False, **COSINE, **limit}, prediction_type=kind, timestep_spacing="trailing"
    )
    net, path = folder_of(tmp_path, scheduler)
    velocity = build_teacher(resolve(flowmap.read_recipe(path))).guided.velocity
    scheduler.set_timesteps(STEPS)
    grid, sizes = grid_of(scheduler)
    state = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x = state / sizes[0]
    for i, time in enumerate(scheduler.timesteps):
        state = scheduler.step(net(state, time).sample, time, state, use_clipped_model_output=True).prev_sample
        x = x + (grid[i + 1] - grid[i]) * velocity(x, torch.full((B,), grid[i]))
        assert parity.relative(x * sizes[i + 1], state) < 1e-4  # float32, at signals of 1e-4
    assert float(x.std()) < 1.1, "without a limit it is 20 and more"


@torch.no_grad()
def test_a_ddpm_step_with_clip_sample_has_our_clipped_data_for_its_mean(tmp_path):
    scheduler = diffusers.DDPMScheduler(**COSINE)  # clip_sample is its default
    net, path = folder_of(tmp_path, scheduler)
    velocity = build_teacher(resolve(flowmap.read_recipe(path))).guided.velocity
    scheduler.set_timesteps(1000)
    state = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for k in (999, 700, 300, 20):
        bar = float(scheduler.alphas_cumprod[k])
        size = bar**0.5 + (1 - bar) ** 0.5
        t = torch.full((B,), (1 - bar) ** 0.5 / size)
        theirs = scheduler.step(
            net(state, torch.tensor(k)).sample, k, state, generator=torch.Generator().manual_seed(0)
        ).pred_original_sample
        x = state / size
        ours = x - t.view(-1, 1, 1, 1) * velocity(x, t)
        assert parity.relative(ours, theirs) < 1e-5 and float(ours.abs().max()) < 1 + 1e-5


def test_guidance_comes_before_the_limit_and_the_students_start_has_none(tmp_path):
    """As in the pipelines: guidance before the scheduler; the network that a student starts from is not clipped."""
    from flowmap.teachers.limited import Limited

    _, path = folder_of(tmp_path, diffusers.DDIMScheduler(**COSINE))
    teacher = build_teacher(
        resolve(
            flowmap.read_recipe(
                path, ["teacher.guidance={kind: autoguidance, weak: " + str(tmp_path / "card.yaml") + "}"]
            )
        )
    )
    assert isinstance(teacher.guided, Limited) and not isinstance(teacher.guided.teacher, Limited)
    assert teacher.calls_per_step == 2
    x, t = 3 * torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.full((B,), 0.9)
    network = teacher.network.flow_map.velocity(x, t, None)
    assert not torch.allclose(network, teacher.guided.velocity(x, t, {}))


def test_a_limit_that_changes_nothing_leaves_the_velocity_as_it_is():
    x, t = (
        torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(2)).clamp(-1, 1),
        torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]),
    )
    v = torch.zeros_like(x)
    for limit in (Clip(1.0), Threshold(0.995, 1.0)):
        assert torch.equal(limited(v, x, t, limit), v)
    far = limited(v, 3 + x, t, Clip(1.0), first=0.01)
    assert far.isfinite().all()
    torch.testing.assert_close((3 + x)[2:] - t[2:].view(-1, 1, 1, 1) * far[2:], torch.ones_like(x[2:]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Clip(0.0), "clip_sample_range: 0.0"),
        (lambda: Threshold(2.0), "ratio: 2.0"),
        (lambda: Threshold(0.9, 0.5), "0.5"),
    ],
)
def test_limits_that_are_none(make, says):
    with pytest.raises(ValueError, match=says):
        make()

"""A ControlNet beside a one-step student: the export is loaded in the stock pipeline with a control net."""

from __future__ import annotations

import pytest
import torch

from flowmap.export import export
from flowmap.flow.clock import velocity_of
from flowmap.nets.teacher_settings import clock_of
from tests.export.alone import foreign
from tests.support.tiny_nets import HEADS, POOLED, TEXT, kl, sd3

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """controlled(scale, steps) -> (samples with the control net at that strength, without it, of the student itself).

    The control net has random weights, with the zero layers at its end that training starts from if scale is None.
    """
    folder = tmp_path_factory.mktemp("controlnet")
    student = foreign(sd3(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (4, 8, 8))
    exported = {steps: export(student, folder / f"sd3-{steps}", steps=steps, guidance=2.0) for steps in (1, 2)}
    torch.manual_seed(0)
    vae = kl()
    seeded = torch.Generator().manual_seed(3)
    noise, text, pooled = (torch.randn(2, *shape, generator=seeded) for shape in ((4, 8, 8), (5, TEXT), (POOLED,)))
    side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    picture = torch.rand(2, 3, side, side, generator=seeded)

    def draw(scale, steps):
        torch.manual_seed(1)
        net = diffusers.SD3ControlNetModel(
            **HEADS, sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=TEXT,
            caption_projection_dim=32, pooled_projection_dim=POOLED, out_channels=4, extra_conditioning_channels=0,
        )  # fmt: skip
        for block in net.controlnet_blocks if scale is not None else ():
            torch.nn.init.normal_(block.weight)
        empty = dict.fromkeys(
            ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
        )
        call = dict(
            prompt_embeds=text, pooled_prompt_embeds=pooled, latents=noise.clone(), num_inference_steps=steps,
            guidance_scale=1.0, height=side, width=side, output_type="latent",
        )  # fmt: skip
        plain = diffusers.StableDiffusion3Pipeline.from_pretrained(exported[steps], vae=vae, **empty)
        stock = diffusers.StableDiffusion3ControlNetPipeline.from_pretrained(
            exported[steps], vae=vae, controlnet=net, **empty
        )
        with_control = stock(**call, control_image=picture, controlnet_conditioning_scale=scale or 1.0).images
        rows = {"text": text, "pooled": pooled, "guidance": torch.full((2,), 2.0)}
        return with_control, plain(**call).images, student.config.sampler(student.flow_map, noise, rows, steps=steps)

    return draw


@pytest.mark.parametrize("steps", [1, 2])
def test_a_control_net_that_is_not_trained_changes_nothing(controlled, steps):
    controlled_samples, plain, own = controlled(None, steps)
    assert torch.equal(controlled_samples, plain)
    torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-4)  # float32, as of the export itself


def test_a_control_net_is_heard_and_its_strength_scales_it(controlled):
    full, plain, _ = controlled(1.0, 1)
    weak = controlled(1e-3, 1)[0]
    assert float((full - plain).norm() / plain.norm()) > 0.05
    assert 0 < float((weak - plain).norm()) < 0.05 * float((full - plain).norm())


def test_a_jump_on_a_ddpm_table_is_no_step_of_ddim():
    """Why a student of SD 1.5 has no stock pipeline, so none with a control net either (docs/guide/export.md)."""
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    clock, kind = clock_of(scheduler)
    x1, eps = torch.randn(2, 3, 4, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jump = x1 - velocity_of(lambda state, time: eps, clock, x1, torch.ones(3, dtype=torch.float64), kind)
    a, b = scheduler.alphas_cumprod[-1].double().sqrt(), (1 - scheduler.alphas_cumprod[-1].double()).sqrt()
    torch.testing.assert_close(jump, ((2 * a + b) * x1 - (a + b) * eps) / a)
    assert float((jump - (x1 - b * eps) / a).abs().max()) > 0.1

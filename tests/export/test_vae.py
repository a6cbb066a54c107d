"""An exported autoencoder decodes in a pipeline as the student does: closed forms of the folded weights."""

from __future__ import annotations

import pytest
import torch

from flowmap.export.plan import Export
from flowmap.export.vae import exported_vae
from flowmap.samplers import Deterministic
from flowmap.student.config import ImageLatents, StudentConfig
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import Autoencoder, FrozenAutoencoder

diffusers = pytest.importorskip("diffusers")
from flowmap.nets import MLP  # noqa: E402
from tests.support.tiny_nets import dc, kl  # noqa: E402

SHIFT, SCALE = (0.1, -0.2, 0.3, 0.0), (0.5, 0.7, 1.3, 0.9)


def plan_of(model, shift, scale, unit=False) -> Export:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    config = StudentConfig(
        MLP(width=8, depth=1),
        Deterministic(),
        (4, 3, 5),
        samples=ImageLatents(Autoencoder(source="nowhere", unit=unit)),
    )
    student = Student(config, config.build())
    student.__dict__["autoencoder"] = FrozenAutoencoder(model, shift, scale, unit, {})
    return Export(student, 1, None)


def without_convolutions():
    config = dict(kl().config) | {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL.from_config(config)


@pytest.mark.parametrize("make", [kl, without_convolutions])
@pytest.mark.parametrize(
    "shift, scale", [(SHIFT, SCALE), ((0.2,), SCALE), (SHIFT, (0.6,)), ((0.2,), (0.6,)), ((0.0,), (0.6,))]
)
def test_decoding_and_encoding_are_the_students(make, shift, scale, tmp_path):
    plan = plan_of(make(), shift, scale)
    exported_vae(plan).save_pretrained(tmp_path)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path)  # the configuration says what the weights are
    frozen, config = plan.autoencoder(), vae.config
    z, x = torch.randn(2, 4, 3, 5), torch.rand(2, 3, 6, 10) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample,
            frozen.decode(z),
            rtol=1e-4,
            atol=1e-4,
        )
        theirs, ours = vae.encode(x).latent_dist, frozen.model.encode(x).latent_dist
        latents = (theirs.mode() - (config.shift_factor or 0)) * config.scaling_factor
        torch.testing.assert_close(latents, frozen.encode(x), rtol=1e-4, atol=1e-4)
        spread = ours.std * torch.tensor(scale).view(-1, 1, 1)
        torch.testing.assert_close(theirs.std * config.scaling_factor, spread, rtol=1e-4, atol=1e-5)
    by_channel = len(shift) + len(scale) > 2
    assert (config.scaling_factor == 1) == by_channel
    again = Autoencoder(source=str(tmp_path)).load()  # as an autoencoder of ours it normalises as before
    torch.testing.assert_close(again.decode(z), frozen.decode(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [kl, dc])
def test_pictures_on_the_unit_interval_come_out_signed(make):
    plan = plan_of(make(), (0.0,), (0.5,), unit=True)
    vae, before, z = exported_vae(plan), plan.autoencoder().model, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, 2 * before.decode(z).sample - 1, rtol=1e-4, atol=1e-4)
        assert plan.autoencoder().model is before and torch.equal(
            before.encoder.conv_in.weight, vae.encoder.conv_in.weight
        )


@pytest.mark.parametrize(
    "make, shift, scale, unit, words",
    [
        (dc, SHIFT, (1.0,), False, "by channel of latents fits neither the weights of AutoencoderDC"),
        (dc, (0.5,), (1.0,), False, "a shift of latents .* --custom"),
        (lambda: torch.nn.Linear(2, 2), (0.0,), SCALE, False, "by channel .* Linear"),
        (diffusers.AutoencoderTiny, (0.0,), (1.0,), True, "AutoencoderTiny has no last layer"),
    ],
)
def test_what_cannot_be_said_is_refused_in_one_line(make, shift, scale, unit, words):
    with pytest.raises(ValueError, match=words) as error:
        exported_vae(plan_of(make(), shift, scale, unit), shifts=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unit", [False, True])
def test_a_program_decodes_alike(unit):
    from flowmap.export.program import SamplerProgram

    plan, z = plan_of(kl(), SHIFT, SCALE, unit), torch.randn(2, 4, 4, 4)
    program = SamplerProgram(plan)
    program.sampler = lambda flow_map, noise, cond, steps: noise
    pictures = plan.autoencoder().decode(z)
    torch.testing.assert_close(program(z, {}), pictures.clamp(-1, 1), rtol=1e-4, atol=1e-4)

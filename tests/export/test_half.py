"""Exported pipelines in half precision give nearly the samples of float32, for all networks and autoencoders."""

from __future__ import annotations

import pytest
import torch

from flowmap.export import export
from flowmap.nets import DiT
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic
from flowmap.student.config import ImageLatents, StudentConfig
from flowmap.teachers.autoencoder import Autoencoder, FrozenAutoencoder
from tests.export.alone import foreign, own_modules, shaken
from tests.support import tiny_nets

diffusers = pytest.importorskip("diffusers")
KIN = {"samples": ImageLatents(Autoencoder(source="nowhere"))}
#       the student, its autoencoder, and the shift and scale of its latents
STUDENTS = {
    "dit, kl": (
        lambda: shaken(StudentConfig(DiT(preset="nano", depth=1), Deterministic(), (4, 8, 8), num_classes=3, **KIN)),
        "kl",
        (0.2,),
        (0.6,),
    ),
    "edm2, dc": (
        lambda: shaken(
            StudentConfig(
                EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,)),
                Deterministic(),
                (4, 8, 8),
                **KIN,
            )
        ),
        "dc",
        (0.0,),
        (0.5,),
    ),
    "foreign dit, kl by channel": (
        lambda: foreign(tiny_nets.dit(), diffusers.DDIMScheduler(clip_sample=False), (4, 8, 8), num_classes=10, **KIN),
        "kl",
        (0.1, -0.2, 0.3, 0.0),
        (0.5, 0.7, 1.3, 0.9),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The exported folder of every student."""
    at, found = tmp_path_factory.mktemp("half"), {}
    for name, (make, kind, shift, scale) in STUDENTS.items():
        student = make()
        torch.manual_seed(0)
        model = tiny_nets.with_random_weights(getattr(tiny_nets, kind)(), 0.2)
        student.__dict__["autoencoder"] = FrozenAutoencoder(model, shift, scale, False, {})
        found[name] = (student, export(student, at / name.replace(", ", "-").replace(" ", "-"), custom=True))
    return found


def drawn(folder, dtype, **more):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=dtype)
    kinds = {part.dtype for part in (pipe.flow_map, pipe.vae)}
    assert kinds == {dtype}
    call = dict(num_images=3, num_inference_steps=2, output_type="pt") | more
    pictures = pipe(generator=torch.Generator().manual_seed(7), **call).images
    assert {part.dtype for part in (pipe.flow_map, pipe.vae)} == kinds
    return pipe, pictures


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(folders, tmp_path, monkeypatch, name, dtype):
    own_modules(monkeypatch, tmp_path)
    student, folder = folders[name]
    pipe, pictures = drawn(folder, dtype)
    wanted = (student.sample(3, steps=2, seed=7) + 1) / 2
    assert pictures.shape == wanted.shape and pictures.dtype == torch.float32 and wanted.std() > 0.05
    assert float((pictures - wanted).abs().mean()) < 0.02, "bfloat16 has 8 bits, and two networks follow one another"
    latents = torch.randn(3, 4, 8, 8).to(dtype)
    assert pipe(latents=latents, num_inference_steps=1, output_type="pil").images[0].size == tuple(wanted.shape[:1:-1])


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32(folders, tmp_path, monkeypatch):
    own_modules(monkeypatch, tmp_path)
    pipe, _ = drawn(folders["dit, kl"][1], torch.float16)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    pipe.vae.register_to_config(force_upcast=True)
    pipe()
    pipe.vae.register_to_config(force_upcast=False)
    pipe()
    assert seen == [torch.float32, torch.float16] and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("name", ["num_inference_steps", "num_images"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_number_that_is_none_is_not_the_default(folders, tmp_path, monkeypatch, name, value):
    own_modules(monkeypatch, tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders["dit, kl"][1], trust_remote_code=True)
    with pytest.raises(ValueError, match=f"{name}: {value} must be a whole number from 1"):
        pipe(**{name: value})

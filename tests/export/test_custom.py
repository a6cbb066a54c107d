"""A student without a stock pipeline is exported with custom code and gives the same samples without flowmap."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.export import export
from flowmap.flow.clock import SMALL_UNIT
from flowmap.nets import MLP, DiT
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic, Gamma
from flowmap.student.config import Pixels, StudentConfig
from tests.export.alone import alone, foreign, own_modules, shaken, snippet
from tests.support import parity, tiny_nets

diffusers = pytest.importorskip("diffusers")
SCALES = (1.0, 3.0, 1.5)
DDIM = diffusers.DDIMScheduler(clip_sample=False)
STUDENTS = {
    "dit": lambda: shaken(
        StudentConfig(DiT(preset="nano"), Deterministic(), (1, 8, 8), num_classes=10, guidance=SCALES)
    ),
    "edm2": lambda: shaken(
        StudentConfig(
            EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,)),
            Deterministic(middle=(0.6,)),
            (3, 8, 8),
            num_classes=5,
        )
    ),
    "edm2_of_t": lambda: shaken(
        StudentConfig(
            EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,), time_embedding="t"),
            Deterministic(),
            (3, 8, 8),
            num_classes=5,
        )
    ),
    "mlp": lambda: shaken(
        StudentConfig(MLP(width=16, depth=1), Deterministic(grid="rho", t_max=0.95), (2,), samples=Pixels(clamp=False))
    ),
    "table_dit": lambda: foreign(
        tiny_nets.dit(channels=3), DDIM, (3, 8, 8), Gamma(gamma=0.4), num_classes=10, samples=Pixels()
    ),
    "table_unet_of_t": lambda: foreign(
        tiny_nets.unet(), DDIM, (3, 16, 16), Deterministic(), samples=Pixels(), time_unit=SMALL_UNIT
    ),
    "table_unet": lambda: foreign(
        tiny_nets.unet(), DDIM, (3, 16, 16), Deterministic(grid="shifted", shift=2.0), samples=Pixels()
    ),
}
ROWS = [(name, steps) for name in STUDENTS for steps in (1, 2, 4)]
SCRIPT = """
import json
from diffusers import DiffusionPipeline
done = {}
for name in json.load(open("names.json")):
    where = {} if name == "dit" else {"custom_pipeline": name if name == "edm2" else name + "/pipeline.py"}
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **where)
    for steps in (1, 2, 4):
        seed = torch.Generator().manual_seed(7)
        done[name, steps] = pipe(num_images=5, num_inference_steps=steps, generator=seed, output_type="pt").images
    if name == "dit":
        call = dict(num_images=5, class_labels=3, guidance_scale=2.5, num_inference_steps=2, output_type="pt")
        done["asked"] = pipe(generator=torch.Generator().manual_seed(7), **call).images
        done["pil"] = pipe(num_images=2, generator=torch.Generator().manual_seed(7)).images[1]
        done["gamma"] = pipe(generator=torch.Generator().manual_seed(7), gamma=0.5, **call).images
        half = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, torch_dtype=torch.bfloat16)
        done["half"] = half(generator=torch.Generator().manual_seed(7), **call).images
    exec(json.load(open("names.json"))[name])
import numpy as np
done["pil"] = torch.from_numpy(np.array(done["pil"]))
torch.save(done, "done.pt")
"""


def exported(at):
    """What another Python sampled from the exports of every student, and the folder `at` that they lie in."""
    names = {name: snippet(export(make(), at / name)) for name, make in STUDENTS.items()}
    (at / "names.json").write_text(json.dumps(names))
    alone(SCRIPT, at)
    return {"folder": at, **torch.load(at / "done.pt")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("custom"))


def from_the_student(done, name, steps):
    """The exported samples against the student's own: see parity.relative."""
    wanted = STUDENTS[name]().sample(5, steps=steps, seed=7)
    return parity.relative(done[name, steps], wanted if name == "mlp" else (wanted.clamp(-1, 1) + 1) / 2)


@pytest.mark.parametrize("name, steps", ROWS)
def test_the_pipeline_gives_the_students_samples(done, name, steps):
    assert from_the_student(done, name, steps) < 1e-4


def test_what_a_call_asks_for_is_what_it_gets(done):
    student = STUDENTS["dit"]()
    call = dict(steps=2, cond={"class": 3}, guidance=2.5, seed=7)
    torch.testing.assert_close(done["asked"], (student.sample(5, **call) + 1) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done["gamma"], (student.sample(5, gamma=0.5, **call) + 1) / 2, rtol=1e-4, atol=1e-4)
    assert float((done["asked"] - done["gamma"]).abs().max()) > 1e-2
    assert 0 < float((done["asked"] - done["half"]).abs().max()) < 0.1, "bfloat16 weights sample too"
    picture = ((student.sample(2, steps=4, seed=7)[1, 0] + 1) * 127.5).round()
    assert done["pil"].shape == (8, 8) and float((done["pil"] - picture).abs().max()) <= 1


def test_the_code_stands_alone(done):
    for path in done["folder"].glob("*/**/*.py"):
        if "modules" not in path.parts:
            text = path.read_text()
            assert (
                "import flowmap" not in text
                and "from flowmap" not in text
                and "Generated from the source of flowmap" in text
            ), path
    assert (
        not list(done["folder"].rglob("*.bin"))
        and (done["folder"] / "dit" / "flow_map" / "diffusion_pytorch_model.safetensors").is_file()
    )


def test_custom_is_possible_where_a_stock_pipeline_exists(tmp_path, monkeypatch):
    own_modules(monkeypatch, tmp_path)
    student = foreign(
        tiny_nets.sd3(), diffusers.FlowMatchEulerDiscreteScheduler(), (4, 8, 8), Deterministic(middle=(0.7,))
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        export(student, tmp_path / "out", custom=True), trust_remote_code=True
    )
    noise, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 24)
    for steps in (1, 2):
        cond = {"text": text, "pooled": pooled, "guidance": torch.full((2,), 2.0)}
        wanted = student.config.sampler(student.flow_map, noise, cond, steps=steps)
        call = dict(prompt_embeds=text, pooled_prompt_embeds=pooled, num_inference_steps=steps, output_type="latent")
        torch.testing.assert_close(pipe(latents=noise, **call).images, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call, words",
    [
        ({"class_labels": 10}, "0..9"),
        ({"output_type": "jpg"}, "pil, np, pt, latent"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "latents"),
        ({"num_inference_steps": -1}, "steps"),
    ],
)
def test_mistakes_are_named(call, words):
    from flowmap.export.custom_model import FlowMapModel
    from flowmap.export.custom_pipeline import FlowMapPipeline

    network = type("FlowMapModel", (FlowMapModel,), {"network": DiT})({"preset": "nano"}, [1, 8, 8], 10)
    pipe = FlowMapPipeline(network, diffusers.FlowMapEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=words):
        pipe(**call)
    with pytest.raises(ValueError, match="no input"):
        pipe(guidance_scale=2.0)

"""A diffusers flow network, exported as a stock pipeline, gives the student's samples without flowmap."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowmap.export import export
from flowmap.export.plan import make_plan
from flowmap.export.stock import FAMILIES, check_grid
from flowmap.flow.clock import SMALL_UNIT
from flowmap.nets.diffusers_calls import pack, unpack
from flowmap.samplers import Deterministic, Gamma
from flowmap.student.config import ImageLatents
from tests.export.alone import alone, foreign, own_modules, snippet
from tests.support import parity
from tests.support.tiny_nets import (
    aura_flow,
    flux,
    flux2,
    hunyuan_image,
    kl,
    kl_flux2,
    kl_qwen,
    lumina2,
    qwen,
    sana,
    sd3,
    z_image,
)

diffusers = pytest.importorskip("diffusers")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@dataclass
class Frozen:
    model: object
    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    model: object
    steps: tuple[int, ...]
    packed: bool = False
    noise: str | None = None  # what the pipeline is given, if that is not what it returns
    returns: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # samples as the pipeline returns them
    vae: Callable[[], object] | None = None
    any_steps: bool = False  # whether the export is for another number of steps
    shape: tuple[int, ...] = (4, 8, 8)
    time_unit: float | None = None


CASES = {
    "sd3": Case(sd3, (1, 2, 4)),
    "sd3_of_t": Case(sd3, (2,), time_unit=SMALL_UNIT),
    "sana": Case(sana, (1, 4)),
    "flux": Case(flux, (1, 4), packed=True),
    "flux_dev": Case(lambda: flux(guidance_embeds=True), (2,), packed=True),
    "qwen": Case(qwen, (4,), packed=True),
    "z_image": Case(z_image, (1, 4)),
    "flux2": Case(
        lambda: flux2(channels=16),
        (1, 4),
        noise="patched",
        returns=lambda x: denormalised(x),
        vae=kl_flux2,
        shape=(16, 4, 4),
    ),
    "hunyuan_image": Case(hunyuan_image, (1, 4), any_steps=True),
    "lumina2": Case(lumina2, (2,)),
    "aura_flow": Case(aura_flow, (1, 4)),
    "flux2_dev": Case(lambda: flux2(guidance_embeds=True), (2,), returns=lambda x: x.flatten(2).transpose(1, 2)),
}
ROWS = [(name, steps) for name, case in CASES.items() for steps in case.steps]
SCRIPT = """
import json, pathlib
given = torch.load("given.pt")
prompt_embeds, pooled_prompt_embeds = given["text"], given["pooled"]
prompt_attention_mask = prompt_embeds_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long)
for job in json.load(open("jobs.json")):
    noise = given[job["noise"]]
    exec(job["code"].replace("num_inference_steps", "latents=noise, num_inference_steps"))
    assert type(pipe).__module__.startswith("diffusers.pipelines."), type(pipe)
    torch.save(images, job["out"])
"""


def exported(at):
    """The folder `at` with exports of every case, their inputs, and the samples of another Python."""
    noise, generator = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(2),
    )
    text, pooled = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 24, generator=generator)
    jobs = []
    for name, steps in ROWS:
        case = CASES[name]
        out = export(student_of(name), at / f"{name}-{steps}", steps=3 if case.any_steps else steps, guidance=2.5)
        given = case.noise or ("packed" if case.packed else "noise")
        code = snippet(out) if case.vae is None else snippet(out).replace("num_inf", 'output_type="latent", num_inf')
        code = code.replace("num_inference_steps=3", f"num_inference_steps={steps}")
        jobs.append({"code": code, "noise": given, "out": f"{out}.pt"})
    noises = {"noise": noise, "packed": pack(noise), "patched": pixel_unshuffle(noise, 2)}
    torch.save({**noises, "text": text, "pooled": pooled}, at / "given.pt")
    (at / "jobs.json").write_text(json.dumps(jobs))
    alone(SCRIPT, at)
    return at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("stock"))


def student_of(name, **more):
    case = CASES[name]
    student = foreign(case.model(), FLOW, case.shape, time_unit=case.time_unit, **more)
    if case.vae is not None:
        object.__setattr__(student.config, "samples", ImageLatents("kl"))
        student.autoencoder = running(case.vae)
    return student


def running(make) -> Frozen:
    """FLUX.2's autoencoder with the shift and scale in its weights."""
    torch.manual_seed(3)
    vae = make().eval()
    return Frozen(vae, tuple(vae.bn.running_mean.tolist()), tuple((vae.bn.running_var + 1e-4).rsqrt().tolist()))


def denormalised(x):
    """Latents as klein's pipeline returns them: those of its autoencoder."""
    frozen = running(kl_flux2)
    return pixel_shuffle(x / torch.tensor(frozen.scale).view(-1, 1, 1) + torch.tensor(frozen.shift).view(-1, 1, 1), 2)


def samples_of(folder, name, steps, guidance=2.5):
    """The student's own samples of what the export was given."""
    student, given = student_of(name), torch.load(folder / "given.pt")
    cond = {"text": given["text"], "pooled": given["pooled"], "guidance": torch.full((2,), guidance)}
    if name in ("sana", "qwen", "hunyuan_image", "lumina2"):
        cond["text_mask"] = torch.ones(2, 5, dtype=torch.long)
    return student.config.sampler(student.flow_map, given[CASES[name].noise or "noise"], cond, steps=steps)


def from_the_student(folder, name, steps):
    """The exported samples against the student's own: see parity.relative."""
    got, case = torch.load(folder / f"{name}-{steps}.pt"), CASES[name]
    return parity.relative(unpack(got, 4, 4) if case.packed else got, case.returns(samples_of(folder, name, steps)))


@pytest.mark.parametrize("name, steps", ROWS)
def test_the_stock_pipeline_gives_the_students_samples(folder, name, steps):
    assert from_the_student(folder, name, steps) < 1e-4
    off = parity.relative(samples_of(folder, name, steps, guidance=1.0), samples_of(folder, name, steps))
    assert off > 1e-2, "the scale matters, so it was folded"


def test_the_folder_is_stock(folder):
    index = json.loads((folder / "sd3-4" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and index["transformer"] == [
        "diffusers",
        "SD3Transformer2DModel",
    ]
    assert not list((folder / "sd3-4").rglob("*.py")) and not list((folder / "sd3-4").rglob("*.bin"))
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")], "nothing half-made is left"
    note = json.loads((folder / "sd3-4" / "flowmap_export.json").read_text())
    assert note["steps"] == 4 and note["guidance"] == 2.5
    assert "4 steps, guidance scale 2.5: folded" in (folder / "sd3-4" / "README.md").read_text()


@pytest.mark.parametrize(
    "sampler, steps", [(Deterministic(middle=(0.7,)), 2), (Deterministic(grid="shifted", shift=3.0), 4), (Gamma(), 2)]
)
def test_an_uneven_grid_is_refused_in_one_line(tmp_path, sampler, steps):
    student = student_of("sd3", sampler=sampler)
    with pytest.raises(ValueError, match="--custom") as error:
        export(student, tmp_path / "out", steps=steps)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_is_even_all_the_same_is_not_refused():
    for sampler, steps in [
        (Deterministic(middle=(0.7,)), 4),
        (Deterministic(grid="shifted", shift=3.0), 1),
        (Gamma(), 1),
    ]:
        check_grid(make_plan(student_of("sd3", sampler=sampler), steps, None))


def test_the_autoencoder_goes_along_and_decodes_alike(tmp_path, monkeypatch):
    own_modules(monkeypatch, tmp_path)
    torch.manual_seed(0)
    vae = kl().eval()
    student, frozen = student_of("sd3"), Frozen(vae, (0.25,), (1.5,))
    object.__setattr__(student.config, "samples", ImageLatents("kl"))
    student.autoencoder = frozen
    z, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 24)
    wanted = vae.decode(
        student.config.sampler(
            student.flow_map, z, {"text": text, "pooled": pooled, "guidance": torch.full((2,), 2.0)}, steps=2
        )
        / 1.5
        + 0.25
    )[0]
    for custom, call in ((False, {"height": 16, "width": 16, "guidance_scale": 1.0}), (True, {})):
        out = export(student, tmp_path / f"out{custom}", steps=2, custom=custom)
        missing = {} if custom else dict.fromkeys(FAMILIES["SD3Transformer2DModel"].empty)
        pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=custom, **missing)
        got = pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, latents=z, num_inference_steps=2, output_type="pt", **call
        ).images
        torch.testing.assert_close(got, (wanted / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_qwen_image_decodes_one_frame_of_its_autoencoder_of_videos(tmp_path):
    torch.manual_seed(0)
    vae, student = kl_qwen().eval(), student_of("qwen")
    shift, scale = tuple(vae.config.latents_mean), tuple(1 / std for std in vae.config.latents_std)
    object.__setattr__(student.config, "samples", ImageLatents("kl"))
    student.autoencoder = Frozen(vae, shift, scale)
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    cond = {"text": text, "text_mask": torch.ones(2, 5, dtype=torch.long), "guidance": torch.full((2,), 2.0)}
    channels = lambda values: torch.tensor(values).view(-1, 1, 1)
    latents = student.config.sampler(student.flow_map, z, cond, steps=2) / channels(scale) + channels(shift)
    with torch.no_grad():
        wanted = vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)
    out = export(student, tmp_path / "out", steps=2)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, text_encoder=None, tokenizer=None)
    side = dict(height=32, width=32, true_cfg_scale=1.0, output_type="pt", num_inference_steps=2)
    got = pipe(prompt_embeds=text, prompt_embeds_mask=cond["text_mask"], latents=pack(z), **side).images
    torch.testing.assert_close(got, (wanted / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="^autoencoder: AutoencoderKLQwenImage: its latents are those of videos"):
        export(student, tmp_path / "custom", steps=2, custom=True)
    student.autoencoder = Frozen(vae, (0.0,), scale)
    with pytest.raises(ValueError, match="knows no other shift and scale"):
        export(student, tmp_path / "shifted", steps=2)
    student.autoencoder = Frozen(kl().eval(), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="decodes with an autoencoder for video, which AutoencoderKL is not"):
        export(student, tmp_path / "of pictures", steps=2)


def test_a_shift_of_latents_is_refused_where_the_pipeline_knows_none(tmp_path):
    student = student_of("sana")
    object.__setattr__(student.config, "samples", ImageLatents("kl"))
    student.autoencoder = Frozen(torch.nn.Identity(), (0.5,), (1.0,))
    with pytest.raises(ValueError, match="a shift of latents .* --custom"):
        export(student, tmp_path / "out")


def test_another_kind_of_sampler_is_refused():
    student = student_of("sd3")
    student.config = replace(student.config, sampler=object())
    with pytest.raises(ValueError, match="deterministic, gamma"):
        make_plan(student, None, None)

"""Exports with text encoders and autoencoders, merged or as adapters: the card's code gives the student's images.

It runs in a Python without flowmap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from flowmap.base.files import read_tensors
from flowmap.export import export
from flowmap.export.lora import WEIGHTS
from flowmap.nets.diffusers_calls import pack
from flowmap.nets.lora import Base, LoRA, fingerprint
from flowmap.nets.pretrained import load_pretrained
from flowmap.samplers import Deterministic
from flowmap.student.config import ImageLatents, Pixels, StudentConfig
from flowmap.student.student import Student
from flowmap.teachers.autoencoder import Autoencoder
from flowmap.teachers.text import PipelineText, Sentence
from tests.export.alone import alone, own_modules, snippet

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from tests.support import tiny_pipelines  # noqa: E402

PROMPT, SCALE = "a blue cat", 2.5
EVERY = ("to_q", "to_k", "to_v", "to_out.0")
#        targets of the adapters, shape of latents
LORAS = {
    "sd3": (EVERY, (4, 8, 8)),
    "flux": ((*EVERY, "timestep_embedder.linear_2"), (4, 8, 8)),
    "sana": (EVERY, (4, 16, 16)),
    "sd": ((*EVERY, "conv1", "time_emb_proj"), (4, 8, 8)),
    "sd3-without-t5": (EVERY, (4, 8, 8)),
    "z_image": ((*EVERY, "w1"), (4, 8, 8)),
    "flux2": ((*EVERY, "to_qkv_mlp_proj"), (16, 4, 4)),
    "hunyuan_image": (EVERY, (4, 8, 8)),
    "lumina2": (EVERY, (4, 8, 8)),
    "aura_flow": (EVERY, (4, 8, 8)),
    "qwen_image": (EVERY, (4, 8, 8)),
}
EFFECTS = {  # the effect of another prompt
    "z_image": 2e-4, "flux2": 1e-3, "hunyuan_image": 2e-4, "lumina2": 1e-3, "aura_flow": 1e-3, "qwen_image": 2e-4,
}  # fmt: skip
PACKED = ("flux", "qwen_image")  # pipelines that take their noise as tokens
TOKENS = {"sd": None, "lumina2": 50}  # of a prompt, where they are not 16


@dataclass(frozen=True)
class Case:
    """A student's name, how it is exported, and what is asked of it."""

    student: str
    to: str = "diffusers"
    steps: int = 2
    custom: bool = False
    effect: float = 1e-3  # the least of another prompt or guidance scale


CASES = {
    **{f"sd3-lora-{steps}": Case("sd3", "lora", steps) for steps in (1, 2, 4)},
    "flux-lora": Case("flux", "lora"),
    "sana-lora": Case("sana", "lora", 4),
    "sd3-merged": Case("sd3"),
    "flux-merged": Case("flux"),
    "sana-merged": Case("sana"),
    "sd3-custom": Case("sd3", custom=True),
    "sd-merged": Case("sd"),
    **{f"{name}-lora": Case(name, "lora", effect=effect) for name, effect in EFFECTS.items()},
    **{f"{name}-merged": Case(name, effect=effect) for name, effect in EFFECTS.items()},
    "sentence": Case("sentence", steps=4),
    "sentence-custom": Case("sentence", custom=True),
    "sentence-lora": Case("sentence-lora", "lora"),
    "without-t5-custom": Case("sd3-without-t5", custom=True),
}
assert {case.student for case in CASES.values()} >= set(LORAS)
SCRIPT = """
import json, warnings
given = torch.load("given.pt")
for job in json.load(open("jobs.json")):
    noise = given[job["noise"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on layers without a bias
        exec(job["code"].replace("num_inference_steps", 'latents=noise, output_type="pt", num_inference_steps'))
    torch.save(images, job["out"])
    if job["out"].endswith("sd3-lora-2.pt"):
        call = dict(latents=noise, output_type="pt", num_inference_steps=2, guidance_scale=1.0)
        call |= dict(height=16, width=16, max_sequence_length=16)
        pipe.fuse_lora()
        torch.save(pipe(prompt="a blue cat", **call).images, "fused.pt")
        pipe.unfuse_lora()
        torch.nn.init.zeros_(pipe.transformer.time_text_embed.timestep_embedder.linear_2.lora_B["default_0"].bias)
        torch.save(pipe(prompt="a blue cat", **call).images, "no_bias.pt")
"""


def saved(family: str, folder):
    """The tiny pipeline, latents shifted in the families whose published autoencoders shift them."""
    tiny_pipelines.save(family.removesuffix("-without-t5"), folder)
    if family.endswith("-without-t5"):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None]))
        )
    if family in ("sd3", "flux"):
        config = json.loads((folder / "vae" / "config.json").read_text())
        (folder / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    return folder


def whole(family: str, root, **more) -> StudentConfig:
    """A student's settings for that tiny pipeline, whose own autoencoder and text encoders it uses."""
    source = root / family if (root / family).exists() else saved(family, root / family)
    spec, net = load_pretrained(str(source))
    base = Base(str(source), None, fingerprint(net.model))
    text = PipelineText(source=str(source), max_tokens=TOKENS.get(family, 16))
    settings = {
        "samples": ImageLatents(Autoencoder(source=str(source))),
        "text": text,
        "lora": LoRA(3, 5.0, LORAS[family][0]),
        "base": base,
    }
    return StudentConfig(spec, Deterministic(), LORAS[family][1], guidance=(1.0, 3.0, 2.0), **{**settings, **more})


def drawn(config: StudentConfig) -> Student:
    """The student with random numbers in all that is trained."""
    torch.manual_seed(1)
    flow_map = config.build(load_pretrained(config.base.source)[1] if config.lora else None).eval()
    for name, parameter in flow_map.named_parameters():
        if config.lora is None or parameter.requires_grad:
            std = 0.05 if config.lora is None and name.startswith("net.model.") else 0.3
            parameter.data = parameter.detach() + std * torch.randn_like(parameter)
    return Student(config, flow_map.requires_grad_(False))


def sentence_student(root) -> Student:
    """No LoRA, prompts through a small BERT, an autoencoder on [0, 1] with a shift and scale per channel."""
    import transformers

    torch.manual_seed(2)
    width = 2 * tiny_pipelines.TEXT_WIDTH
    settings = transformers.BertConfig(
        vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(settings).save_pretrained(root / "bert")
    tiny_pipelines.tokenizer().save_pretrained(root / "bert")
    autoencoder = Autoencoder(
        source=str(root / "sd3"), unit=True, shift=(0.1, -0.2, 0.3, 0.0), scale=(0.5, 0.7, 1.3, 0.9)
    )
    return drawn(
        whole(
            "sd3",
            root,
            lora=None,
            base=None,
            text=Sentence(str(root / "bert"), max_tokens=8),
            samples=ImageLatents(autoencoder),
        )
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(students, folder of all exports, with the images that another Python sampled by the cards' code)."""
    at = tmp_path_factory.mktemp("prompts")
    students = {family: drawn(whole(family, at)) for family in LORAS} | {"sentence": sentence_student(at)}
    students["sentence-lora"] = drawn(whole("sd3", at, text=students["sentence"].config.text))
    jobs, given = [], {}
    for name, student in students.items():
        noise = torch.randn(1, *student.config.shape, generator=torch.Generator().manual_seed(7))
        given |= {name: noise, f"{name}-packed": pack(noise)}
    for name, case in CASES.items():
        out = export(
            students[case.student], at / name, to=case.to, steps=case.steps, guidance=SCALE, custom=case.custom
        )
        code = snippet(out).replace("path/to/the/base/pipeline", str(at / case.student.replace("sentence-lora", "sd3")))
        assert "not_here" not in code or case.student == "sentence", "nothing is passed by hand"
        jobs.append({"code": code, "noise": case.student + "-packed" * (case.student in PACKED), "out": f"{out}.pt"})
    torch.save(given, at / "given.pt")
    (at / "jobs.json").write_text(json.dumps(jobs))
    alone(SCRIPT, at)
    return students, at


def wanted(students, name, prompt=PROMPT, guidance=SCALE) -> torch.Tensor:
    case = CASES[name]
    return (
        students[case.student].sample(1, steps=case.steps, cond={"prompt": prompt}, guidance=guidance, seed=7) + 1
    ) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_gives_the_students_pictures(done, name):
    students, at = done
    got, expected = torch.load(at / f"{name}.pt"), wanted(students, name)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for other in ({"prompt": "the red dog"}, {"guidance": 1.0}):
        assert (wanted(students, name, **other) - expected).abs().max() > CASES[name].effect, "it matters"


@pytest.mark.slow
def test_fused_it_is_the_same_and_without_its_bias_the_pictures_are_others(done):
    students, at = done
    got, expected = torch.load(at / "no_bias.pt"), wanted(students, "sd3-lora-2")
    assert (got - expected).abs().max() > 5e-3
    torch.testing.assert_close(torch.load(at / "fused.pt"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts", [("sd3-merged", 6), ("flux-merged", 4), ("sana-merged", 2), ("sd-merged", 2), ("sentence-custom", 2)]
)
def test_the_text_encoders_lie_in_the_folder(done, name, parts):
    folder = done[1] / name
    index = json.loads((folder / "model_index.json").read_text())
    named = {
        key
        for key, value in index.items()
        if key.startswith(("text_encoder", "tokenizer")) and value[0] == "transformers"
    }
    assert (
        named == {path.name for path in folder.iterdir() if path.name.startswith(("text_encoder", "tokenizer"))}
        and len(named) == parts
    )
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt")]


@pytest.mark.slow
def test_a_lora_folder_is_small_and_diffusers_own(done):
    students, at = done
    assert sorted(path.name for path in (at / "sd3-lora-2").iterdir()) == ["README.md", "flowmap_export.json", WEIGHTS]
    weights, rank = read_tensors(at / "sd3-lora-2" / WEIGHTS), students["sd3"].config.lora.rank
    assert all(key.startswith("transformer.") and ("lora_A" in key or "lora_B" in key) for key in weights)
    assert {value.shape[0] for key, value in weights.items() if "lora_A" in key} == {rank}, (
        "one rank: no loader has to tell layers apart"
    )
    loud = [key for key, value in weights.items() if key.endswith(".bias") and value.any()]
    assert loud == ["transformer.time_text_embed.timestep_embedder.linear_2.lora_B.bias"]
    card = (at / "sana-lora" / "README.md").read_text()
    assert "folded into the adapter" in card and "cannot be fused" in card and "pipeline_tag: text-to-image" in card
    assert "cannot be fused" not in (at / "sd3-lora-2" / "README.md").read_text()


@pytest.mark.slow
def test_without_text_the_encoders_stay_out(done, tmp_path):
    for custom in (False, True):
        out = export(done[0]["sentence"], tmp_path / str(custom), steps=1, text=False, custom=custom)
        assert (
            not list(out.glob("text_encoder*"))
            and "prompt_embeds=prompt_embeds" in snippet(out)
            and "AutoTokenizer" not in snippet(out)
        )
    assert "Text encoders are not in this folder" in (tmp_path / "False" / "README.md").read_text()


@pytest.mark.slow
def test_encoders_of_another_pipeline_stay_out_of_a_stock_folder(done, tmp_path):
    students = done[0]
    other = Student(
        replace(students["sentence"].config, text=students["flux"].config.text), students["sentence"].flow_map
    )
    other.autoencoder = students["sentence"].autoencoder
    out = export(other, tmp_path / "stock", steps=1)
    assert not list(out.glob("text_encoder*")) and "prompt_embeds=prompt_embeds" in snippet(out)
    assert "takes them on [0, 1]" in (out / "README.md").read_text(), (
        "said of the autoencoder's encoder, which is as it was"
    )
    assert len(list(export(other, tmp_path / "custom", steps=1, custom=True).glob("text_encoder*"))) == 2


@pytest.mark.slow
def test_the_card_of_a_hubs_base_says_its_name_and_revision(done, tmp_path):
    sd3 = done[0]["sd3"]
    config = replace(sd3.config, base=Base("owner/model", "v1"), text=None, samples=Pixels(clamp=False))
    card = (export(Student(config, sd3.flow_map), tmp_path / "out", to="lora") / "README.md").read_text()
    assert (
        'from_pretrained("owner/model", revision="v1")' in card
        and "base_model: owner/model\nbase_model_relation: adapter" in card
    )
    assert (
        "tags: [flowmap, few-step, lora]" in card
        and "prompt_embeds=prompt_embeds" in card
        and 'output_type="latent"' in card
    )


@pytest.mark.slow
def test_a_pipeline_of_ours_takes_one_prompt_or_one_for_each_image(done, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    students, at = done
    own_modules(monkeypatch, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(at / "sd3-custom", trust_remote_code=True)
    prompts = ["the red dog", PROMPT, PROMPT]
    for prompt, more in ((prompts, {}), (PROMPT, {"num_images": 3})):
        got = pipe(
            prompt=prompt,
            guidance_scale=SCALE,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
            **more,
        )
        expected = students["sd3"].sample(3, steps=2, cond={"prompt": prompt}, guidance=SCALE, seed=7)
        torch.testing.assert_close(got.images, (expected + 1) / 2, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one text, or 3 texts"):
        pipe(prompt=prompts[:2], num_images=3)
    bare = DiffusionPipeline.from_pretrained(
        export(students["sentence"], tmp_path / "bare", custom=True, text=False), trust_remote_code=True
    )
    with pytest.raises(ValueError, match="no text encoder"):
        bare(prompt=PROMPT)


@pytest.mark.parametrize(
    "student, options, words",
    [
        ("sd", {"to": "lora"}, "--to diffusers --custom"),
        ("sentence", {"to": "lora"}, "no LoRA student"),
        ("other", {"to": "lora"}, "decodes latents otherwise"),
        ("uneven", {"to": "lora", "steps": 2}, "--custom"),
    ],
)
@pytest.mark.slow
def test_what_no_lora_can_be_is_refused_in_one_line(done, tmp_path, student, options, words):
    students = done[0]
    sd3 = students["sd3"]
    changed = {
        "other": {"samples": ImageLatents(replace(sd3.config.autoencoder, scale=(0.7,)))},
        "uneven": {"sampler": Deterministic(middle=(0.7,))},
    }
    made = Student(replace(sd3.config, **changed[student]), sd3.flow_map) if student in changed else students[student]
    with pytest.raises(ValueError, match=words) as error:
        export(made, tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())

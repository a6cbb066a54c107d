"""A student's sampler, exported as a torch program, gives the same samples without flowmap, for any batch."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.export import export
from flowmap.export.plan import make_plan
from flowmap.export.program import MASKED, example_conditions
from flowmap.nets import MLP, DiT
from flowmap.nets.diffusers_text import WIDTHS
from flowmap.nets.edm2 import EDM2
from flowmap.samplers import Deterministic, Gamma
from flowmap.student.config import Pixels, StudentConfig
from tests.export.alone import alone, foreign, shaken, snippet
from tests.support import parity, tiny_nets

diffusers = pytest.importorskip("diffusers")
TODAY = ("z_image", "flux2", "hunyuan_image", "lumina2", "aura_flow")


def flowing(name):
    return lambda: foreign(getattr(tiny_nets, name)(), diffusers.FlowMatchEulerDiscreteScheduler(), (4, 8, 8))


STUDENTS = {
    "dit": (
        4,
        lambda: shaken(
            StudentConfig(
                DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, guidance=(1.0, 3.0, 1.5)
            )
        ),
    ),
    "edm2": (
        1,
        lambda: shaken(
            StudentConfig(EDM2(channels=16, multipliers=(1, 2), num_blocks=1, attention_at=(4,)), Gamma(), (3, 8, 8))
        ),
    ),
    "mlp": (
        2,
        lambda: shaken(
            StudentConfig(MLP(width=16, depth=1), Deterministic(middle=(0.6,)), (2,), samples=Pixels(clamp=False))
        ),
    ),
    "table_unet": (1, lambda: foreign(tiny_nets.unet(sample_size=8), diffusers.DDIMScheduler(), (3, 8, 8))),
    **{name: (1, flowing(name)) for name in ("sd3", *TODAY)},
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
    network = getattr(student.config.net, "network", "")
    if network in WIDTHS:
        cond |= {
            "text": torch.randn(num, 7 + num, 32, generator=generator),
            "pooled": torch.randn(num, 24, generator=generator),
            "text_mask": torch.arange(7 + num).expand(num, -1) < 6,
        }
    unread = {"pooled"} - set(WIDTHS.get(network, {})) | (set() if network in MASKED else {"text_mask"})
    return noise, {key: value for key, value in cond.items() if key not in unread}


def exported(names, at):
    """The folder in which the programs lie, with what another Python was given and what they made of it."""
    jobs = {}
    for name in names:
        steps, make = STUDENTS[name]
        student = make()
        jobs[name] = snippet(export(student, at / name, to="torch", steps=steps))
        torch.save(
            [rows(student, num) for num in ((1, 5, 63) if name == "table_unet" else (1, 2, 70))],
            at / f"{name}-given.pt",
        )
    (at / "jobs.json").write_text(json.dumps(jobs))
    alone(SCRIPT, at)
    return at


def from_the_student(folder, name):
    """The program's samples against the student's own, the largest over the batch sizes: see parity.relative."""
    steps, make = STUDENTS[name]
    student, worst = make(), 0.0
    for (noise, cond), got in zip(
        torch.load(folder / f"{name}-given.pt"), torch.load(folder / f"{name}-done.pt"), strict=True
    ):
        wanted = student.config.sampler(student.flow_map, noise, cond, steps=steps)
        worst = max(worst, parity.relative(got, wanted.clamp(-1, 1) if student.config.clamp else wanted))
    return worst


def check(name, folder):
    assert from_the_student(folder, name) < 1e-5
    sizes = "1 to 63" if name == "table_unet" else "any"  # diffusers' up-sampling does otherwise from 64 rows on
    sizes += "; tokens: any" * (name in ("sd3", *TODAY))
    assert f"# batch size: {sizes}\n" in (folder / name / "README.md").read_text()


@pytest.mark.slow
def test_a_program_gives_the_students_samples(tmp_path):
    folder = exported(["dit", "mlp"], tmp_path)
    check("dit", folder)
    check("mlp", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm2", "table_unet", "sd3", *TODAY])
def test_the_program_of_a_larger_network_does_too(tmp_path, name):
    check(name, exported([name], tmp_path))


def test_noise_between_steps_is_refused(tmp_path):
    student = shaken(StudentConfig(MLP(width=16), Gamma(), (2,), samples=Pixels(clamp=False)))
    with pytest.raises(ValueError, match="--steps 1"):
        export(student, tmp_path / "out", to="torch", steps=2)
    assert not list(tmp_path.iterdir())


FAMILIES = {
    "pixart": "any; tokens: any",
    "sd3": "any; tokens: any",
    "sd": "1 to 63; tokens: any",
    "qwen": "any; tokens: exactly 16",
}


def with_sentences(family, folder, tokens):
    """A student of that network whose prompts go through a small BERT, padded to `tokens`."""
    transformers = pytest.importorskip("transformers")
    from flowmap.teachers.text import Sentence
    from tests.support import tiny_pipelines

    pooled = {"sd3": {"pooled": 32}}.get(family, {})
    torch.manual_seed(2)
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(bert).save_pretrained(folder)
    tiny_pipelines.tokenizer().save_pretrained(folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if family in ("sd3", "qwen") else diffusers.DDIMScheduler()
    student = foreign(
        getattr(tiny_nets, family)(**pooled), scheduler, (4, 8, 8), text=Sentence(str(folder), max_tokens=tokens)
    )
    return student


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_takes_what_the_students_own_text_encoder_gives(tmp_path, family):
    student = with_sentences(family, tmp_path / "bert", 16)
    folder = export(student, tmp_path / "out", to="torch", steps=1)
    card = (folder / "README.md").read_text()
    assert f"# batch size: {FAMILIES[family]}\n" in card
    exec(snippet(folder), names := {})
    assert names["images"].shape == (3, 4, 8, 8), "the card's own lines run"
    for num in (1, 3, 5):
        cond = student.conditions(num, {"prompt": ["a blue cat", "a dog", "cat", "", "two cats"][:num]})
        noise = torch.randn(num, 4, 8, 8)
        wanted = student.config.sampler(student.flow_map, noise, cond, steps=1)
        assert cond["text"].shape[1] == 16 and parity.relative(names["program"](noise, cond), wanted) < 1e-5
    if family == "pixart":
        longer = with_sentences(family, tmp_path / "bert", 28).conditions(2, {"prompt": "a cat"})
        assert names["program"](torch.randn(2, 4, 8, 8), longer).shape == (2, 4, 8, 8), "of any number of tokens"


@pytest.mark.parametrize("text", [True, False])
def test_where_its_text_encoder_is_not_at_hand_a_student_still_leaves_and_the_card_says_so(tmp_path, text):
    student = with_sentences("pixart", tmp_path / "bert", 16)
    (tmp_path / "bert" / "model.safetensors").unlink()
    cond, note = example_conditions(make_plan(student, 1, None, text=text))
    assert (
        cond["text"].shape == (3, 16, 32)
        and cond["text_mask"].dtype == torch.bool
        and cond["text_mask"].shape == (3, 16)
    )
    assert ("Its text encoder could not be loaded" in note) == text

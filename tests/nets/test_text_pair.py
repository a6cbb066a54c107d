"""A text autoencoder of real transformers classes (BERT, GPT-2) at tiny size with random weights."""

from __future__ import annotations

import json

import pytest
import torch

import flowmap
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.data.text.tokens import Pair
from flowmap.estimate.dry_run import dry_run
from flowmap.nets.text_pair import TextPair, _positions
from flowmap.recipe import read_recipe
from tests.support.tiny_text import wordnet_files


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from flowmap.data.text.tokens import BPE

    folder, texts = tmp_path_factory.mktemp("models"), ["to say cat and dog", "fox again as n"]
    ends = {"bert": dict(pad_token="<pad>", sep_token="<end>"), "gpt2": dict(eos_token="<end>", bos_token="<start>")}
    for (name, names), vocab in zip(ends.items(), (270, 280), strict=True):
        PreTrainedTokenizerFast(tokenizer_object=BPE(vocab=vocab).fit(texts).fast, **names).save_pretrained(
            folder / name
        )
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=275,
        max_position_embeddings=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(bert).save_pretrained(folder / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=284, n_positions=32, n_embd=24, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    return folder


@pytest.fixture
def net(models):
    torch.manual_seed(1)
    spec = TextPair(
        encoder=str(models / "bert"),
        decoder=str(models / "gpt2"),
        slots=2,
        dims=3,
        special=(2, 1, 2, 3),
        encoder_tokens=5,
    )
    return spec.build((12,)).double().train()


def rows():
    found = torch.randint(4, 270, (5, 12), generator=torch.Generator().manual_seed(0))
    for row, (seen, said) in zip(found, ((3, 6), (4, 2), (1, 1), (5, 7), (2, 4)), strict=True):
        row[seen:5], row[5 + said :] = 0, 2
    return found


def test_the_decoder_is_causal_and_sees_the_latent(net):
    z = net.moments(rows())[0].detach().requires_grad_(True)
    said, targets = net.logits(z, rows())
    changed = rows()
    changed[0, 5 + 3] = 11
    moved = (said - net.logits(z, changed)[0]).abs().amax(-1)
    assert float(moved[0, :4].detach().max()) < 1e-12 and float(moved[0, 4:].detach().min()) > 0
    assert (targets != -100).sum(1).tolist() == [7, 3, 2, 7, 5]
    said[0, 0].sum().backward()
    assert (z.grad[0] != 0).all() and float(z.grad[1:].abs().max()) == 0


def test_generating_is_the_likeliest_next_token(net):
    z = torch.randn(5, 3, 1, 2, dtype=torch.float64)
    found = net.generate(z)
    said, targets = net.logits(z, torch.cat([rows()[:, :5], found], 1))
    assert torch.equal(said.argmax(-1)[targets != -100], found[targets != -100])


def test_what_is_frozen_stays_frozen_and_nothing_is_dropped(net):
    assert not any(p.requires_grad for p in net.encoder.parameters()) and all(
        p.requires_grad for p in net.decoder.parameters()
    )
    torch.testing.assert_close(net.moments(rows())[0], net.moments(rows())[0])


def pair_recipe(folder, models, max_tokens=12, **tokenizer):
    """The path of a recipe of both models; tokenizer: other folders for its two parts."""
    wordnet_files(folder / "wordnet")
    pair, words = (
        {name: str(models / one) for name, one in parts.items()}
        for parts in ({"encoder": "bert", "decoder": "gpt2"}, tokenizer)
    )
    tokens = {"kind": "pair", **pair, **words, "max_tokens": max_tokens}
    (folder / "pair.yaml").write_text(f"""
name: pair
data: {{kind: text, sentences: {{kind: wordnet, root: {folder / "wordnet"}}}, tokenizer: {json.dumps(tokens)},
  held_out: 0.2, batch_size: 8, conditional: false}}
student: {json.dumps({"kind": "text_pair", **pair, "dims": 4})}
objective: {{kind: text_elbo, word_dropout: 0.2}}
trainer: {{steps: 3, accelerator: cpu}}
log: {{wandb: false, grid_images: 3}}
""")
    return folder / "pair.yaml"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder": "gpt2", "decoder": "bert"}, "encoder: has 275 tokens, its tokenizer (data.tokenizer.encoder) 280"),
        (
            {"max_tokens": 32},
            "decoder: has 32 positions, 1 of them the latent's: data.tokenizer.max_tokens: 32 must be 31 or less",
        ),
        ({"max_tokens": 100}, "encoder: has 40 positions: data.tokenizer.max_tokens: 100 must be 40 or less"),
        ({"encoder": "nothing"}, "data.tokenizer.encoder: '"),
        ({"decoder": "nothing"}, "data.tokenizer.decoder: '"),
        ({"max_tokens": 1}, "max_tokens: 1 must be 2 or more"),
    ],
)
def test_tokenizers_that_do_not_fit_their_models_are_one_line(models, tmp_path, command, change, says):
    recipe = pair_recipe(tmp_path, models, **change)
    code, _, err = command("fit", "--recipe", recipe, "--out", tmp_path / "run")
    assert (
        code == 2
        and says in err
        and len(err.strip().splitlines()[-1:]) == 1
        and not (tmp_path / "run" / "student").exists()
    ), err
    code, out, err = command("fit", "--recipe", recipe, "--out", tmp_path / "run", "--dry-run")
    assert says in out + err and code == (3 if says in out else 2), (out, err)


def test_positions_of_a_model_that_counts_from_behind_its_padding():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=10,
    )
    model, tokens = RobertaModel(config), torch.full((1, 9), 5)
    assert _positions(model) == 8
    model(input_ids=tokens[:, :8])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens)


def test_a_sentence_too_long_for_either_model_is_counted(models):
    tokens = Pair(encoder=str(models / "bert"), decoder=str(models / "gpt2"), max_tokens=6).fit([])
    assert tokens.encode(["to", "to say cat and dog, a fox"])[1] == 1 and tokens.longest == 6
    tokens.encoder.max_tokens = 3
    assert [len(one.ids) for one in tokens.encoder.fast.encode_batch(["a", "a b"])] == [1, 3] and tokens.encode(
        ["a", "a b"]
    )[1] == 1


def test_from_a_recipe_to_a_folder_that_stands_alone(models, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    pair_recipe(tmp_path, models)
    assert "nothing is missing" in "".join(dry_run(read_recipe(tmp_path / "pair.yaml"), None, throughput=200.0))
    run = flowmap.fit(read_recipe(tmp_path / "pair.yaml"), log=lambda message: None)
    coder = TextAutoencoder(source=str(run.folder)).load()
    z = coder.encode(["cat again as n", "to say"])
    config = run.folder / "student" / "config.json"
    config.write_text(config.read_text().replace(str(models), "nowhere"))
    again = TextAutoencoder(source=str(run.folder)).load()
    assert (
        z.shape == (2, 4) and torch.equal(again.encode(["cat again as n", "to say"]), z) and len(again.decode(z)) == 2
    )
    with pytest.raises(ValueError, match="kind pair is for a student of kind text_pair"):
        flowmap.fit(
            read_recipe(tmp_path / "pair.yaml", ["student={kind: text_vae, width: 8, heads: 2}", "name=b"]),
            log=lambda message: None,
        )


def test_models_that_are_not_there(models):
    spec = TextPair(
        encoder=str(models / "nothing"), decoder=str(models / "gpt2"), special=(2, 1, 2, 3), encoder_tokens=5
    )
    with pytest.raises(ValueError, match="encoder: "):
        spec.build((12,))

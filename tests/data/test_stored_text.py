"""Captions in the place of text embeddings, and embeddings without their padding: what training reads is the same."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch

from flowmap.build.data import build_data
from flowmap.data import StepBatches
from flowmap.data.encoded import CAPTIONS
from flowmap.data.live_text import LiveText
from flowmap.plan.plan import resolve
from flowmap.prepare.encode import encode
from flowmap.recipe import read_recipe
from flowmap.teachers.text import PipelineText, pipeline_rows
from flowmap.train.loading import loader_of
from tests.support import tiny_nets
from tests.support.encoding import Letters, spec
from tests.support.tiny_pipelines import save

pytest.importorskip("datasets")


@pytest.fixture
def built(tmp_path):
    """built(stored_text) -> the finished encoding, opened."""

    def build(stored: str):
        folder = tmp_path / stored
        encode(spec(stored_text=stored), folder, batch_size=3)
        return spec(folder, stored_text=stored).build()

    return build


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_padding(cond):
    return {**cond, "text": cond["text"] * cond["text_mask"].unsqueeze(-1)}


@pytest.mark.parametrize(("stored", "expected"), [("captions", dict), ("trimmed", without_padding)])
def test_training_and_metrics_read_the_same(built, stored, expected):
    padded, other = built("padded"), built(stored)
    rows = [5, 0, 17, 5]
    (x0, cond), (theirs, wanted) = other.__getitems__(rows), padded.__getitems__(rows)
    assert torch.equal(x0, theirs) and same(cond, expected(wanted)) and cond["text"].dtype == torch.float32
    places = torch.tensor([3, 1])
    assert same(other.conditions_at(places), expected(padded.conditions_at(places)))
    assert same(other.held_out_samples()[1], expected(padded.held_out_samples()[1]))
    assert same(other.held_out_conditions_at(places[1:]), expected(padded.held_out_conditions_at(places[1:])))
    assert same(other.reference_conditions_at(places), expected(padded.reference_conditions_at(places)))
    assert same(other.empty, expected(padded.empty))
    for one in (padded, other):
        assert one.captions_at(places, held_out=False) == padded.captions_at(places, held_out=False)
        texts = one.captions_at(places[1:], held_out=True)
        assert one.held_out_conditions_at(places[1:])["pooled"].flatten().tolist() == [float(len(t)) for t in texts]
    for name, row in padded.example_conditions().items():
        assert other.example_conditions()[name].shape == row.shape and row.shape[0] == 1


def test_captions_store_no_embeddings_and_trimmed_ones_fewer_numbers(built):
    padded, trimmed, captions = (built(stored) for stored in ("padded", "trimmed", "captions"))
    assert not [name for name in captions.index["columns"] if name.startswith("cond_")]
    tokens = int(padded.conditions_at(torch.arange(len(padded)))["text_mask"].sum())
    column = trimmed._table.data.column("cond_text")
    stored = sum(len(row) for row in column.to_pylist())
    out = int(padded.held_out_samples()[1]["text_mask"].sum())
    assert stored == 2 * (tokens + out) < 2 * 5 * len(trimmed._table)


def test_workers_read_captions_and_the_training_process_encodes_them(built):
    padded, captions = built("padded"), built("captions")
    stored = captions.stored_batch([1, 3])[1]
    assert stored.keys() == {"class", CAPTIONS} and all(isinstance(caption, str) for caption in stored[CAPTIONS])
    for workers in (0, 2):
        batches = StepBatches(len(captions), 4, seed=1, num_steps=3)
        recipe = read_recipe("digits", [f"trainer.workers={workers}"])
        for step, (x0, cond) in enumerate(loader_of(recipe, captions, batches, torch.device("cpu"))):
            theirs, wanted = padded.__getitems__(batches.indices(step))
            assert (
                torch.equal(x0.float(), theirs) and x0.dtype == torch.float16 and same(captions.complete(cond), wanted)
            )


def test_an_encoding_is_of_one_way_to_store_text(built, tmp_path):
    built("captions")
    with pytest.raises(ValueError, match="stored_text: 'captions' there, None here"):
        spec(tmp_path / "captions").build()
    assert "stored_text" not in spec().identity()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stored_text": "short"}, "stored_text: 'short' is not one of padded, trimmed, captions"),
        ({"stored_text": "captions", "text": None}, "stored_text: 'captions' wants text"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        spec(**settings)


def test_an_encoder_without_a_mask_cannot_be_trimmed(tmp_path):
    whole = Letters().load()
    unmasked = SimpleNamespace(
        load=lambda: lambda captions: {"text": whole(captions)["text"]}, identity=lambda: {"id": "unmasked"}
    )
    with pytest.raises(ValueError, match="'trimmed' wants an encoder with a text_mask, this one has text"):
        encode(spec(stored_text="trimmed", text=unmasked), tmp_path / "e")
    assert not (tmp_path / "e").exists()


class Pipeline:
    """The text encoders of a tiny pipeline, counting what they encode."""

    def __init__(self, family, folder):
        import diffusers

        torch.manual_seed(0)
        self.pipeline, self.counts = diffusers.DiffusionPipeline.from_pretrained(save(family, folder / "pipe")), []

    def load(self):
        def call(captions):
            self.counts.append(len(captions))
            return pipeline_rows(self.pipeline, captions, "cpu", None if self.family == "sd" else 12, 16)

        return call


@pytest.mark.parametrize("family", ["sd", "sd3", "sana"])
def test_a_row_depends_on_its_caption_alone(family, tmp_path):
    """CLIP, CLIP with T5, and Gemma: a resumed run has an empty cache, and other captions around each one."""
    encoder = Pipeline(family, tmp_path)
    encoder.family = family
    captions = ["a red cat", "", "the dog with blue eyes", "a green face", "0 1 2", "smiling dog", "a red cat"]
    live = LiveText(encoder)
    together = live(captions)
    assert encoder.counts == [4, 4]
    again = live(captions[::-1])
    assert encoder.counts == [4, 4], "what was encoded lately is kept"
    for i, caption in enumerate(captions):
        alone = LiveText(encoder)([caption])
        for name, rows in together.items():
            assert torch.equal(rows[i], alone[name][0]) and torch.equal(rows[i], again[name][len(captions) - 1 - i])
    assert all(torch.equal(rows, rows.half().float()) for rows in together.values() if rows.is_floating_point())


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "sana"])
def test_encoders_are_held_in_bfloat16_and_give_rows_in_full_precision(family, tmp_path):
    """Each layer rounds to 8 bits: half a unit is 2^-9 of a number, and a tiny encoder has a few layers."""
    text = PipelineText(source=str(save(family, tmp_path / "pipe")), max_tokens=None if family == "sd" else 12)
    captions = ["a red cat", "", "the dog with blue eyes"]
    live = LiveText(text)
    whole = live(captions)
    live.hold(torch.bfloat16)
    rounded = live(captions)
    for part in live._network.parts.values():
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert rounded.keys() == whole.keys()
    for name, rows in rounded.items():
        assert rows.dtype == whole[name].dtype and rows.shape == whole[name].shape
        if rows.is_floating_point():
            off = (rows - whole[name]).square().mean().sqrt() / whole[name].square().mean().sqrt()
            assert 1e-4 < off < 2**-6, (name, off)
        else:
            assert torch.equal(rows, whole[name])
    live.hold(None)
    assert same(live(captions), whole)


@pytest.mark.parametrize(
    ("precision", "frozen", "expected"),
    [("bf16", "auto", torch.bfloat16), ("bf16", "32", None), ("32", "auto", None)],
)
def test_captions_are_encoded_in_the_precision_of_frozen_networks(precision, frozen, expected, built):
    settings = [f"trainer.precision={precision}", f"trainer.teacher_precision={frozen}", "metrics=[]"]
    data = build_data(resolve(read_recipe("digits", settings)), lambda _: built("captions"))
    assert data._live.dtype == expected
    assert data.conditions_at(torch.tensor([1]))["text"].dtype == torch.float32, "this encoder cannot be converted"


def test_few_rows_are_kept_and_a_copy_has_none(monkeypatch):
    from flowmap.data import live_text

    calls = []
    letters = Letters().load()
    spec_of = SimpleNamespace(load=lambda: lambda captions: (calls.append(captions), letters(captions))[1])
    live = LiveText(spec_of)
    size = live_text._size({name: value[0] for name, value in live(["a"]).items() if name != "x"})
    monkeypatch.setattr(live_text, "CACHE_BYTES", 2 * size)
    for caption in ("a", "b", "a", "c", "d", "e", "f", "g"):
        live([caption])
    assert live._bytes <= 2 * size and "a" not in live._rows and "g" in live._rows
    live.spec = Letters()
    assert not pickle.loads(pickle.dumps(live))._rows


def test_a_ragged_encoder_is_refused():
    with pytest.raises(ValueError, match="text: is of the shapes .* texts must be padded to one length"):
        LiveText(Letters(ragged=True))(["a", "b", "c", "d", "a longer one"])


@pytest.mark.parametrize("family", ["sana", "pixart"])
def test_networks_with_a_mask_read_nothing_of_the_padding(family):
    """So that zeros in its place change no bit of what they compute."""
    torch.manual_seed(0)
    net = tiny_nets.with_random_weights(getattr(tiny_nets, family)()).eval()
    text, mask = torch.randn(3, 7, tiny_nets.TEXT), torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 1)])
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([500.0, 20.0, 900.0])
    rows = [
        net(x, encoder_hidden_states=given, encoder_attention_mask=mask, timestep=t, return_dict=False)[0]
        for given in (text, text * mask.unsqueeze(-1))
    ]
    assert torch.equal(*rows)

"""A finished encoding as data: what its samples and conditions are, and what is refused."""

import json
import pickle

import pytest
import torch
from torch.nn import functional as F

from flowmap.data import Dataset, StepBatches, as_it_is
from flowmap.prepare.encode import encode
from tests.support.encoding import Averages, Letters, Numbers, spec

pytest.importorskip("datasets")


@pytest.fixture
def made(tmp_path):
    encode(spec(), tmp_path / "e", batch_size=3)
    return tmp_path / "e"


def pixels(position):
    return next(Numbers().items(position, position + 1)).image.float() / 127.5 - 1


def positions_of(data):
    return [Numbers().usable[row] for row in data._kept.tolist()]


def test_samples_are_the_encoders_latents_with_their_conditions(made):
    data = spec(made).build()
    assert data.name == "e" and data.shape == (3, 4, 4) and data.num_classes == 3 and len(data) == 20 - 2
    rows = [5, 0, 17, 5]
    x0, cond = data.__getitems__(rows)
    where = [positions_of(data)[row] for row in rows]
    assert x0.dtype == torch.float32 and torch.equal(
        x0, torch.stack([F.avg_pool2d(pixels(i), 2) for i in where]).half().float()
    )
    assert torch.equal(cond["class"], torch.tensor([i % 3 for i in where])) and torch.equal(
        data.labels[rows], cond["class"]
    )
    captions = ["" if i % 5 == 0 else f"picture {i}" for i in where]
    expected = Letters().load()(captions)
    assert set(cond) == {"class", "text", "text_mask", "pooled"} and cond["text_mask"].dtype == torch.bool
    for name, value in expected.items():
        assert cond[name].dtype == value.dtype and torch.equal(cond[name].float(), value.half().float())


def test_held_out_and_reference_are_pictures_and_disjoint(made):
    data = spec(made).build()
    assert data.held_out.shape == (2, 3, 8, 8) and data.reference.shape == (6, 3, 8, 8)
    out = sorted(set(Numbers().usable) - set(positions_of(data)))
    assert torch.equal(data.held_out[:], torch.stack([pixels(i) for i in out]))
    trained = [pixels(i) for i in positions_of(data)]
    assert all(any(torch.equal(one, other) for other in trained) for one in data.reference)


def test_held_out_samples_and_the_reference_have_their_conditions(made):
    data = spec(made).build()
    out = sorted(set(Numbers().usable) - set(positions_of(data)))
    x0, cond = data.held_out_samples()
    assert torch.equal(x0, torch.stack([F.avg_pool2d(pixels(i), 2) for i in out]).half().float())
    assert cond["class"].tolist() == [i % 3 for i in out] and cond.keys() == {"class", "text", "text_mask", "pooled"}
    place = {tuple(pixels(i).flatten().tolist()): i for i in Numbers().usable}
    seen = [place[tuple(one.flatten().tolist())] for one in data.reference]
    assert data.reference_labels.tolist() == [i % 3 for i in seen]
    conditions = data.reference_conditions_at(torch.tensor([4, 1]))
    assert conditions["class"].tolist() == [seen[4] % 3, seen[1] % 3]
    lengths = [[len("" if i % 5 == 0 else f"picture {i}")] for i in seen]
    assert conditions["pooled"].tolist() == [lengths[4], lengths[1]]
    assert torch.equal(data.held_out_samples(1)[0], x0[:1]) and len(data.held_out_samples(1)[1]["class"]) == 1


def test_stored_pictures_are_read_where_they_are_indexed(made):
    """As a tensor would be: by a number, a slice, places, one after the other; also from another process."""
    reference = pickle.loads(pickle.dumps(spec(made).build().reference))
    whole = torch.stack(list(reference))
    assert len(reference) == len(whole) == 6 and reference.shape == whole.shape
    assert torch.equal(reference[-1], whole[5]) and torch.equal(reference[1:3], whole[1:3])
    assert torch.equal(reference[torch.tensor([4, 0, 4])], whole[[4, 0, 4]]) and len(reference[torch.arange(0)]) == 0
    with pytest.raises(IndexError, match="6 is not one of 6"):
        reference[6]


def test_empty_and_the_conditions_alone(made):
    data = spec(made).build()
    empty = Letters().load()([""])
    assert data.empty.keys() == empty.keys() and all(torch.equal(data.empty[name], empty[name]) for name in empty)
    cond = data.conditions_at(torch.tensor([0, 6, 12]))
    assert cond.keys() == {"class", "text", "text_mask", "pooled"}
    whole = data.__getitems__([0, 6, 12])[1]
    assert all(torch.equal(cond[name], whole[name]) for name in cond)


def test_a_dataset_in_memory_has_harmless_ones():
    data = Dataset("x", torch.zeros(4, 2), torch.zeros(0, 2), torch.arange(4), torch.zeros(0), num_classes=4)
    assert data.empty == {} and data.conditions_at(torch.tensor([2, 0]))["class"].tolist() == [2, 0]
    bare = Dataset("x", torch.zeros(4, 2), torch.zeros(3, 2))
    two = torch.arange(2)
    assert bare.conditions_at(two) == bare.reference_conditions_at(two) == bare.held_out_samples()[1] == {}
    assert bare.reference_labels is None and torch.equal(data.reference_labels, torch.arange(4))
    assert data.reference_conditions_at(two)["class"].tolist() == [0, 1] and set(data.held_out_samples()[1]) == {
        "class"
    }


def test_it_feeds_a_loader(made):
    data = spec(made).build()
    batches = StepBatches(len(data), 4, seed=0, num_steps=3)
    for x0, cond in torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=as_it_is):
        assert x0.shape == (4, 3, 4, 4) and cond["text"].shape == (4, 5, 2)


def test_reading_a_batch_copies_no_table_of_shards(made, monkeypatch):
    import copy

    data = spec(made).build()

    def refuse(*arguments, **settings):
        raise AssertionError("a copy of the table takes 100 ms with 1,300 shards")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    x0, cond = data.__getitems__([4, 0])
    assert torch.equal(data.conditions_at(torch.tensor([4, 0]))["text"], cond["text"]) and len(x0) == 2


def test_pictures_themselves_without_an_autoencoder(tmp_path):
    settings = dict(autoencoder=None, text=None)
    encode(spec(**settings), tmp_path)
    data = spec(tmp_path, **settings).build()
    x0, cond = data.__getitems__([0, 3])
    assert torch.equal(x0[1], pixels(positions_of(data)[3])) and set(cond) == {"class"} and data.empty == {}
    assert spec(**settings).in_pixels and not spec().in_pixels


def test_flip_doubles_the_samples(tmp_path):
    encode(spec(flip=True), tmp_path)
    data = spec(tmp_path, flip=True).build()
    assert len(data) == 2 * 18 == len(data.labels)
    x0, cond = data.__getitems__([4, 4 + 18])
    assert (
        torch.equal(x0[1], x0[0].flip(-1))
        and torch.equal(cond["text"][0], cond["text"][1])
        and not torch.equal(x0[0], x0[1])
    )


def test_the_index_tells_the_moments(made):
    index = json.loads((made / "index.json").read_text())
    every = torch.stack([F.avg_pool2d(pixels(i), 2) for i in Numbers().usable]).half().double()
    torch.testing.assert_close(
        torch.tensor(index["mean"], dtype=torch.float64), every.mean((0, 2, 3)), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        torch.tensor(index["std"], dtype=torch.float64), every.std((0, 2, 3), correction=0), rtol=0, atol=1e-12
    )


MISMATCHES = [
    ({"autoencoder": Averages(revision="2")}, "autoencoder.revision: '1' there, '2' here"),
    ({"autoencoder": None}, "autoencoder: .* there, None here"),
    ({"images": Numbers(size=16)}, "source.size: 8 there, 16 here"),
    ({"images": Numbers(count=24)}, "source.count: 23 there, 24 here"),
    ({"text": None}, "text: "),
    ({"flip": True}, "flip: False there, True here"),
    ({"held_out": 3}, "held_out: 2 there, 3 here"),
]


@pytest.mark.parametrize(("settings", "says"), MISMATCHES)
def test_another_encoding_is_refused(made, settings, says):
    with pytest.raises(ValueError, match=says):
        spec(made, **settings).build()


def test_what_is_not_complete_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="data.root: is required"):
        spec().build()
    with pytest.raises(ValueError, match="holds no encoding"):
        spec(tmp_path / "nowhere").build()
    (made / "index.json").rename(made / "gone")
    with pytest.raises(ValueError, match="not complete .5 shards"):
        spec(made).build()
    (made / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        spec(made).build()
    (made / "gone").rename(made / "index.json")
    (made / "reference.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="reference.safetensors"):
        len(spec(made).build())


def test_a_torn_shard_is_named_and_made_anew(made):
    shard = made / "shard-00002.arrow"
    whole = shard.read_bytes()
    for torn in (whole[:-8], b"", b"\xff" * len(whole)):
        shard.write_bytes(torn)
        with pytest.raises(ValueError, match="shard-00002.arrow.*torn"):
            spec(made).build()
    shard.write_bytes(whole[:-8])
    encode(spec(), made, batch_size=3)
    assert shard.read_bytes() == whole and len(spec(made).build()) == 18
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00002.arrow.*missing"):
        spec(made).build()


@pytest.mark.parametrize("settings", [{"held_out": -1}, {"shard_items": 0}, {"reference_images": 0}])
def test_values_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        spec(**settings)

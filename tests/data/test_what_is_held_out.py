"""Every data set holds samples out of training where nothing is said, and gives them with their conditions."""

import io
import json
import zipfile

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowmap.data import DATA, Codes, Digits, Folder, Latents, Pictures, Text, Toy
from flowmap.data.codes import ENCODINGS
from flowmap.data.dataset import looked_at
from flowmap.data.images.edm2_zip import EDM2Latents
from flowmap.data.text.sources import TextFiles
from flowmap.prepare.encode import encode
from tests.support.encoding import Numbers, spec


def folder(at):
    for i in range(30):
        (at / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (8 * i, 0, 0)).save(at / f"{i % 2}" / f"{i}.png")
    return Folder(root=str(at), size=4)


def tensors(kind):
    def make(at):
        save_file({"x0": torch.arange(30.0).view(30, 1, 1, 1), "class": torch.arange(30) % 2}, at / "0.safetensors")
        return kind(root=str(at), num_classes=2)

    return make


def zipped(at):
    with zipfile.ZipFile(at / "a.zip", "w") as file:
        for i in range(30):
            content = io.BytesIO()
            numpy.save(content, numpy.full((8, 2, 2), i, dtype=numpy.float32))
            file.writestr(f"{i:02d}.npy", content.getvalue())
        file.writestr("dataset.json", json.dumps({"labels": [[f"{i:02d}.npy", i % 2] for i in range(30)]}))
    return EDM2Latents(path=str(at / "a.zip"))


def encoded(at):
    settings = dict(images=Numbers(count=60), held_out=None)
    encode(spec(**settings), at)
    return spec(at, **settings)


def text(at):
    (at / "lines.txt").write_text("".join(f"line number {i}\n" for i in range(400)))
    return Text(sentences=TextFiles(root=str(at / "lines.txt")), attributes=("length",))


def codes(at):
    save_file({"mean": torch.randn(30, 2), "logvar": torch.zeros(30, 2)}, at / ENCODINGS)
    return Codes(root=str(at))


SETS = {
    "digits": lambda at: Digits(),
    "toy": lambda at: Toy(points=200),
    "folder": folder,
    "latents": tensors(Latents),
    "pictures": tensors(Pictures),
    "edm2_zip": zipped,
    "encoded": encoded,
    "text": text,
    "codes": codes,
}


@pytest.mark.parametrize("kind", SETS)
def test_every_kind_of_data_holds_something_out(kind, tmp_path):
    data = SETS[kind](tmp_path).build()
    x0, cond = data.held_out_samples()
    assert len(data.held_out) == len(x0) == data.num_held_out > 0
    trained = data.__getitems__(range(len(data)))[0]
    assert not any((trained == one).flatten(1).all(1).any() for one in x0[:5]), "a held-out sample is trained on"
    some = torch.tensor([data.num_held_out - 1, 0])
    found = data.held_out_conditions_at(some)
    assert set(found) == set(cond) and all(torch.equal(found[key], cond[key][some]) for key in cond)
    if "class" in cond:
        assert torch.equal(data.held_out_labels, cond["class"])


def test_no_kind_is_left_out():
    # fashion: ten thousand of its own files, test_images.py; given: from Python, test_given.py; teacher_samples:
    # test_teacher_samples.py
    assert set(DATA) - set(SETS) == {"fashion", "given", "teacher_samples"}


def test_an_evaluation_looks_at_all_before_any_comes_again():
    places = torch.arange(50)
    found = looked_at(places, 20)
    assert (
        sorted(found[:20].tolist()) == list(range(20))
        and torch.equal(found[:20], found[20:40])
        and found[:5].tolist() != [0, 1, 2, 3, 4]
    )
    assert torch.equal(looked_at(places[7:9], 20), found[7:9])

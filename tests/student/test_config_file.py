"""config.json is flat, whatever samples are: what older code wrote is read and written again to the byte."""

import json
from pathlib import Path

import pytest

from flowmap.base.files import write_json
from flowmap.base.schema import RecipeError
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.data.text.dataset import Attribute
from flowmap.nets.mlp import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import ImageLatents, Pixels, StudentConfig, TextLatents
from flowmap.student.config_file import config_json, read_config
from flowmap.teachers.autoencoder import Autoencoder

RECORDED = sorted(
    path
    for path in (Path(__file__).parents[1] / "recorded/kept").glob("*/student/config.json")
    if "sampler" in json.loads(path.read_text())
)
SENTENCES = TextLatents(TextAutoencoder("words"), (Attribute("style", ("plain", "formal")),), ("left",), ("a=1", "a=2"))
SAMPLES = [Pixels(), Pixels(clamp=False), ImageLatents(Autoencoder("vae")), SENTENCES, TextLatents()]
KEYS = "clamp", "autoencoder", "text_autoencoder", "attributes", "contexts", "edits"


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parts[-3])
def test_a_recorded_configuration_is_written_as_it_was(path, tmp_path):
    write_json(tmp_path / "config.json", config_json(read_config(path)))
    before = path.read_text()
    assert (tmp_path / "config.json").read_text() == before


def test_recorded_students_are_of_both_kinds():
    kinds = {type(read_config(path).samples) for path in RECORDED}
    assert len(RECORDED) >= 6 and kinds == {Pixels, TextLatents}


@pytest.mark.parametrize("samples", SAMPLES)
def test_what_is_written_is_read_again(samples, tmp_path):
    config = StudentConfig(MLP(), Deterministic(), (6,), samples=samples)
    write_json(tmp_path / "config.json", config_json(config))
    again = read_config(tmp_path / "config.json")
    flat = config_json(again)
    assert flat == config_json(config) and set(KEYS) < set(flat) and "samples" not in flat
    assert again == config or samples == TextLatents()  # of which the file says nothing


def test_a_mistake_names_file_and_key(tmp_path):
    flat = config_json(StudentConfig(MLP(), Deterministic(), (6,)))
    for change, words in (({"clamp": 3}, "clamp: 3 is not true or false"), ({"shape": [0]}, "shape: ")):
        write_json(tmp_path / "config.json", flat | change)
        with pytest.raises(RecipeError, match=f"config.json: {words}"):
            read_config(tmp_path / "config.json")

"""What a hub reads of an exported folder's card: licence, base model, library, tags; what is not known is not said."""

from __future__ import annotations

import json

import pytest
import yaml

from flowmap.export import export
from flowmap.nets import DiT
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import load_student, save_student
from tests.export.alone import shaken

pytest.importorskip("diffusers")
RECIPE = """
name: carded
data: {{kind: digits, batch_size: 8}}
teacher: {{card: {card}, guidance: {{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}}}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd}}
sampler: {{kind: deterministic, steps: [1, 2]}}
trainer: {{steps: 2}}
"""


def front(tmp_path, card: str) -> dict:
    (tmp_path / "card.yaml").write_text(card)
    config = StudentConfig(DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, recipe="carded")
    recipe = RECIPE.format(card=tmp_path / "card.yaml")
    save_student(tmp_path / "student", config, shaken(config).flow_map.state_dict(), recipe=recipe, card="# carded\n")
    text = (export(load_student(tmp_path / "student"), tmp_path / "out") / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    "licence, expected",
    [
        ("Apache-2.0 (weights trained here)", {"license": "apache-2.0"}),
        ("CC BY-NC-SA 4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("MIT", {"license": "mit"}),
        ("CreativeML OpenRAIL++-M", {"license": "openrail++"}),
        ('Some "community" licence: ask', {"license": "other", "license_name": 'Some "community" licence: ask'}),
        ("?", {}),
    ],
)
def test_the_licence_is_the_teachers(tmp_path, licence, expected):
    from flowmap.export.card import _licence
    from flowmap.teachers.card import Card

    lines = yaml.safe_load("\n".join(_licence(Card("diffusers", licence=licence)))) or {}
    assert lines == expected


def test_a_student_of_a_hubs_model_names_it(tmp_path):
    said = front(tmp_path, "kind: diffusers\nsource: owner/model\nlicence: CC BY-NC 4.0\nshape: [4, 8, 8]\n")
    assert said == {
        "library_name": "diffusers",
        "license": "cc-by-nc-4.0",
        "base_model": "owner/model",
        "base_model_relation": "finetune",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["flowmap", "few-step"],
    }


def test_a_folder_of_this_machine_is_no_base_model(tmp_path):
    said = front(tmp_path, f"kind: diffusers\nsource: {json.dumps(str(tmp_path))}\n")
    assert "base_model" not in said and "license" not in said

"""What a hub reads of an exported folder's card: licence, base model, library, tags; what is not known is not said."""

from __future__ import annotations

import json

import pytest
import yaml

from flowmap.export import export
from flowmap.nets import DiT
from flowmap.recipe import read_recipe
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
    from flowmap.export.metadata import front_matter
    from flowmap.export.metadata import licence as licence_of
    from flowmap.teachers.card import Card

    said = licence_of(Card("diffusers", licence=licence))
    assert said == expected and (yaml.safe_load("\n".join(front_matter(said)[1:-1])) or {}) == expected


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


METRICS = {
    "student": {"1": {"frechet": 1.5, "precision": 0.75}, "2": {"frechet": 1.25, "precision": float("nan")}},
    "teacher": {"steps": 8, "nfe": 16, "frechet": 1.0, "precision": 0.8},
    "floor": {"frechet": 0.5},
}


def own_card(recipe, metrics):
    from flowmap.train.card import model_card

    names = tuple("0123456789")
    config = StudentConfig(DiT(preset="nano"), Deterministic(), (1, 8, 8), num_classes=10, class_names=names)
    return model_card(recipe, config, metrics)


def test_a_hub_reads_figures_papers_and_licence_of_a_students_own_card():
    from huggingface_hub import ModelCard

    text = own_card(read_recipe("digits"), METRICS)
    said = ModelCard(text).data
    figures = {(one.metric_name, one.metric_type): one.metric_value for one in said.eval_results}
    assert figures == {
        ("frechet, 1 step", "frechet"): 1.5,
        ("precision, 1 step", "precision"): 0.75,
        ("frechet, 2 steps", "frechet"): 1.25,
    }, "a figure that is not finite is no figure"
    task = said.eval_results[0]
    assert (task.task_type, task.dataset_type) == ("unconditional-image-generation", "digits")
    assert said.license == "apache-2.0" and said.library_name == "flowmap" and "arxiv:2506.14603" in said.tags
    assert "0 0, 1 1" in text and "Licence of the teacher: Apache-2.0" in text
    assert ModelCard(own_card(read_recipe("digits"), None)).data.eval_results is None


def test_data_of_a_hub_are_named_with_their_id(tmp_path):
    from flowmap.export.metadata import student_metadata

    text = RECIPE.format(card=tmp_path / "card.yaml")
    (tmp_path / "card.yaml").write_text(
        "kind: diffusers\nsource: owner/model\nshape: [4, 8, 8]\nreference: arXiv:2112.10752\n"
    )
    images = "{kind: huggingface, path: owner/pictures, size: 64}"
    images = f"{{kind: encoded, images: {images}, autoencoder: {{source: a/vae}}, batch_size: 8}}"
    (tmp_path / "hubs.yaml").write_text(text.replace("{kind: digits, batch_size: 8}", images).replace("carded", "hubs"))
    config = StudentConfig(DiT(preset="nano"), Deterministic(), (4, 8, 8))
    said = student_metadata(read_recipe(tmp_path / "hubs.yaml"), config, METRICS)
    assert said["datasets"] == ["owner/pictures"] and said["base_model"] == "owner/model"
    assert said["model-index"][0]["results"][0]["dataset"] == {"name": "encoded", "type": "owner/pictures"}
    assert said["tags"] == ["flowmap", "few-step", "arxiv:2506.14603", "arxiv:2112.10752"]


def test_an_export_keeps_the_figures_and_papers_of_the_students_own_card(tmp_path):
    config = StudentConfig(DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, recipe="digits")
    own = own_card(read_recipe("digits"), METRICS)
    save_student(tmp_path / "student", config, shaken(config).flow_map.state_dict(), recipe="", card=own)
    text = (export(load_student(tmp_path / "student"), tmp_path / "out") / "README.md").read_text()
    said, before = (yaml.safe_load(card.split("---\n")[1]) for card in (text, own))
    assert said["model-index"] == before["model-index"] and said["library_name"] == "diffusers"
    assert said["tags"] == before["tags"] and "1.25" in text.partition("## Figures")[2]

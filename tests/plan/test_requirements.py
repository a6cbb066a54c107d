"""Problems reported before training: missing networks of metrics, priors and codes that do not fit.

Frozen parts that must be fetched are reported too.
"""

import pytest

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.estimate.dry_run import dry_run
from flowmap.metrics import METRICS, lacking
from flowmap.recipe import read_recipe

CODES = "is trained on the codes of 'lediflow-digits-prior'"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def last_line(name, *overrides):
    return dry_run(read_recipe(name, overrides), None)[-1]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("{kind: frechet, features: clip}", "metrics: features 'clip' needs openai/clip"),
        (
            "{kind: precision_recall, features: nowhere:net, images: 500}",
            "metrics: features: 'nowhere:net' names code, and a recipe imports nothing on its own",
        ),
        ("{kind: mmd, features: foo}", "metrics: features is 'foo'; allowed are pixels"),
    ],
)
def test_features_that_cannot_be_had_stop_a_run_before_its_teacher_is_trained(metric, says, tmp_path):
    recipe = read_recipe("digits", [f"metrics=[{metric}]"])
    assert says in dry_run(recipe, None)[-1]
    with pytest.raises(RecipeError, match=f"digits: {says}"):
        flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run").exists()


def test_a_value_that_a_metric_wants_is_missed_by_its_place():
    assert read_recipe("digits", ["metrics=[{kind: frechet}, {kind: perplexity}]"]).missing() == ["metrics[1].source"]


def test_a_language_model_is_a_folder_or_a_hub_id(tmp_path):
    perplexity = lambda source: lacking([METRICS["perplexity"](source=source)])
    assert perplexity(str(tmp_path)) == perplexity("gpt2") == perplexity("owner/name") == []
    assert perplexity("./gone") == ["metrics: source: './gone': no such folder, and no hub id (owner/name)"]


def test_codes_and_priors_that_do_not_fit_are_refused_by_the_dry_run():
    with pytest.raises(RecipeError, match=CODES):
        last_line("lediflow/digits", 'prior.overrides=["trainer.steps=5"]')
    told = 'prior.z.overrides=["data.overrides=[\\"trainer.steps=5\\"]"]'
    assert "nothing is missing" in last_line("lediflow/digits", 'prior.overrides=["trainer.steps=5"]', told)
    with pytest.raises(
        RecipeError,
        match="the teacher's paths start at the prior of 'lediflow-digits-prior'.*scale 1, .*the recipe's .* scale 0.5",
    ):
        last_line("lediflow/digits-ayf", "prior.scale=0.5")
    with pytest.raises(RecipeError, match="the teacher's paths start at N"):
        last_line("lediflow/digits-ayf", "teacher={recipe: lediflow/digits-gaussian}")


def test_frozen_networks_of_the_data_that_are_to_be_fetched_are_told():
    assert "data.autoencoder.source: 'stabilityai/sdxl-vae': not on this machine; fit fetches it" in last_line(
        "lediflow/ffhq"
    )
    assert "data.autoencoder.source: './gone': no such folder" in last_line(
        "lediflow/ffhq", "data.autoencoder.source=./gone"
    )


def test_the_files_of_the_papers_protocol_are_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowmap.estimate.dry_run.price_lines", lambda *given: [])  # it takes a while at full size
    line = last_line("sd15")
    assert line.startswith("missing on this machine: ")
    for part in (
        "metrics: features 'inception' needs",
        "metrics: clip_score needs openai/clip-vit-large-patch14, safetensors, in",
        "evaluation.captions: .data/coco/captions_val2014.json: there is no such file",
    ):
        assert part in line
    spec = "metrics=[{kind: frechet, features: efficientnet_lite0, reference: a.npz}]"
    assert "metrics: reference: a.npz: there is no such file; `flowmap reference` makes one" in last_line("sd15", spec)
    lines = dry_run(read_recipe("imagenet64"), None)
    assert any("its pictures -> statistics of inception -> " in line for line in lines)
    assert lines[-1].count("metrics: features 'inception' needs") == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluation.captions=a.txt"], "digits: evaluation.captions: the student reads no text"),
        (["metrics=[{kind: clip_score}]"], "digits: metrics: clip_score wants evaluation.captions, a file of captions"),
    ],
)
def test_captions_are_for_students_that_read_text(overrides, says):
    with pytest.raises(RecipeError, match=says):
        dry_run(read_recipe("digits", overrides), None)

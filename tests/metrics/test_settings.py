"""Settings of metrics that could only fail after training are refused with the recipe, or when the data is known."""

from dataclasses import fields

import pytest
import torch

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.cli import main
from flowmap.data import Dataset
from flowmap.metrics import METRICS, check_metrics
from flowmap.recipe import read_recipe

SAMPLED = ("frechet", "precision_recall", "mmd")
SPACED = (*SAMPLED, "agreement", "retrieval", "text_divergence", "nearest_neighbour")
BAD = [
    *((kind, {"images": value}) for kind in METRICS for value in (0, -1, 10**9)),
    *((kind, {"images": 1}) for kind in ("frechet", "mmd", "text_divergence", "self_bleu")),
    *(
        (kind, {"reference_images": value})
        for kind in ("frechet", "mmd", "agreement", "retrieval")
        for value in (0, -1, 1)
    ),
    ("nearest_neighbour", {"reference_images": 0}),
    *((kind, {"steps": value}) for kind in ("straightness", "endpoint_error") for value in (0, -1, 10**9)),
    *((kind, {"features": value}) for kind in SPACED for value in (".x:y", "x:", ":y", "x:y:z", "a b:c", "x:.y")),
    *(("precision_recall", {"k": value}) for value in (0, -1, 10**9)),
    ("precision_recall", {"k": 3, "images": 3}),
    ("precision_recall", {"k": 5, "images": 5}),
    ("mmd", {"sigma": 0.0}),
    ("retrieval", {"among": 1}),
    ("retrieval", {"top": ()}),
    ("retrieval", {"top": (0,)}),
    ("retrieval", {"top": (100,)}),
    ("retrieval", {"among": 100, "reference_images": 100}),
    ("loss_by_time", {"times": ()}),
    ("loss_by_time", {"times": (1.5,)}),
    ("self_bleu", {"looked_at": 0}),
    ("self_bleu", {"references": 0}),
    ("text_divergence", {"clusters": 1}),
    ("memorised", {"looked_at": 0}),
    ("control", {"tolerance": -1}),
    ("control", {"fitted_on": 1}),
    ("style_hit", {"fitted_on": 0}),
    ("perplexity", {"batch_size": 0}),
]


@pytest.mark.parametrize(("kind", "bad"), BAD)
def test_a_bad_value_is_refused_by_its_key(kind, bad):
    with pytest.raises(ValueError, match=f"^({'|'.join((*bad, 'top'))}): "):
        METRICS[kind](**bad)


def test_every_number_of_every_kind_is_bounded():
    for cls in METRICS.values():
        for field in fields(cls):
            if field.type in ("int", "int | None"):
                with pytest.raises(ValueError, match="must lie in"):
                    cls(**{field.name: -1})


class Captioned(Dataset):
    def example_conditions(self):
        return {"pooled": torch.ones(1, 3)}


def points(num, held_out, **more):
    return Dataset("points", torch.randn(num, 2), torch.randn(held_out, 2), **more)


@pytest.mark.parametrize(
    ("metric", "data", "says"),
    [
        (
            {"kind": "precision_recall", "images": 50},
            points(40, 20),
            "metrics.images: precision_recall compares 50 with as many .* there are 40",
        ),
        (
            {"kind": "precision_recall", "images": 10},
            points(40, 4),
            "precision_recall needs 4 held-out samples or more",
        ),
        (
            {"kind": "precision_recall", "images": 5, "k": 4},
            points(5, 0),
            "precision_recall needs 5 training samples or more",
        ),
        ({"kind": "frechet"}, points(40, 1), "frechet needs 2 held-out samples or more"),
        ({"kind": "mmd"}, points(3, 0), "mmd needs 2 training samples or more"),
        (
            {"kind": "frechet", "features": "efficientnet_lite0"},
            points(40, 20),
            "look at pictures of 1 or 3 channels, .* shape \\(2,\\)",
        ),
        ({"kind": "inversion"}, points(40, 0), "data.held_out is 0"),
        ({"kind": "loss_by_time"}, points(40, 0), "data.held_out is 0"),
        ({"kind": "nearest_neighbour"}, points(40, 0), "data.held_out is 0"),
        ({"kind": "agreement"}, points(40, 20), "needs data with classes"),
        ({"kind": "retrieval"}, points(40, 20), "retrieval needs data with captions"),
        (
            {"kind": "retrieval", "features": "pixels"},
            Captioned("told", torch.randn(40, 2), torch.randn(20, 2)),
            "among: 100 wants more captions",
        ),
        ({"kind": "distinct"}, points(40, 20), "Distinct looks at sentences"),
    ],
)
def test_a_value_that_does_not_fit_the_data_is_refused(metric, data, says):
    settings = dict(metric)
    with pytest.raises(ValueError, match=says):
        check_metrics([METRICS[settings.pop("kind")](**settings)], data, conditional=True, paired=False)


def test_the_smallest_sets_that_are_allowed_can_be_measured():
    from flowmap.metrics import Against, baseline

    data = points(20, 5)
    for settings in (
        {"kind": "precision_recall", "images": 4},
        {"kind": "frechet", "images": 2},
        {"kind": "mmd", "images": 2},
    ):
        spec = METRICS[settings.pop("kind")](**settings)
        check_metrics([spec], data, conditional=True, paired=False)
        against = Against(spec, data)
        against.update(torch.randn(spec.images, 2))
        assert set(against.report()) <= set(baseline(against, data))


@pytest.mark.parametrize(
    "metric", ["{kind: precision_recall, images: 1501}", "{kind: frechet, images: 0}", "{kind: straightness, steps: 0}"]
)
def test_fit_and_its_dry_run_refuse_before_the_teacher_is_trained(metric, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    asked = ["fit", "--recipe", "digits", f"metrics=[{metric}]", "log.wandb=false"]
    for more in (["--dry-run"], []):
        assert main([*asked, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert "metrics" in said and "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_a_run_that_needs_held_out_samples_is_refused_where_there_are_none(tmp_path):
    from safetensors.torch import save_file

    save_file({"x0": torch.zeros(40, 1, 8, 8)}, tmp_path / "0.safetensors")
    recipe = read_recipe(
        "digits-teacher", [f"data={{kind: pictures, root: {tmp_path}, held_out: 0}}", "metrics=[{kind: inversion}]"]
    )
    with pytest.raises(RecipeError, match="data.held_out is 0"):
        flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
    assert not (tmp_path / "run").exists()

"""The COCO protocol on a small stand-in: figures are those of the formula, and a row that was cut off is continued."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import flowmap
from flowmap.cli.arguments import check_figures
from flowmap.cli.coco import _check_files, _plan, _reference
from flowmap.evaluation.coco import Coco, calls_of, figures_page, squared
from flowmap.evaluation.coco_rows import CocoRows
from flowmap.evaluation.conditions import captions_in
from flowmap.metrics.frechet import gaussian_frechet
from flowmap.metrics.statistics import Moments
from flowmap.recipe import read_recipe
from tests.support.coco import FEATURES, Lengths, coco_files, quadrants
from tests.support.straight_page import ends, straight_demo

flowmap.allow_import("tests.support.coco")


@pytest.fixture
def coco(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("flowmap.flow.prior.BLOCK", 16)
    return Coco(coco_files(tmp_path / "coco"), images=40, size=8, features=FEATURES, clip=None)


@pytest.fixture
def demo(tmp_path):
    """A student of straight paths that reads captions, with the recipe of such a student in its folder."""
    demo = straight_demo()
    demo.student.config = replace(demo.student.config, text=Lengths())
    demo.student.folder = tmp_path / "student"
    demo.student.folder.mkdir()
    recipe = read_recipe("sd15", ["data.images.root=pictures", "evaluation.batch_size=7"])
    (demo.student.folder / "recipe.yaml").write_text(recipe.to_yaml())
    return demo


def rows_of(demo, coco, out):
    return CocoRows(demo.student, coco, _reference(coco, demo.student), out.with_suffix(".json"), seed=3)


def moments(x):
    sums = Moments(12)
    sums.add(quadrants(x))
    return sums.statistics()


def test_a_caption_of_each_picture_in_the_order_of_evaluation_captions(coco):
    texts = coco.captions()
    assert len(set(texts)) == 40 and all(re.fullmatch(r"x+ 0", one) for one in texts), "the first one of each picture"
    assert texts == captions_in(str(coco.annotations))(torch.arange(40))
    with pytest.raises(ValueError, match="--images: 46 captions are wanted, and .* has 45"):
        replace(coco, images=46).captions()


def test_the_figures_are_those_of_all_samples_at_once(coco, demo, tmp_path):
    rows = rows_of(demo, coco, tmp_path / "work")
    measured = rows.measure([1, 2], demo.teacher)
    real = torch.stack([item.image for item in coco.reference.items()])
    found, wanted = moments(squared(ends(40, seed=3), 8)), moments(real.float() / 127.5 - 1)
    distance = float(gaussian_frechet(found.mean, found.covariance, wanted.mean, wanted.covariance))
    for row in (*measured["student"].values(), measured["teacher"]):
        assert row["frechet_quadrants"] == pytest.approx(distance, rel=1e-4)  # float32 samples, eight additions
    assert measured["nfe"] == {"student": {"1": 1, "2": 2}, "teacher": 8} and measured["protocol"]["reference"] == 45
    lengths = [cond["text"].flatten() for cond in demo.student.flow_map.seen]
    assert torch.cat(lengths).tolist()[:40] == [float(len(text)) for text in coco.captions()]
    assert max(map(len, lengths)) == 7, "the recipe's batch"
    page = figures_page(measured, ["frechet_quadrants"])
    assert "| student, 1 step |" in page and "| teacher, 8 steps |" in page and "40 captions" in page


def test_a_row_that_was_cut_off_is_continued_to_the_bit(coco, demo, tmp_path, monkeypatch):
    whole = rows_of(demo, coco, tmp_path / "whole").measure([1], None)["student"]
    monkeypatch.setattr("flowmap.evaluation.coco_rows.PAUSE", 0.0)
    cut = rows_of(demo, coco, tmp_path / "cut")
    original, blocks = CocoRows._block, []

    def stopping(self, sums, start, first, draw, scale):
        if first == 32 and len(blocks) == 2:
            raise KeyboardInterrupt
        blocks.append(first)
        original(self, sums, start, first, draw, scale)

    monkeypatch.setattr(CocoRows, "_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        cut.measure([1], None)
    blocks.append("again")
    assert rows_of(demo, coco, tmp_path / "cut").measure([1], None)["student"] == whole
    assert blocks == [0, 16, "again", 32]
    assert rows_of(demo, coco, tmp_path / "cut").measure([2], None)["student"]["2"].keys() == whole["1"].keys()
    assert blocks[4:] == [0, 16, 32], "another row begins anew"


def test_a_row_is_not_continued_with_quantised_weights(coco, demo, tmp_path, monkeypatch):
    whole = rows_of(demo, coco, tmp_path / "work").measure([1], None)
    count = len(demo.student.flow_map.seen)
    monkeypatch.setattr(type(demo.student), "quantized", "nf4")
    measured = rows_of(demo, coco, tmp_path / "work").measure([1], None)
    assert len(demo.student.flow_map.seen) == 2 * count, "all samples are drawn again"
    assert "quantized" not in whole and measured["quantized"] == {"format": "nf4", "weight_bytes": 4}


def test_only_the_sums_of_its_own_rows_are_removed(coco, demo, tmp_path):
    for mine in (tmp_path / "work-mine.safetensors", tmp_path / "work" / "model.safetensors"):
        mine.parent.mkdir(exist_ok=True)
        mine.touch()
    rows = rows_of(demo, coco, tmp_path / "work")
    rows.measure([1], None)
    assert len(list(tmp_path.glob("work*/**/*.safetensors"))) + len(list(tmp_path.glob("work-*.safetensors"))) == 3
    rows.forget()
    assert sorted(path.name for path in tmp_path.rglob("work-*")) == ["work-mine.safetensors"]
    assert (tmp_path / "work" / "model.safetensors").exists()


def test_the_clip_score_is_that_of_the_same_samples(coco, demo, tmp_path):
    from flowmap.metrics.clip_model import CLIPMean
    from tests.support.tiny_pipelines import two_towers

    model = str(two_towers(tmp_path / "clip-tiny"))
    measured = rows_of(demo, replace(coco, clip=model), tmp_path / "work").measure([1], None)["student"]["1"]
    metric = CLIPMean(model)
    metric.update(ends(40, seed=3), coco.captions())
    assert measured["clip_score_tiny"] == pytest.approx(float(metric.compute()), rel=1e-5)  # float32 networks


def test_the_centred_square_is_scaled():
    x = torch.arange(6.0).expand(2, 3, 4, 6) / 6
    assert torch.equal(squared(x, 4), x[..., 1:5])
    assert squared(x, 8).shape == (2, 3, 8, 8)
    flat = torch.full((1, 3, 5, 9), 0.25)
    torch.testing.assert_close(squared(flat, 16), torch.full((1, 3, 16, 16), 0.25))


@pytest.mark.slow
def test_the_dry_run_says_calls_and_hours(coco, demo):
    lines = [*_plan(replace(coco, images=30_000), demo.student, [1, 4], None)]
    assert "student, 4 steps: 30,000 samples, 120,000 network calls" in lines
    assert any(line.startswith("in all") and "GPU-hours" in line for line in lines)


def test_the_calls_of_all_rows(coco):
    rows = {"student, 1 step": 1, "teacher, 8 steps": 16}
    assert [*calls_of(coco, rows)] == [
        "student, 1 step: 40 samples, 40 network calls",
        "teacher, 8 steps: 40 samples, 640 network calls",
        "in all 680 network calls",
    ]


def test_what_is_missing_is_named_before_anything_is_drawn(coco, demo, tmp_path, monkeypatch, command):
    monkeypatch.setattr("flowmap.student.folder.load_student", lambda *_, **__: demo.student)
    monkeypatch.setattr("flowmap.cli.coco._plan", lambda *_: [])
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path))
    words = ("evaluate", "--student", "any", "--steps", 1, "--protocol", "coco30k", "--coco")
    code, out, _ = command(*words, tmp_path, "--dry-run", "--clip", tmp_path / "none")
    assert code == 3 and "has no captions_val2014.json" in out and "has no folder val2014" in out
    assert "features 'inception' needs" in out and "clip_score needs" in out
    code, _, err = command(*words, coco.root, "--images", 40, "--clip", "none", "--out", tmp_path / "coco.json")
    assert code == 2 and "features 'inception' needs" in err and not (tmp_path / "coco.json").exists()


def test_a_dry_run_loads_no_teacher_and_a_missing_one_counts_as_missing(coco, demo, monkeypatch, command):
    monkeypatch.setattr("flowmap.student.folder.load_student", lambda *_, **__: demo.student)
    monkeypatch.setattr("flowmap.evaluation.columns.build_teacher", lambda *_: pytest.fail("nothing is loaded"))
    monkeypatch.setattr(Coco, "lacking", lambda _: [])
    rows = []
    monkeypatch.setattr("flowmap.cli.coco._plan", lambda *given: rows.append(given[-1]) or [])
    words = ("evaluate", "--student", "any", "--protocol", "coco30k", "--coco", coco.root, "--dry-run")
    monkeypatch.setattr("flowmap.plan.named_networks.on_this_machine", lambda card: False)
    code, out, _ = command(*words, "--teacher-steps", 5)
    assert code == 3 and out.startswith("missing on this machine: 'sd15'") and len(out.splitlines()) == 1
    assert rows[0].label == "teacher, 5 steps" and rows[0].built.calls(5) == 10, "with classifier-free guidance"
    monkeypatch.setattr("flowmap.plan.named_networks.on_this_machine", lambda card: True)
    assert command(*words)[0] == 0
    monkeypatch.setattr("flowmap.plan.named_networks.on_this_machine", lambda card: False)
    assert command(*words, "--no-teacher")[0] == 0 and rows[-1] is None


@pytest.mark.parametrize("taken", ["coco.json", "coco-captions.txt", "coco-figures.md"])
@pytest.mark.parametrize("folder", [True, False])
def test_what_is_there_and_no_earlier_result_is_not_replaced(coco, demo, tmp_path, monkeypatch, command, taken, folder):
    monkeypatch.setattr("flowmap.student.folder.load_student", lambda *_, **__: demo.student)
    monkeypatch.setattr(CocoRows, "measure", lambda *_: pytest.fail("nothing is measured"))
    monkeypatch.setattr(Coco, "lacking", lambda _: [])
    mine = tmp_path / taken
    mine.mkdir() if folder else mine.write_text('{"student": {}}')
    words = ("--images", 40, "--clip", "none", "--out", tmp_path / "coco.json")
    code, _, err = command("evaluate", "--student", "any", "--protocol", "coco30k", "--coco", coco.root, *words)
    assert code == 2 and f"--out: {mine} is there" in err and len(err.splitlines()) == 1
    assert folder or mine.read_text() == '{"student": {}}'
    assert [path.name for path in tmp_path.glob("coco*")].count("coco-captions.txt") == (taken == "coco-captions.txt")


def test_an_interrupted_measurement_and_an_earlier_result_are_replaced(coco, tmp_path):
    out = tmp_path / "coco.json"
    coco.write_captions(tmp_path / "coco-captions.txt")
    _check_files(out, coco)
    with pytest.raises(ValueError, match="coco-captions.txt is there"):
        _check_files(out, replace(coco, images=30))
    out.write_text('{"protocol": {}, "student": {}}')
    (tmp_path / "coco-figures.md").touch()
    _check_files(out, replace(coco, images=30))
    with pytest.raises(ValueError, match="has no figures of a student"):
        check_figures(out)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--images", 5), "--images: goes with --protocol"),
        (("--protocol", "coco30k"), "--protocol: wants --coco DIR"),
        (("--protocol", "coco30k", "--coco", ".", "--dry-run", "--metrics", "frechet"), "--metrics, --anew: do not go"),
        (("--protocol", "coco30k", "--coco", ".", "--dry-run", "--teacher-steps", 0), "--teacher-steps: 0 must be 1"),
        (("--protocol", "coco30k", "--coco", ".", "--dry-run", "--images", 1), "--images: 1 must be 2 or more"),
    ],
)
def test_what_does_not_go_with_the_protocol(demo, monkeypatch, command, more, says):
    monkeypatch.setattr("flowmap.student.folder.load_student", lambda *_, **__: demo.student)
    code, _, err = command("evaluate", "--student", "any", *more)
    assert code == 2 and says in err

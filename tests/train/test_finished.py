"""Finished runs next to each other: `flowmap compare --runs` and `flowmap plot`; run folders stay as they were."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from conftest import bytes_of
from PIL import Image

from flowmap.compare.curves import plot_runs
from flowmap.compare.finished import compare_runs, differences, labelled, read_runs, tabulated


def spoil(run, change):
    """Changes that run's metrics.json in place."""
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))


@pytest.fixture
def two(finished, tmp_path):
    """Two runs of one recipe, "a" and "b"; b's student is twice as far from the data."""
    a, b = tmp_path / "a", tmp_path / "b"
    shutil.move(finished, a)
    shutil.copytree(a, b)
    twice = lambda row: row.update({key: 2 * value for key, value in row.items()})
    spoil(b, lambda metrics: [twice(row) for row in metrics["student"].values()])
    return a, b


# ---------------------------------------------------------------- compare --runs


def test_rows_stand_side_by_side(command, two, tmp_path):
    before = [bytes_of(run) for run in two]
    code, out, err = command("compare", "--runs", *two, "--out", tmp_path / "side")
    assert (code, err) == (0, "")
    metrics = json.loads((two[0] / "metrics.json").read_text())
    cell = lambda value: f"{value:.3g}"
    one, other = (metrics["student"][k]["frechet_pixels"] for k in ("1", "2"))
    assert f"| a | {cell(one)} | {cell(other)} |" in out and f"| b | {cell(2 * one)} | {cell(2 * other)} |" in out
    assert "| a | tiny | ayf_emd, 20 steps | " in out, "what the runs are"
    level = cell(metrics["teacher"]["frechet_pixels"])
    assert out.count(f"| teacher, 4 steps | {level} | {level} |") == 1, "a teacher that all runs share has one row"
    level = cell(metrics["floor"]["frechet_pixels"])
    assert out.count(f"| real against real | {level} | {level} |") == 1
    assert (tmp_path / "side/table.md").read_text() in out and Image.open(tmp_path / "side/quality.png").size == (
        860,
        480,
    )
    assert json.loads((tmp_path / "side/runs.json").read_text())["runs"] == {"a": str(two[0]), "b": str(two[1])}
    assert [bytes_of(run) for run in two] == before
    assert command("compare", "--runs", *two, "--out", tmp_path / "side")[1] == out, "written again"


def test_without_out_the_table_is_printed_alone(command, two, tmp_path):
    before = bytes_of(tmp_path)
    code, out, _ = command("compare", "--runs", *two, "--steps", 2)
    assert code == 0 and "|  | 2 steps |" in out and "1 step" not in out and bytes_of(tmp_path) == before


def test_teachers_that_differ_have_a_row_each(two):
    spoil(two[1], lambda metrics: metrics["teacher"].update(frechet_pixels=9.0))
    found = tabulated(read_runs(two))
    assert [label for label in found["beside"] if "teacher" in label] == [
        "teacher (a), 4 steps",
        "teacher (b), 4 steps",
    ]
    assert found["beside"]["teacher (b), 4 steps"]["frechet_pixels"]["median"] == 9.0


def test_runs_of_one_value_share_a_label(two):
    a, b = read_runs(two)
    assert labelled("x", [a, b], [1.0, 1.0]) == [("x", a)] and labelled("x", [a, b], [None, 1.0]) == [("x", b)]
    assert labelled("x", [a, b, b], [1.0, 2.0, 1.0]) == [("x (a, b)", a), ("x (b)", b)]
    assert not labelled("x", [a], [None])


def test_a_step_or_a_figure_that_a_run_lacks_is_left_empty(two):
    spoil(
        two[1],
        lambda metrics: metrics.update(student={"2": {"frechet_pixels": 3.0}, "8": {"frechet_pixels": float("nan")}}),
    )
    table = compare_runs(two)
    assert "|  | 1 step | 2 steps | 8 steps |" in table and "| b |  | 3 |  |" in table


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("points: 500", "points: 600", "have different data: points is 500 and 600"),
        ("images: 100", "images: 50", "have different metrics: metrics[0].images is 100 and 50"),
        ("classes: data", "classes: uniform", "have different metrics: evaluation.classes is 'data' and 'uniform'"),
    ],
)
def test_runs_that_measure_different_things_are_refused(command, two, tmp_path, old, new, says):
    path = two[1] / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    code, out, err = command("compare", "--runs", *two, "--out", tmp_path / "side")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and f"--runs: 'a' and 'b' {says}" in err
    assert not (tmp_path / "side").exists()


def test_another_batch_size_is_no_other_data(two):
    path = two[1] / "recipe.yaml"
    path.write_text(path.read_text().replace("batch_size: 16", "batch_size: 32"))
    assert "| b |" in compare_runs(two)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a"], "--runs: give two runs or more"),
        (["a", "a"], "a: is given twice"),
        (["a", "none"], "none: is not a run folder (no recipe.yaml)"),
        (["a", "a/student"], "a/student: is not finished: it has no metrics.json"),
        (["a", "b", "--steps", 3], "--steps: no run was measured at 3 steps; there are 1, 2"),
        (["a", "b", "--budget", 9], "--budget: is for training, and --runs trains nothing"),
        (["a", "b", "--seeds", 2], "--seeds: is for training"),
        (["a", "b", "--dry-run"], "--dry-run: is for training"),
        (["a", "b", "--out", "a"], "--out: a is a run folder"),
        (["a", "b", "--out", "mine"], "--out: mine holds table.md and no runs.json"),
        (["a", "b", "--out", "a/recipe.yaml"], "--out: a/recipe.yaml cannot be a folder"),
        (["a", "b", "--recipes", "digits"], "not allowed with argument --runs"),
        (["a", "b", "lr=3"], "lr=3: is not a run folder"),
    ],
)
def test_a_mistake_is_one_line(command, two, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    before = bytes_of(tmp_path)
    code, out, err = command("compare", "--runs", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and says in err, err
    assert bytes_of(tmp_path) == before


STUDENTS = ("3", '{"one": {}}', '{"1": {"a": "x"}}')


@pytest.mark.parametrize("text", ["{}", "[]", "{", "", *(f'{{"student": {row}}}' for row in STUDENTS)])
def test_figures_that_are_none_are_named(command, two, text):
    (two[1] / "metrics.json").write_text(text)
    code, out, err = command("compare", "--runs", *two)
    if text == "{}":  # a run without metrics is an empty row
        assert code == 0 and "| b |  |  |" in out
        return
    assert (code, out, len(err.splitlines())) == (2, "", 1) and str(two[1] / "metrics.json") in err


def test_runs_of_the_same_name_are_named_by_their_paths(two, tmp_path):
    other = tmp_path / "other" / "a"
    shutil.copytree(two[0], other)
    assert [run.name for run in read_runs([two[0], other])] == [str(two[0]), str(other)]


def test_differences_name_the_key():
    one, other = {"a": [{"b": 1, "c": 2}], "d": 3}, {"a": [{"b": 1, "c": 5}], "e": 4}
    assert [*differences(one, other)] == [("a[0].c", 2, 5), ("d", 3, None), ("e", None, 4)]
    assert [*differences({"a": [1]}, {"a": [1, 2]})] == [("a", [1], [1, 2])] and not [*differences(one, one)]


# ---------------------------------------------------------------- plot


def drawn(monkeypatch):
    """The figures that are drawn from here on."""
    from matplotlib.figure import Figure

    figures, original = [], Figure.savefig
    keep = lambda self, *args, **options: figures.append(self) or original(self, *args, **options)
    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_plot_shows_loss_residual_and_metrics_of_every_run(command, two, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, before = drawn(monkeypatch), [bytes_of(run) for run in two]
    code, out, err = command("plot", *two, "--out", tmp_path / "p.png")
    assert (code, out, err) == (0, f"{tmp_path / 'p.png'}\n", "") and Image.open(tmp_path / "p.png").width > 1000
    loss, residual, metric = figures[0].axes
    assert [axes.get_title() for axes in (loss, residual, metric)] == ["loss", "residual norm", "frechet_pixels"]
    for axes in (loss, residual):
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        assert list(axes.lines[0].get_xdata()) == list(range(1, 21))
    lines = {line.get_label(): list(line.get_ydata()) for line in metric.lines}
    metrics = json.loads((two[0] / "metrics.json").read_text())
    assert lines["a"] == [metrics["student"][k]["frechet_pixels"] for k in ("1", "2")]
    assert lines["b"] == [2 * value for value in lines["a"]]
    assert set(lines["teacher, 4 steps"]) == {metrics["teacher"]["frechet_pixels"]}
    assert set(lines["real against real"]) == {metrics["floor"]["frechet_pixels"]}
    assert [bytes_of(run) for run in two] == before
    assert command("plot", two[0], "--out", tmp_path / "p.png")[0] == 0, "a plot of its own is drawn again"


def test_a_run_that_goes_on_is_drawn_without_metrics(two, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    (two[0] / "metrics.json").unlink()
    plot_runs(two[:1], tmp_path / "p.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["loss", "residual norm"]
    plot_runs(two, tmp_path / "p.png", metrics=["frechet_pixels_train"])
    assert [line.get_label() for line in figures[1].axes[2].lines][0] == "b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "--out", "p.png"], "none: is not a run folder"),
        (["a", "a", "--out", "p.png"], "a: is given twice"),
        (["a", "--out", "p.pdf"], "--out: p.pdf: must end in .png"),
        (["a", "--out", "mine.png"], "--out: mine.png is there and is no plot of flowmap's"),
        (["a", "--out", "text.png"], "--out: text.png is there and is no plot of flowmap's"),
        (["a", "--out", "a.png"], "--out: a.png is there and is no plot of flowmap's"),
        (["a", "--out", "a/log.csv/p.png"], "--out: a/log.csv cannot be a folder"),
        (
            ["a", "--out", "p.png", "--metrics", "fid"],
            "--metrics: no run has 'fid'; there are frechet_pixels, frechet_pixels_train",
        ),
        (["a", "b", "--out", "p.png"], "b/log.csv: is not the log of a run"),
        (["a", "empty", "--out", "p.png"], "empty/log.csv: is not there"),
        (["a"], "required: --out"),
        (["--out", "p.png"], "required: RUN"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_one_line(command, two, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 3)).save("mine.png")
    (tmp_path / "text.png").write_text("mine")
    (tmp_path / "a.png").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy("a/recipe.yaml", "empty/recipe.yaml")
    (two[1] / "log.csv").write_text("step,train/loss\n0,much\n")
    before = bytes_of(tmp_path)
    code, out, err = command("plot", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and says in err, err
    assert bytes_of(tmp_path) == before


def test_a_log_that_is_no_text_is_named(command, two, tmp_path):
    (two[0] / "log.csv").write_bytes(b"\xff\xfe\x00step")
    code, _, err = command("plot", two[0], "--out", tmp_path / "p.png")
    assert code == 2 and f"{two[0] / 'log.csv'}: is not the log of a run" in err


def test_a_run_that_logged_nothing_has_nothing_to_draw(command, two, tmp_path):
    (two[0] / "log.csv").write_text("step\n")
    (two[0] / "metrics.json").unlink()
    code, _, err = command("plot", two[0], "--out", tmp_path / "p.png")
    assert code == 2 and "these runs have logged no step yet" in err


def test_without_matplotlib_it_says_what_to_install(command, two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command("plot", two[0], "--out", tmp_path / "p.png")
    assert (code, out, len(err.splitlines())) == (
        2,
        "",
        1,
    ) and "needs matplotlib: pip install 'flowmap-distillation[bench]'" in err
    assert not (tmp_path / "p.png").exists()

"""The HTML report: all of a run's pictures, curves, figures, costs and settings in one file without resources."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from flowmap.compare import html
from flowmap.compare.run_report import write_run_report
from tests.support.browser import browser


class Page(HTMLParser):
    """The tags, the sources and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def report(*runs, out, **options) -> Page:
    return Page(write_run_report(runs, out, **options).read_text())


def test_the_report_of_a_run_has_everything_and_loads_nothing(finished, tmp_path):
    page = report(finished, out=tmp_path / "report.html")
    kinds = [source.partition(";")[0] for source in page.sources]
    assert kinds == ["data:image/png", "data:image/png", "data:image/png", "data:image/gif"]
    assert "script" not in page.tags and "link" not in page.tags
    metrics = json.loads((finished / "metrics.json").read_text())
    for words in (
        "finished, 20 steps", "student, 1 step", "teacher, 4 steps", "real against real", "ayf_emd",
        "warmup_steps: 12", f"{metrics['student']['2']['frechet_pixels']:.4g}",
    ):  # fmt: skip
        assert words in page.text, words
    assert "Side by side" not in page.text and "Settings that differ" not in page.text


def test_two_runs_are_side_by_side_and_their_settings_compared(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("warmup_steps: 12", "warmup_steps: 15"))
    page = report(finished, other, out=tmp_path / "report.html", draw=False)
    assert "Side by side" in page.text and re.search(r"objective\.warmup_steps\s*12\s*15", page.text)
    assert page.text.count("made with --no-draw") == 2 and "image/gif" not in "".join(page.sources)
    recipe.write_text(recipe.read_text().replace("points: 500", "points: 400"))
    page = report(finished, other, out=tmp_path / "report.html", draw=False)
    assert "No table" in page.text and "points is 500 and 400" in page.text


def test_the_seconds_of_training_are_those_of_its_logged_steps(finished, tmp_path):
    rows = [{"step": "0", "speed/step_seconds": "2.0"}, {"step": "9", "speed/step_seconds": "0.5"}, {"step": "12"}]
    text = "step,speed/step_seconds\n" + "".join(f"{r['step']},{r.get('speed/step_seconds', '')}\n" for r in rows)
    (finished / "log.csv").write_text(text)
    page = report(finished, out=tmp_path / "report.html", draw=False)
    assert re.search(r"training\s*seconds\s*6\.5\s*steps\s*13", page.text), "2 s once, 0.5 s nine times"


def test_an_unfinished_run_is_said_to_be_one(finished, tmp_path):
    (finished / "metrics.json").unlink()
    shutil.rmtree(finished / "student")
    shutil.rmtree(finished / "samples")
    page = report(finished, out=tmp_path / "report.html")
    assert "not finished: 20 of 20 steps are logged" in page.text and page.text.count("no student yet") == 2
    (finished / "log.csv").unlink()
    assert "have logged no step" in report(finished, out=tmp_path / "report.html").text


def test_a_run_without_pictures_has_samples_that_are_drawn_now(finished, tmp_path):
    shutil.rmtree(finished / "samples")
    page = report(finished, out=tmp_path / "report.html")
    assert "Drawn for this report" in page.text and len(page.sources) == 4


def test_the_command_writes_over_its_own_file_alone(finished, tmp_path, command):
    out = tmp_path / "page.html"
    arguments = ("report", finished, "--no-draw", "--out", out)
    assert command(*arguments)[:2] == (0, f"{out}\n") and command(*arguments)[0] == 0
    out.write_text("<html>mine</html>")
    code, _, err = command(*arguments)
    assert code == 2 and "no report of flowmap's" in err and out.read_text() == "<html>mine</html>"
    code, _, err = command("report", finished, "--out", tmp_path / "page.txt")
    assert code == 2 and "must end in .html" in err
    code, _, err = command("report", tmp_path, "--out", tmp_path / "new.html")
    assert code == 2 and "is not a run folder" in err


def test_text_is_escaped():
    parts = [html.paragraph("<b>"), html.table(["<i>"], [["<u>"]]), html.folded("<s>", "<p>"), html.heading(2, "<a>")]
    page = Page(html.document("<x>", parts, made_by=""))
    assert not {"b", "i", "u", "s", "a", "x"} & set(page.tags)
    assert html.from_markdown(["| a | b |", "| --- | ---: |", "| 1 | 2 |"]) == html.table(["a", "b"], [["1", "2"]])


@pytest.mark.slow
def test_a_browser_shows_every_picture(finished, tmp_path):
    path = write_run_report([finished], tmp_path / "report.html")
    with browser() as chromium:
        chromium.open(path.as_uri())
        chromium.wait_for("[...document.images].length == 4 && [...document.images].every(one => one.naturalWidth > 0)")
        assert chromium.run("return performance.getEntriesByType('resource').every(e => e.name.startsWith('data:'))")
        assert chromium.run("return document.body.scrollWidth <= window.innerWidth"), "nothing is wider than the page"

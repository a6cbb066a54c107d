"""A Space: the folder of the student, an app that serves its page, and the metadata that a hub reads."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request

import pytest
import torch
import yaml

from flowmap.export import export
from flowmap.export.folder import STAMP
from flowmap.student.folder import load_student
from tests.conftest import bytes_of
from tests.support.browser import free_port, wait_until_open
from tests.support.hub import standing_in


def test_the_folder_has_the_student_the_app_and_the_metadata(finished, tmp_path, command):
    code, out, err = command("export", "--student", finished, "--to", "space", "--out", tmp_path / "space")
    assert code == 0 and out.strip() == str(tmp_path / "space"), err
    files = {name.split("/")[0] for name in bytes_of(tmp_path / "space")}
    assert files == {"app.py", "requirements.txt", "README.md", "student", STAMP}
    here, there = load_student(finished), load_student(tmp_path / "space" / "student")
    assert torch.equal(here.sample(5, steps=2), there.sample(5, steps=2))
    about = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert (about["sdk"], about["app_file"], about["title"]) == ("gradio", "app.py", "tiny")
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("flowmap-distillation[demo]>=")
    code, _, err = command("export", "--student", finished, "--to", "space", "--out", tmp_path / "space")
    assert code == 2 and "--overwrite replaces it" in err


@pytest.mark.parametrize("given", [{"steps": 2}, {"guidance": 2.0}, {"custom": True}])
def test_settings_that_the_visitor_chooses_are_refused(finished, tmp_path, given):
    with pytest.raises(ValueError, match=f"--{[*given][0]}"):
        export(load_student(finished), tmp_path / "space", to="space", **given)
    assert not (tmp_path / "space").exists()


def test_push_creates_a_space(finished, tmp_path, command, monkeypatch):
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        arguments = ("--student", finished, "--to", "space", "--out", tmp_path / "p", "--push", "owner/name")
        code, _, err = command("export", *arguments)
        assert code == 0, err
        assert [(one["type"], one["sdk"]) for one in hub.created] == [("space", "gradio")]
        assert hub.files("owner/name") == bytes_of(tmp_path / "p")


@pytest.mark.slow  # a process that imports both; test_demo has the page itself
def test_the_app_serves_the_page(finished, tmp_path):
    pytest.importorskip("gradio")
    from gradio_client import Client

    space, port = export(load_student(finished), tmp_path / "space", to="space"), free_port()
    where = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    app = subprocess.Popen([sys.executable, space / "app.py"], cwd=tmp_path, env={**os.environ, **where})
    try:
        wait_until_open(port, seconds=120)
        address = f"http://127.0.0.1:{port}"
        assert b"flowmap: tiny" in urllib.request.urlopen(address, timeout=30).read()
        drawn = Client(address, verbose=False).predict(seed=1, api_name="/draw")
        assert [one.split("**")[1] for one in drawn[::2]] == ["student, 1 step", "student, 2 steps"]
    finally:
        app.terminate()
        app.wait(30)

"""The Python of docs/guide/export.md runs, block by block, on a student as a run of digits leaves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowmap.nets import DiT
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig
from flowmap.student.folder import save_student
from tests.export.alone import own_modules, shaken

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "export.md"


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    own_modules(monkeypatch, tmp_path)
    config = StudentConfig(
        DiT(preset="nano", depth=1), Deterministic(), (1, 8, 8), num_classes=10, guidance=(1.0, 2.0, 1.5)
    )
    weights = shaken(config).flow_map.state_dict()
    save_student(tmp_path / "runs" / "digits" / "student", config, weights, recipe="name: digits\n", card="# digits\n")
    names: dict = {}
    for text in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(compile(text, str(PAGE), "exec"), names)
    assert names["images"][0].size == (8, 8) and names["samples"].shape == (3, 1, 8, 8)

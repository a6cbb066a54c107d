"""A run logs a table of samples at each evaluation of samples: rows of the same noise and condition."""

from __future__ import annotations

import pytest
from PIL import Image

import flowmap
from flowmap.train.csv_log import CSVLog

FLOW = """
name: flow
data: {kind: digits, batch_size: 8}
student: {kind: mlp, width: 8, depth: 1}
times: {kind: uniform}
objective: {kind: flow_matching}
sampler: {kind: deterministic, steps: [1]}
trainer: {steps: 2, accelerator: cpu}
evaluation: {teacher_steps: 2}
log: {wandb: false, every_steps: 1, grid_images: 1}
"""
RECIPE = """
name: small
data: {kind: digits, batch_size: 8}
teacher: {recipe: flow.yaml}
student: {kind: from_teacher}
times: {kind: interval}
objective: {kind: ayf_emd, warmup_steps: 2}
optimizer: {lr: 1.0e-2}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 4, accelerator: cpu}
ema: {kind: constant, decay: 0.5}
evaluation: {teacher_steps: 2}
log: {wandb: false, every_steps: 1, grid_images: 5, samples_every_steps: 2, table_samples: 3}
"""


class Recorder(CSVLog):
    def __init__(self, path):
        super().__init__(path, keep_below=0)
        self.tables = []

    def log_table(self, key, columns, data, step=None):
        self.tables.append((key, columns, data, step))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """recorded(overrides) -> the tables that a run logs."""

    def run(*overrides):
        monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
        (tmp_path / "flow.yaml").write_text(FLOW)
        (tmp_path / "small.yaml").write_text(RECIPE.replace("flow.yaml", str(tmp_path / "flow.yaml")))
        recorder = Recorder(tmp_path / "recorded.csv")
        monkeypatch.setattr("flowmap.train.stage.loggers_of", lambda *_, **__: [recorder])
        recipe = flowmap.read_recipe(tmp_path / "small.yaml", overrides)
        flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
        return [one for one in recorder.tables if len(one[1]) == 7]  # the others are those of the teacher's run

    return run


def test_a_table_at_each_evaluation_of_samples(recorded):
    tables = recorded()
    assert [(key, step) for key, _, _, step in tables] == [("samples/table", 1), ("samples/table", 3)]
    (_, columns, first, _), (_, _, last, _) = tables
    assert columns == ["step", "seed", "sample", "condition", "1 step", "2 steps", "teacher"]
    assert [row[:4] for row in first] == [[2, 1234, i, str(i)] for i in range(3)]
    assert [row[:4] for row in last] == [[4, *row[1:4]] for row in first]
    assert all(isinstance(cell, Image.Image) for row in first + last for cell in row[4:])
    assert [row[6].tobytes() for row in first] == [row[6].tobytes() for row in last], "the teacher's are the same"
    assert [row[4].tobytes() for row in first] != [row[4].tobytes() for row in last], "the student has learned"


def test_none_is_logged_if_none_is_asked_for(recorded):
    assert recorded("log.table_samples=0") == []

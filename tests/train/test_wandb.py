"""An offline W&B run shows what was promised, and neither asks for a login nor waits for a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import TINY

import flowmap
from flowmap.train.csv_log import read_log
from flowmap.train.run_folder import written


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(TINY.replace("wandb: false", "wandb: true"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "HOME": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    command = [sys.executable, "-m", "flowmap", "fit", "--recipe", str(path), "--out", str(out)]
    kill = "import flowmap.train.callbacks as c, os, sys; from flowmap.cli import main; keep = c.Keep.keep\n"
    kill += "c.Keep.keep = lambda *a: (keep(*a), os._exit(9))\nmain(sys.argv[1:])"
    stopped = subprocess.run(
        [sys.executable, "-c", kill, *command[3:]], env=clean, capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 9, stopped.stderr
    first = (out / "wandb" / "run-id").read_text()
    done = subprocess.run([*command, "--resume"], env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [p.name.split("-")[-1] for p in sorted(out.glob("wandb/offline-run-*"))] == [first, first]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "offline"])
def test_what_an_offline_run_shows(tmp_path, mode):
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(TINY.replace("wandb: false", "wandb: true, samples_every_steps: 10, metrics_every_steps: 10"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "no-netrc"),
    }
    environment = clean | ({"WANDB_MODE": mode} if mode else {})
    command = [sys.executable, "-m", "flowmap", "fit", "--recipe", str(path), "--out", str(out)]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stderr and "Traceback" not in done.stderr

    look = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(out / "wandb")]
    seen = json.loads(subprocess.run(look, env=clean, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert (seen["state"], seen["exit_code"], seen["name"]) == ("finished", 0, "tiny")
    last = seen["summary"]
    assert {
        "train/loss",
        "train/tangent_norm",
        "train/tangent_weight",
        "train/tangent_against_difference",
        "train/lr",
    } <= set(last)
    assert {"speed/images_per_second", "speed/step_seconds", "speed/memory_gib"} <= set(last)
    assert {"metrics/frechet_pixels/1", "metrics/frechet_pixels/2"} <= set(last)
    assert any(key.startswith("by_time/tangent_norm_t") for key in last)
    assert last["trainer/global_step"] == 19
    for name in ("1 step", "2 steps", "teacher"):
        picture = last[f"samples/{name}"]["filenames"][0]
        assert next(out.glob(f"wandb/offline-run-*/files/{picture}")).is_file()
    table = last["samples/table"]
    kept = json.loads(next(out.glob(f"wandb/offline-run-*/files/{table['path']}")).read_text())
    assert kept["columns"] == ["step", "seed", "sample", "condition", "1 step", "2 steps", "teacher"]
    assert kept["data"] == [[20, 1234, 0, "", "Image", "Image", "Image"]]
    staged = [path.read_bytes()[:4] for path in out.glob("wandb/flowmap-tables/artifacts/staging/*")]
    assert staged.count(b"\x89PNG") == 6, "the pictures of both tables are in the run's folder"
    assert out / "wandb" / "flowmap-tables" in set(written(out)), "and are replaced with it"
    assert len([*out.glob("wandb/offline-run-*/files/media/table/samples/*.json")]) == 2, "after 10 and 20 steps"
    assert {"charts/frechet_pixels_by_steps_table", "charts/tangent_norm_by_time_table"} <= set(last)
    key = "metrics/frechet_pixels/1"
    assert last[f"best/{key.partition('/')[2]}"] == min(
        float(row[key]) for row in read_log(out / "log.csv") if key in row
    )
    from flowmap.base.schema import to_plain
    from flowmap.recipe.kinds import TABLES

    resolved = json.loads(json.dumps(to_plain(flowmap.read_recipe(path), TABLES)))
    assert seen["config"] == resolved

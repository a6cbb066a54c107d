"""Every setting of every shipped recipe, with a typing error: a dry run reports it in one line, or the recipe trains.

`pytest tests/recipe/test_mutations.py -m slow -s` tries each distinct setting once, by (kind, key, value), and prints
the counts; the default suite takes a sample of them.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

import flowmap
from flowmap.base.schema import to_plain
from flowmap.cli import main
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import list_recipes, read_recipe

SLIPS = {"null": None, "text": "text", "list": [1], "nan": math.nan, "inf": math.inf, "-1": -1, "0": 0, "1e40": 1e40}
LARGE = ("flux", "sd35", "sd15", "sana", "imagenet", "dit256", "z-image", "hunyuan", "lumina2", "sdxl", "pixart",
         "qwen-image", "auraflow")  # fmt: skip
SECONDS = 6.0  # of a processor's time for one dry run; the first in a process imports libraries as well
TOY = ("toy/mixture",)

Slip = tuple[str, str, str, dict[str, Any]]  # recipe, where, what, all settings with it


def slips(recipes: list[str]) -> Iterator[Slip]:
    """Every setting of those recipes with every slip, each once by (kind, key, slip)."""
    seen: set[tuple[str, str, str]] = set()
    for name in recipes:
        plain = to_plain(read_recipe(name), TABLES)
        for kind, path in places(plain, ""):
            for slip in ("typo", *SLIPS):
                if slip == "typo" and isinstance(path[-1], int):
                    continue
                key = "[]" if isinstance(path[-1], int) else path[-1]
                if (kind, key, slip) not in seen:
                    seen.add((kind, key, slip))
                    yield name, ".".join(map(str, path)), slip, changed(plain, path, slip)


def places(node: Any, kind: str, path: tuple = ()) -> Iterator[tuple[str, tuple]]:
    """(kind of the settings, path) of everything in a recipe; the kind of a list's entry is its key's."""
    if isinstance(node, dict):
        slot = ".".join(str(part) for part in path if not isinstance(part, int))
        kind = f"{slot.rpartition('.')[2]}:{node['kind']}" if "kind" in node else slot
    children = node.items() if isinstance(node, dict) else list(enumerate(node))[:1] if isinstance(node, list) else ()
    for key, child in children:
        yield kind, (*path, key)
        yield from places(child, kind if isinstance(child, dict) else f"{kind}.{key}", (*path, key))


def changed(plain: dict, path: tuple, slip: str) -> dict:
    """The settings with one of them mistyped or given another value."""
    plain = copy.deepcopy(plain)
    node = plain
    for part in path[:-1]:
        node = node[part]
    if slip == "typo":
        node[f"{path[-1]}x"] = node.pop(path[-1])
    else:
        node[path[-1]] = SLIPS[slip]
    return plain


def tried(plain: dict, folder: Path) -> tuple[int, str, float]:
    """(exit code, what is said, seconds of a processor) of a dry run of these settings."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["fit", "--dry-run", "--recipe", str(path), "--out", str(folder / "run")])
    return code, err.getvalue() if code == 2 else out.getvalue(), time.process_time() - began


def check(all_slips: list[Slip], folder: Path) -> tuple[Counter, list[Slip], tuple[float, str]]:
    """Try all slips; return the counts of exit codes, the accepted slips, and the slowest.

    AssertionError lists those that failed.
    """
    codes, accepted, wrong, slowest = Counter(), [], [], (0.0, "")
    for slip in all_slips:
        name, where, what, plain = slip
        label = f"{name} {where} {what}"
        try:
            code, said, seconds = tried(plain, folder)
        except BaseException as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}"[:300])
            continue
        codes[code] += 1
        accepted += [slip] if code == 0 else []
        slowest = max(slowest, (seconds, label))
        if code not in (0, 2, 3) or "Traceback" in said or (code == 2 and said.count("\n") != 1):
            wrong.append(f"{label}: exit {code}: {said}"[:300])
        if seconds > SECONDS * (
            5 if any(part in name for part in LARGE) else 1
        ):  # whose networks of billions are built on the meta device
            wrong.append(f"{label}: {seconds:.1f} s")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(all_slips)}:", *wrong])
    return codes, accepted, slowest


def train(slip: Slip, folder: Path) -> str | None:
    """What is wrong when the accepted settings train two steps of a tiny batch; None where they do."""
    name, where, what, plain = slip
    small = {
        "data.batch_size": 4,
        "data.points": 50,
        "trainer.steps": 2,
        "evaluation.teacher_steps": 2,
        "log.grid_images": 4,
        "log.wandb": False,
    }
    plain = copy.deepcopy(plain)
    for key, value in small.items():
        section, name_ = key.split(".")
        if key != where and name_ in plain[section]:
            plain[section][name_] = value
    if not where.startswith("metrics"):
        plain["metrics"] = []
    for metric in plain["metrics"]:
        metric.update(
            {key: 20 for key in ("images",) if metric.get(key, 0) > 20}
            | {key: 2 for key in ("steps",) if metric.get(key, 0) > 2}
        )
    path = folder / "accepted.yaml"
    path.write_text(yaml.safe_dump(plain))
    try:
        flowmap.fit(
            read_recipe(path),
            folder / f"run-{hashlib.sha1(f'{where}{what}'.encode()).hexdigest()[:8]}",
            log=lambda message: None,
        )
    except BaseException as error:
        return f"{name} {where} {what}: {type(error).__name__}: {error}"[:300]
    return None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, so that a text in the place of a path names nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))


def ordered() -> list[str]:
    """The shipped recipes, those that are quick to look at first."""
    return sorted(
        list_recipes(), key=lambda name: (name not in TOY, any(part in name for part in LARGE), "/" in name, name)
    )


def test_a_sample_of_slips_is_told_in_one_line(tmp_path):
    chosen = [
        slip
        for slip in slips(["toy/mixture", "digits"])
        if int(hashlib.sha1(f"{slip[1]}{slip[2]}".encode()).hexdigest(), 16) % 16 == 0
    ]
    codes, _, _ = check(chosen, tmp_path)
    assert codes[2] > 25


@pytest.mark.slow
def test_every_slip_is_told_in_one_line_and_what_is_accepted_trains(tmp_path):
    everything = list(slips(ordered()))
    codes, accepted, slowest = check(everything, tmp_path)
    toys = [slip for slip in accepted if slip[0] in TOY]
    wrong = [told for slip in toys if (told := train(slip, tmp_path))]
    print(
        f"\n{len(everything)} slips; exit codes {dict(codes)}; slowest {slowest[0]:.2f} s ({slowest[1]}); "
        f"{len(toys)} of the toy's trained"
    )
    assert not wrong, "\n".join([f"{len(wrong)} of {len(toys)}:", *wrong])

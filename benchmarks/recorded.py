"""Do the recipes of tests/recorded still train to the same bits?  Short digits, LeDiFlow, InstaFlow, language runs.

Every run is made in --out by `flowmap fit` with the code of this checkout, one thread, seed 0, with its pairs and
priors.  Its files (weights, checkpoint, log.csv and metrics.json, without times and memory) are hashed into
digests.json.  --against compares with a folder that another commit filled on the same machine (other processors round
differently).
`python benchmarks/recorded.py --out FOLDER [--against FOLDER]`
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "tests" / "recorded"
NAMES = ("short-digits", "lediflow", "instaflow", "language")
VARY = ("seconds", "memory", "per_second", "gib", "second")  # words in the names of what differs from run to run


def record(out: Path) -> dict[str, str]:
    """Trains all of them in that folder; {file in the folder: digest}."""
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny_text import wordnet_files

    shutil.copytree(RECIPES, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    wordnet_files(out / "wordnet")
    quiet = {"FLOWMAP_RUNS": "runs", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in NAMES:
        command = [
            sys.executable,
            "-m",
            "flowmap",
            "fit",
            "--recipe",
            f"{name}.yaml",
            "trainer.accelerator=cpu",
            "--out",
            f"runs/{name}",
        ]
        subprocess.run(
            command, cwd=out, env=os.environ | quiet, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        print(f"{name}: trained", flush=True)
    found = digests(out / "runs")
    (out / "digests.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def digests(runs: Path) -> dict[str, str]:
    """Of everything in the runs that should not change: the bytes of weights and recipes, figures without times."""
    found = {}
    for path in sorted(path for path in runs.rglob("*") if path.is_file()):
        name = str(path.relative_to(runs))
        if path.suffix in (".safetensors", ".arrow") or path.name == "config.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "last.ckpt":
            found[name] = checkpoint(path)
        elif path.name == "log.csv":
            rows = [
                {key: value for key, value in row.items() if not varies(key)} for row in csv.DictReader(path.open())
            ]
            found[name] = digest(rows)
        elif path.name == "metrics.json":
            found[name] = digest(steady(json.loads(path.read_text())))
    return found


def checkpoint(path: Path) -> str:
    import torch

    kept = torch.load(path, weights_only=True)
    tensors = hashlib.sha256()
    for key in ("state_dict", "optimizer_states"):
        for name, value in leaves(kept[key], key):
            tensors.update(f"{name} ".encode())
            tensors.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return tensors.hexdigest()


def leaves(node, name: str):
    """(path, value) of everything in nested dicts and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from leaves(value, f"{name}.{i}")
    else:
        yield name, node


def steady(node):
    """The figures without those of time and memory."""
    if isinstance(node, dict):
        return {key: steady(value) for key, value in node.items() if not varies(key)}
    return [steady(value) for value in node] if isinstance(node, list) else node


def varies(key: str) -> bool:
    return any(word in key for word in VARY)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    a = parser.parse_args()
    if (a.out / "runs").exists():
        raise SystemExit(f"{a.out} holds runs; choose an empty folder")
    found = record(a.out.resolve())
    print(f"{len(found)} files in {a.out}")
    if a.against:
        before = json.loads((a.against / "digests.json").read_text())
        other = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
        print("\n".join(f"differs: {name}" for name in other) or f"all {len(found)} files as in {a.against}")
        raise SystemExit(bool(other))


if __name__ == "__main__":
    main()

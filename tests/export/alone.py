"""What the tests of exports share: tiny students, and Python in which flowmap cannot be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.student import Student

os.environ["HF_HUB_OFFLINE"] = "1"
SHIM = (
    Path(__file__).parents[2] / "flowmap" / "base" / "torchvision_shim.py"
)  # for torchvision, which may be broken here; the export needs none
PRELUDE = f"""
import runpy, sys
runpy.run_path({str(SHIM)!r})["install"]()
sys.modules["flowmap"] = None
import torch; torch.set_num_threads(1)
"""


def alone(script: str, folder: Path) -> None:
    """Runs the script in `folder` in another process without flowmap; what it saves there is for the caller."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def own_modules(monkeypatch, folder: Path) -> None:
    """diffusers copies a folder's own code to a cache before it imports it: here to one below `folder`."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder / "modules"))


def snippet(folder: Path) -> str:
    """The Python lines of the folder's card, with the folder in place of the path that they name."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1].replace(
        "path/to/this/folder", str(folder)
    )


def shaken(config: StudentConfig, std: float = 0.1) -> Student:
    """A student with random weights in every branch."""
    torch.manual_seed(0)
    flow_map = config.build().eval().requires_grad_(False)
    for p in flow_map.parameters():
        p.add_(std * torch.randn_like(p))
    return Student(config, flow_map)


def foreign(model, scheduler, shape, sampler=None, time_unit=None, **more) -> Student:
    """A student whose network is that diffusers model on that scheduler's clock; time_unit: it embeds that times t."""
    plain = lambda config: json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_")}, sort_keys=True)
    names = (type(model).__name__, plain(model.config), type(scheduler).__name__, plain(scheduler.config))
    net = DiffusersModel(*names, time_unit=time_unit)
    return shaken(
        StudentConfig(
            net,
            sampler or Deterministic(),
            shape,
            **{"samples": Pixels(clamp=False), "guidance": (1.0, 3.0, 2.0), **more},
        )
    )

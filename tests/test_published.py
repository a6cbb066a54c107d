"""Networks of examples/published/ with the weights that others published: they are the models that they claim to be."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT.parent / "shared/published"


@pytest.fixture(scope="module")
def flow_vit():
    names = runpy.run_path(str(ROOT / "examples/published/mnist_flow_vit.py"))
    path = PUBLISHED / names["WEIGHTS"]
    if not path.is_file():
        pytest.skip(f"{names['WEIGHTS']} is not here: shared/published is only in some checkouts")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == names["SHA256"]
    net = names["FlowViT"]().eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


@torch.no_grad()
def euler(net, z, labels, steps):
    """Samples in [0, 1] of a network that predicts them; its time goes from noise at 0 to data at 1."""
    x = z
    for i in range(steps):
        x = x + (net(x, torch.full((len(z),), i / steps), labels) - x) / (steps - i)
    return x


@pytest.mark.parametrize(
    ("many", "errors"),
    [
        (50, {1: 0.193, 2: 0.1154, 4: 0.0788, 8: 0.0514}),
        pytest.param(200, {1: 0.199, 2: 0.128, 4: 0.097, 8: 0.073}, marks=pytest.mark.slow),
    ],
)
def test_few_steps_of_the_published_flow_miss_its_end_points_by_the_recorded_errors(flow_vit, many, errors):
    z, labels = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    ends = euler(flow_vit, z, labels, many)
    found = {n: float((euler(flow_vit, z, labels, n) - ends).square().mean().sqrt()) for n in errors}
    assert found == pytest.approx(errors, rel=0.04)  # those of 200 steps are of other noise

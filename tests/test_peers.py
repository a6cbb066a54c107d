"""benchmarks/lib/peers.py, tested with a peer written here.

It gets our times, our noise and our network, and installed packages are never replaced by a stub.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flowmap.flow.path import Linear
from flowmap.nets.dit import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import MeanFlow
from tests.support.tiny_nets import with_random_weights

MADE_UP = """
import torch
def sample_two_timesteps(args, num_samples, device):
    raise AssertionError("not our times")
class MeanFlow(torch.nn.Module):
    def __init__(self, arch, args, settings):
        super().__init__()
        self.net, self.beside, self.args = arch(**settings), arch(**settings), args
    def forward_with_loss(self, x, cond):
        noise = torch.randn_like(x)
        t, r = (one.view(-1, 1, 1, 1) for one in sample_two_timesteps(self.args, num_samples=len(x), device=x.device))
        flow = lambda z, t: self.net(z, (t.view(-1), (t - r).view(-1)), cond)
        value, rate = torch.func.jvp(flow, ((1 - t) * x + t * noise, t), (noise - x, torch.ones_like(t)))
        error = (value - (noise - x - (t - r) * rate).detach()).square().sum((1, 2, 3))
        return (error / (error.detach() + self.args.norm_eps) ** self.args.norm_p).mean()
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import lib.peers as shared

    yield shared
    for name in ("lib.peers", "models", "models.meanflow"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "meanflow/models").mkdir(parents=True)
    (tmp_path / "meanflow/models/meanflow.py").write_text(MADE_UP)
    (tmp_path / "LICENSE").write_text("\n=====\nOne licence\nand more\n")
    return tmp_path


def test_a_peer_is_asked_at_our_times_with_our_noise(peers, folder):
    student = FlowMapNet(with_random_weights(DiT(preset="nano").build((3, 4, 6), num_classes=2))).double()
    t, s = (
        torch.tensor([0.9, 0.7, 0.6, 1.0, 0.2], dtype=torch.float64),
        torch.tensor([0.1, 0.7, 0.5, 0.0, 0.0], dtype=torch.float64),
    )
    x0 = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(7)
    sample = Linear().sample(x0, torch.randn_like(x0), t, s, {"class": torch.tensor([0, 1, -1, 1, 0])})
    theirs = peers.PyMeanFlow(folder).mean_flow(student, power=1.0, offset=1e-3)(sample, 7, 0)
    ours = MeanFlow()(student, None, sample, 0).value
    gradients = [torch.autograd.grad(loss, list(student.parameters()), allow_unused=True) for loss in (theirs, ours)]
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=0)  # rounding of t - (t - r)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_checkout_says_its_licence_and_no_commit_of_another(peers, folder):
    said = peers.Checkout.of(folder, ["left out"]).said()
    assert said == {"commit": None, "licence": "One licence", "stubbed": ["left out"]}


def test_only_what_is_not_installed_is_stood_in_for(peers):
    with peers._standing_in(("torch", "surely_not_installed")) as asked:
        import surely_not_installed.part
        import torch as found

        assert surely_not_installed.part.anything.at_all(1).more is not None
    assert asked == ["surely_not_installed"] and found is torch
    for name in ("surely_not_installed", "surely_not_installed.part"):
        del sys.modules[name]
    with pytest.raises(ImportError):
        import surely_not_installed  # noqa: F401


def test_a_peer_that_is_not_there_is_a_row_that_says_so(peers, tmp_path, capsys):
    import peers as benchmark
    import tables.peers as made

    assert benchmark.load(peers.FastGen, tmp_path / "absent") is None and benchmark.load(peers.PyMeanFlow, None) is None
    assert capsys.readouterr().out.count("not there") == 2
    rows = benchmark.all_rows(None, None, to_train=True)
    kept = {"steps": 3, "step_seconds": 0.1, "failed": None, "figures": {"1": 0.5, "2": 0.25, "4": 0.25}}
    kept["figures_train"] = {"1": 0.4, "2": 0.2, "4": 0.1}
    trained = {seed: [{"job": row.job, "whose": row.whose, **kept} for row in rows if row.make] for seed in range(2)}
    lines = list(made.quality(rows, trained))
    assert [line[2] for line in lines if line[1] != "flowmap"] == ["not there"] * 6
    assert lines[0][2:] == [3, 100.0, "0.5", "0.25", "0.25", "0.4", "0.2", "0.1"]
    assert all(len(line) == len(made.QUALITY) for line in lines)
    baseline = {"teacher": {"steps": 64, "figure": 0.3, "figure_train": 0.2}, "floor": 0.3, "floor_train": 0.1}
    more = list(made.quality(rows, {seed: [*found, baseline] for seed, found in trained.items()}))[-2:]
    assert [len(line) for line in more] == [len(made.QUALITY)] * 2 and more[1][4:] == [
        "0.3",
        "",
        "",
        "0.1",
        "",
        "",
    ]


def test_the_network_of_every_job_has_what_its_objective_asks_of_it(peers):
    """Training here is by the benchmark's own loop, which adds no branch of a learned weight."""
    import lib.peers_jobs as jobs

    assert not any(jobs.Job.recipe_of(name, 0).objective.learns_weight for name in jobs.JOBS)

"""benchmarks/lib/peers.py, tested with a peer written here.

It gets our times, our noise and our network, and installed packages are never replaced by a stub.
"""

from __future__ import annotations

import dataclasses
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
    for name in ("lib.peers", "lib.peers_jobs", "tables.peers", "peers", "step_cost", "models", "models.meanflow"):
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
    checkout = peers.Checkout.of(folder, ["left out"])
    said = checkout.said()
    assert said == {"commit": None, "date": None, "licence": "One licence", "stubbed": ["left out"]}
    assert checkout.state == "an unknown commit"
    dated = dataclasses.replace(checkout, commit="0123456789", date="2026-02-25")
    assert dated.state == "commit 0123456 of 2026-02-25"


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
    few = benchmark.wanted(rows, ["sCM from a teacher: FastGen as"])
    assert [row.whose for row in few] == ["flowmap", "flowmap as recommended", "FastGen as published"]
    assert benchmark.wanted(rows, [""]) == rows
    trained = {seed: [result(row, 0.5, 0.25, 0.25) for row in rows if row.make] for seed in range(2)}
    distance = list(made.figures(rows, trained, ["frechet_pixels"], costs=True))
    assert [line[2] for line in distance if not line[1].startswith("flowmap")] == ["not there"] * 7
    assert distance[0][2:] == [3, 100.0, "0.5", "0.25", "0.25"]
    baseline = {"teacher": {"steps": 64, "frechet_pixels": 0.3}, "floor": {"frechet_pixels": 0.2}}
    more = list(made.figures(rows, {0: [*trained[0], baseline]}, ["frechet_pixels"], costs=True))
    assert [len(line) for line in more] == [7] * len(more)
    assert [line[:1] + line[4:] for line in more[-2:]] == [
        ["teacher at 64 steps", "0.3", "0.3", "0.3"],
        ["real against real", "0.2", "0.2", "0.2"],
    ]
    assert all(line[2:] == ["not there", "", "", "", ""] for line in made.ahead(rows, trained))


def test_a_loss_is_compared_with_the_best_peer_of_its_seed_and_steps(peers):
    import lib.peers_jobs as jobs
    import tables.peers as made

    loss = lambda *unused: None
    ours, ayf = (jobs.Row(job, "flowmap", loss) for job in (jobs.TAUGHT, jobs.AYF))
    theirs = [jobs.Row(jobs.TAUGHT, "FastGen", loss), jobs.Row(jobs.SCM, "FastGen", loss)]
    rows = [ours, ayf, *theirs, jobs.Row(jobs.AYF, "FastGen", None), jobs.Row(jobs.DATA, "py-meanflow", loss)]
    trained = {
        0: [result(ours, 1, 2, 3), result(ayf, 1, 1, 9), result(theirs[0], 2, 4, 3), result(theirs[1], 4, 2, 1)],
        1: [result(ours, 1, 4, 1), result(ayf, 3, 1, 9), result(theirs[0], 2, 4, 2), result(theirs[1], 4, 2, 1)],
    }
    of_mean_flow, of_ayf = made.ahead(rows, trained)
    assert of_mean_flow[2:] == ["FastGen", "0.5", "0.75 (0.5 to 1)", "0.75 (0.5 to 1)", "1"]
    assert of_ayf[2] == "MeanFlow from a teacher: FastGen, sCM from a teacher: FastGen"
    assert of_ayf[3:] == ["1 (0.5 to 1.5)", "0.5", "9", "2"]
    trained[1][0]["failed"] = "the loss is nan"
    assert made.ratio(ours, theirs[:1], trained[1], 1) == float("inf")
    assert next(made.ahead(rows, trained))[-1] == ""


def result(row, *distances: float) -> dict:
    """What a training of that row left, with those distances at 1, 2 and 4 steps."""
    figures = {str(k): {"frechet_pixels": value} for k, value in zip((1, 2, 4), distances, strict=True)}
    return {
        "job": row.job,
        "whose": row.whose,
        "steps": 3,
        "step_seconds": 0.1,
        "failed": None,
        "figures": figures,
    }


def test_the_step_of_a_peer_is_timed_on_our_network_with_our_times(peers, folder):
    import step_cost

    student = FlowMapNet(with_random_weights(DiT(preset="nano").build((3, 4, 6))))
    there = {peers.FastGen: None, peers.PyMeanFlow: peers.PyMeanFlow(folder)}
    made = step_cost.peers_ways(there, student)
    assert list(made) == list(step_cost.PEERS)[1:]
    name, (loss, times) = next(iter(made.items()))
    sample = Linear().sample(*torch.randn(2, 5, 3, 4, 6), *times(5))
    step_cost.one_step(student, loss, sample)
    assert any(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in student.parameters())
    table = step_cost.of_peers({"meanflow, dual forward": [1.0, 2.0, 4.0], name: [2.0, 6.0, 8.0]})
    assert table["rows"] == [["meanflow, dual forward", "not there", "2 (2 to 3)", "not there"]]
    assert len(table["columns"]) == 4
    plain, plain_compiled = next(iter(step_cost.COMPILED.items()))
    seconds = {plain: [1.0, 2.0, 4.0], plain_compiled: [0.5, 1.0, 2.0], name: [2.0, 6.0, 8.0]}
    table = step_cost.of_ways(seconds, {plain: 10, plain_compiled: 10, name: 25})
    assert [row[:2] for row in table["rows"]] == [
        [plain, 1],
        [plain_compiled, 0.5],
        [name, 2],
        *([peer, "not there"] for peer in step_cost.PEERS if peer != name),
    ]
    assert table["rows"][1][4] == 1 and table["rows"][2][4:] == ["", 6000, 2.5]
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}


@pytest.mark.slow
def test_a_compiled_peer_has_the_same_gradients(peers, folder):
    student = FlowMapNet(with_random_weights(DiT(preset="nano").build((3, 4, 6))))
    peer, found = peers.PyMeanFlow(folder), []
    sample = Linear().sample(*torch.randn(2, 5, 3, 4, 6), torch.linspace(0.5, 1.0, 5), torch.linspace(0.0, 0.4, 5))
    for make in (peer.mean_flow, peer.compiled_mean_flow):
        value = make(student, power=1.0, offset=1e-3)(sample, 7, 0)
        found.append(torch.autograd.grad(value, list(student.parameters()), allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # float32, another order of sums


def test_a_row_has_the_settings_that_its_name_says(peers):
    import lib.peers_jobs as jobs

    recipe_of = lambda row: jobs.Job.recipe_of(row.recipe, 0)
    rows = {row.name: row for row in jobs.all_rows(None, None, to_train=True)}
    same = {name: recipe_of(row) for name, row in rows.items() if row.ours and not row.own_settings}
    times = [recipe.times for name, recipe in same.items() if "sCM" not in name]
    assert len(times) == 3 and all(one == times[0] for one in times)
    assert not any(recipe.objective.learns_weight for recipe in same.values())  # as the peers' losses
    shipped = [jobs.read_recipe(name) for name in ("digits-meanflow", "digits-scm", "digits-ayf-emd", "digits")]
    recommended = [recipe_of(row) for name, row in rows.items() if row.ours and row.own_settings]
    assert [recipe.hash() for recipe in recommended] == [jobs.at_seed(recipe, 0).hash() for recipe in shipped]

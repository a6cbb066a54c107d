"""The Frechet distance of known Gaussians, its invariances, and its twin in torchmetrics."""

import math

import pytest
import torch
from torch import nn

from flowmap.metrics.frechet import FrechetDistance, gaussian_frechet

D = 7


def gaussian(seed, n=400):
    g = torch.Generator().manual_seed(seed)
    mix, shift = torch.randn(D, D, generator=g, dtype=torch.float64), torch.randn(D, generator=g, dtype=torch.float64)
    return torch.randn(n, D, generator=g, dtype=torch.float64) @ mix + shift


def distance(real, fake):
    metric = FrechetDistance(nn.Identity(), dims=real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def with_moments(x, mean, factor):
    """x made to have exactly this mean and covariance factor @ factor.T."""
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ factor.T + mean


def test_diagonal_gaussians_in_closed_form():
    a, b = torch.arange(1.0, 4.0).double(), torch.tensor([4.0, 1.0, 9.0]).double()
    m = torch.tensor([1.0, -2.0, 0.5]).double()
    expected = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert torch.allclose(gaussian_frechet(torch.zeros(3).double(), a.diag(), m, b.diag()), expected)
    real = with_moments(gaussian(0)[:, :3], torch.zeros(3).double(), a.sqrt().diag())
    fake = with_moments(gaussian(1)[:, :3], m, b.sqrt().diag())
    assert torch.allclose(distance(real, fake), expected)


def test_two_by_two_gaussians_in_closed_form():
    """For 2x2, tr (S1 S2)^(1/2) = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2)): here the covariances do not commute."""
    s1 = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    s2 = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    shared = math.sqrt((s1 @ s2).trace() + 2 * math.sqrt(torch.det(s1) * torch.det(s2)))
    m = torch.tensor([0.3, -1.0]).double()
    assert torch.allclose(gaussian_frechet(m, s1, -m, s2), 4 * m.square().sum() + s1.trace() + s2.trace() - 2 * shared)


def test_invariances():
    real, fake = gaussian(0), gaussian(1)
    value = distance(real, fake)
    shift = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(gaussian(3)[:D]).Q
    assert abs(distance(real, real)) < 1e-10
    assert torch.allclose(distance(real, real + shift), shift.square().sum())
    assert torch.allclose(distance(fake, real), value)
    assert torch.allclose(distance(real @ turn + shift, fake @ turn + shift), value)
    assert torch.allclose(distance(3 * real, 3 * fake), 9 * value)
    assert value.dtype == torch.float64 and value.ndim == 0


def test_batch_sizes_do_not_matter():
    real, fake = gaussian(0), gaussian(1)
    metric = FrechetDistance(nn.Identity(), D)
    for part in real.split(3):
        metric.update(part, real=True)
    for part in fake[torch.randperm(400)].split(7):
        metric.update(part, real=False)
    assert torch.allclose(metric.compute(), distance(real, fake), rtol=1e-10)


def test_reset_keeps_the_reference():
    real, fake = gaussian(0), gaussian(1)
    metric = FrechetDistance(nn.Identity(), D)
    metric.update(real, real=True)
    metric.update(gaussian(2), real=False)
    metric.compute()
    metric.reset()
    metric.update(fake, real=False)
    assert metric.compute() == distance(real, fake)
    metric.reset_real()
    with pytest.raises(ValueError, match="real samples, got 0"):
        metric.compute()


def test_singular_covariances_are_finite_and_right():
    """On a line in seven dimensions the distance is that of the one-dimensional Gaussians."""
    line = torch.ones(D, dtype=torch.float64) / math.sqrt(D)
    z = gaussian(0)[:, :1]
    z = (z - z.mean()) / z.std()
    assert torch.allclose(distance(z * line, (3 * z + 2) * line), torch.tensor(8.0).double(), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_have_no_distance(bad):
    metric = FrechetDistance(lambda x: x, 3)
    metric.update(torch.randn(20, 3), real=True)
    metric.update(torch.full((20, 3), bad), real=False)
    assert bool(metric.compute().isnan())


def test_few_samples():
    with pytest.raises(ValueError, match="2 or more fake samples, got 1"):
        distance(gaussian(0), gaussian(1)[:1])
    with pytest.warns(UserWarning, match="5 fake samples for 7 features"):
        assert distance(gaussian(0), gaussian(1)[:5]).isfinite()


def test_twin_in_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = D

        def forward(self, x):
            return x

    twin = FrechetInceptionDistance(feature=Flat())
    real, fake = gaussian(0), gaussian(1)
    twin.update(real, real=True)
    twin.update(fake, real=False)
    assert torch.allclose(twin.compute(), distance(real, fake), rtol=1e-6)


def _rank(rank, port_file, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    from flowmap.metrics import Frechet, PrecisionRecall

    real, fake = gaussian(0, 300), gaussian(1, 300)
    specs = [Frechet(), PrecisionRecall()]
    results = {}
    for spec in specs:
        metric = spec.build(real)
        metric.update(fake[rank::2], real=False)
        results |= spec.report(metric)
    queue.put(results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    from flowmap.metrics import Frechet, PrecisionRecall

    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(r, str(tmp_path / "meet"), queue)) for r in range(2)]
    [w.start() for w in workers]
    found = [queue.get(), queue.get()]
    [w.join() for w in workers]
    alone = {}
    for spec in (Frechet(), PrecisionRecall()):
        metric = spec.build(gaussian(0, 300))
        metric.update(gaussian(1, 300), real=False)
        alone |= spec.report(metric)
    assert all(one == pytest.approx(alone, rel=1e-9) for one in found)

"""Classifier guidance against the exact tilt of a Gaussian."""

import torch

from flowmap.flow.types import broadcast_time
from flowmap.teachers.classifier import ClassifierGuided
from flowmap.teachers.exact import GaussianTeacher

MEAN, STD, SLOPE = 0.7, 0.4, torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)


def log_prob(x, t, cond):
    """log E[exp(slope . x0) | xt = x] up to a constant: the noisy version of log p(y | x0) = slope . x0."""
    spread = ((1 - t) * STD) ** 2 + t**2
    return (broadcast_time(STD**2 * (1 - t) / spread, x) * x * SLOPE).sum(-1)


def test_a_tilted_gaussian_has_its_mean_moved():
    """N(m, c^2) times exp(w slope x) is N(m + w c^2 slope, c^2): the guided velocity is that Gaussian's."""
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.05, 0.3, 0.5, 0.8, 0.93], dtype=torch.float64)
    for scale in (1.0, 2.5):
        guided = ClassifierGuided(GaussianTeacher((MEAN,), STD), log_prob, scale=scale)
        moved = GaussianTeacher(tuple((MEAN + scale * STD**2 * SLOPE).tolist()), STD)
        torch.testing.assert_close(guided.velocity(x, t), moved.velocity(x, t), rtol=1e-10, atol=1e-10)


def test_scale_zero_is_the_teacher_and_no_gradient_is_left():
    teacher, x, t = GaussianTeacher((MEAN,), STD), torch.randn(5, 3), torch.rand(5)
    assert torch.equal(ClassifierGuided(teacher, log_prob, scale=0.0).velocity(x, t), teacher.velocity(x, t))
    with torch.no_grad():
        v = ClassifierGuided(teacher, lambda x, t, cond: -x.square().sum(-1), denoised=True).velocity(x, t)
    assert not v.requires_grad and v.isfinite().all()


def test_at_pure_noise_the_factor_is_cut():
    guided = ClassifierGuided(GaussianTeacher((MEAN,), STD), lambda x, t, cond: x.sum(-1), most=20.0)
    x, t = torch.zeros(5, 3), torch.ones(5)
    torch.testing.assert_close(guided.velocity(x, t), guided.teacher.velocity(x, t) - 20.0)

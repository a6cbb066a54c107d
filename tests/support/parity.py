"""What tests assert and benchmarks/parity.py prints: numbers that are 0 where two ways to the same thing agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry that is wanted."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def at_start(student, teacher, x: Tensor, t: Tensor, s: Tensor, cond) -> float:
    """The largest |F(x, t, s) - v(x, t)|: a student at step 0 against its teacher."""
    return float((student.mean_velocity(x, t, s, cond) - teacher.mean_velocity(x, t, t, cond)).abs().max())


def of_rates(ridden: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ||ridden - wanted|| / ||ridden|| of these derivatives, none of which is zero."""
    assert all(0 < rate.norm() for rate in ridden)
    return max(float((rate - other).norm() / rate.norm()) for rate, other in zip(ridden, wanted, strict=True))


@torch.no_grad()
def of_steps(
    scheduler, grid: Sequence[float], sizes: Sequence[float], state: Tensor, *, predict: Callable, velocity: Callable
) -> float:
    """The largest relative difference between the scheduler's states and Euler's points with our velocity.

    grid: the scheduler's times on our clock, the last one included.
    sizes: the factors that turn a point of ours into its state there.
    predict(state, time): the network's output as the scheduler wants it; velocity(x, t): ours.
    """
    x, worst = state / sizes[0], 0.0
    for i, time in enumerate(scheduler.timesteps):
        state = scheduler.step(predict(state, time), time, state).prev_sample
        x = x + (grid[i + 1] - grid[i]) * velocity(x, torch.full((len(x),), grid[i]))
        worst = max(worst, relative(x * sizes[i + 1], state))
    return worst


@torch.no_grad()
def of_edm_steps(net, unet, x: Tensor, label: Tensor, guidance: float, num_steps: int = 6) -> float:
    """of_steps for an EDM network (float32) against diffusers' EDMEulerScheduler, with guidance.

    The scheduler is given U and EDM's own sigma.
    """
    import diffusers

    from flowmap.nets.flow_map import FlowMapNet
    from flowmap.teachers.guidance import ClassifierFree
    from flowmap.teachers.network import NetworkTeacher

    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.tolist()
    one_hot = torch.nn.functional.one_hot(label, net.num_classes).float()

    def predict(state: Tensor, time: Tensor) -> Tensor:
        inside, noise = scheduler.scale_model_input(state, time), time.expand(len(state))
        yes, no = (unet(inside, noise, labels, None) for labels in (one_hot, 0 * one_hot))
        return no + guidance * (yes - no)

    teacher, cond = (
        ClassifierFree(NetworkTeacher(FlowMapNet(net))),
        {"class": label, "guidance": torch.full((len(x),), guidance)},
    )
    grid, sizes = [sigma / (1 + sigma) for sigma in sigmas], [1 + sigma for sigma in sigmas]
    return of_steps(
        scheduler, grid, sizes, x * sigmas[0], predict=predict, velocity=lambda x, t: teacher.velocity(x, t, cond)
    )

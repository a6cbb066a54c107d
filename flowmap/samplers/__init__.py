"""Samplers, which take a student from noise to data in a few calls."""

from dataclasses import fields, replace
from typing import Any

from flowmap.flow.reward import Reward
from flowmap.flow.types import Sampler
from flowmap.samplers.anchored import Anchored
from flowmap.samplers.deterministic import Deterministic
from flowmap.samplers.gamma import Gamma
from flowmap.samplers.grids import FewStep
from flowmap.samplers.solve import Solve
from flowmap.samplers.tilted import Tilted

SAMPLERS = {"deterministic": Deterministic, "gamma": Gamma, "anchored": Anchored, "solver": Solve, "tilted": Tilted}


def asked_for(
    sampler: Sampler,
    *,
    gamma: float | None = None,
    solver: str | None = None,
    reward: Tilted | Reward | None = None,
) -> Sampler:
    """Return gamma-sampling, a solver, or sampling by a reward, on the grid of `sampler`; `sampler` itself if nothing
    is given.
    """
    given = {"gamma": gamma, "solver": solver, "reward": reward}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"{names[0]}: {given[names[0]]!r} and {names[1]}: {given[names[1]]!r} exclude one another")
    if not names:
        return sampler
    grid: dict[str, Any] = {field.name: getattr(sampler, field.name) for field in fields(FewStep)}
    if reward is not None:
        return replace(reward, **grid) if isinstance(reward, Tilted) else Tilted(reward=reward, **grid)
    if solver is not None:
        return Solve(solver=solver, **grid)
    return Gamma(gamma=gamma or 0.0, **grid)

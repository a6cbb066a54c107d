"""Samplers, which take a student from noise to data in a few calls."""

from dataclasses import fields
from typing import Any

from flowmap.flow.types import Sampler
from flowmap.samplers.anchored import Anchored
from flowmap.samplers.deterministic import Deterministic
from flowmap.samplers.gamma import Gamma
from flowmap.samplers.grids import FewStep
from flowmap.samplers.solve import Solve

SAMPLERS = {"deterministic": Deterministic, "gamma": Gamma, "anchored": Anchored, "solver": Solve}


def asked_for(sampler: Sampler, *, gamma: float | None = None, solver: str | None = None) -> Sampler:
    """Return gamma-sampling or a solver on the grid of `sampler`; without `gamma` and `solver`, return `sampler`
    itself.
    """
    if gamma is not None and solver is not None:
        raise ValueError(f"solver: {solver!r} and gamma: {gamma} exclude one another")
    if gamma is None and solver is None:
        return sampler
    grid: dict[str, Any] = {field.name: getattr(sampler, field.name) for field in fields(FewStep)}
    if solver is not None:
        return Solve(solver=solver, **grid)
    return Gamma(gamma=gamma or 0.0, **grid)

"""Samplers: a student taken from noise to data in a few calls."""

from dataclasses import fields

from flowmap.samplers.anchored import Anchored
from flowmap.samplers.deterministic import Deterministic
from flowmap.samplers.gamma import Gamma
from flowmap.samplers.grids import FewStep
from flowmap.samplers.solve import Solve

SAMPLERS = {"deterministic": Deterministic, "gamma": Gamma, "anchored": Anchored, "solver": Solve}


def asked_for(sampler: FewStep, *, gamma: float | None = None, solver: str | None = None) -> FewStep:
    """Gamma-sampling or a solver on the grid of another few-step sampler; that sampler itself where neither is asked for."""
    if gamma is not None and solver is not None:
        raise ValueError(f"solver: {solver!r} and gamma: {gamma} exclude one another")
    grid = {field.name: getattr(sampler, field.name) for field in fields(FewStep)}
    if solver is not None:
        return Solve(solver=solver, **grid)
    return sampler if gamma is None else Gamma(gamma=gamma, **grid)

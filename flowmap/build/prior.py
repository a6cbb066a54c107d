"""Build a recipe's learned prior from the run that trained its auxiliary model, with the recipe's sampler of codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowmap.base.files import read_json
from flowmap.base.schema import RecipeError
from flowmap.data.codes import draws_of
from flowmap.flow.prior import CodeSampler, FlowCodes, Learned, LearnedPrior, MixtureCodes
from flowmap.plan.plan import ResolvedRun
from flowmap.plan.requirements import check_prior
from flowmap.student.config_file import read_config
from flowmap.student.folder import load_student
from flowmap.student.prior import PRIOR, PriorConfig, built_codes, load_prior, read_prior_config, save_prior

MOST = 20_000  # The number of samples that a mixture is fitted to.


def write_prior(run: ResolvedRun, prior: LearnedPrior, folder: Path) -> None:
    """Write the recipe's built prior to folder/prior, where `folder` is a student's."""
    trained = run.finished(run.priors[0], "prior.recipe")
    save_prior(folder / PRIOR, _config(run, trained / "student"), prior.model.state_dict(), prior.codes.tensors())


def build_prior(run: ResolvedRun) -> LearnedPrior | None:
    """Return the learned prior, or None for the Gaussian one.

    Raises RecipeError if it is not trained, its posterior has collapsed, or its sampler of codes does not match.
    """
    shipped = run.prior
    if shipped is None:
        return None
    check_prior(run)
    trained = run.finished(run.priors[0], "prior.recipe")
    units = read_json(trained / "metrics.json")["units"]
    if units["active"] == 0:
        raise RecipeError(
            f"{run.name}: prior.recipe: {shipped.recipe!r} has a collapsed posterior: 0 of {shipped.size} "
            f"numbers of z are active, KL {sum(units['kl']):.3g} nats in all; "
            "lower its objective.kl or raise its objective.free_bits"
        )
    try:
        prior = load_prior(trained / "student", scale=shipped.scale, conditioning=shipped.conditioning)
        prior.codes = built_codes(_config(run, trained / "student"), _codes(run, trained / "student"), "prior.z")
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error
    return prior


def _config(run: ResolvedRun, folder: Path) -> PriorConfig:
    """Return the configuration of the auxiliary model in the folder, with the recipe's sampler of codes."""
    z = _codes_of(run)
    net = read_config(_flow_folder(run) / "student" / "config.json").net if isinstance(z, FlowCodes) else None
    return replace(read_prior_config(folder), z=z, z_net=net)


def _codes_of(run: ResolvedRun) -> CodeSampler:
    assert isinstance(run.recipe.prior, Learned)
    return run.recipe.prior.z


def _codes(run: ResolvedRun, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the recipe's sampler of codes, fitted or read."""
    z = _codes_of(run)
    if isinstance(z, MixtureCodes):
        return fitted_mixture(draws_of(folder, 1, z.seed, MOST).flatten(0, 1), z)
    return dict(load_student(_flow_folder(run)).flow_map.state_dict()) if isinstance(z, FlowCodes) else {}


def _flow_folder(run: ResolvedRun) -> Path:
    """Return the run that trained the flow of codes. Raise RecipeError if it has not been trained."""
    return run.finished(run.priors[1], "prior.z.recipe")


def fitted_mixture(z: Tensor, spec: MixtureCodes) -> dict[str, Tensor]:
    """Return a mixture of Gaussians fitted to z (N, Z) by scikit-learn's EM.

    The tensors are weights, means and Cholesky factors of the covariances, in float64.
    """
    from sklearn.mixture import GaussianMixture

    if len(z) < 2 * spec.components:
        raise ValueError(f"prior.z.components: {spec.components} want at least twice as many codes, there are {len(z)}")
    found = GaussianMixture(spec.components, random_state=spec.seed, reg_covar=1e-4, max_iter=200).fit(
        z.double().numpy()
    )
    weights, means, covariances = (
        torch.from_numpy(part) for part in (found.weights_, found.means_, found.covariances_)
    )
    return {"weights": weights, "means": means, "factors": torch.linalg.cholesky(covariances)}

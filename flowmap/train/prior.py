"""The artifact of the objective `variance_guided`: the auxiliary model of a learned prior, codes of the training data,
figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import write_tensors, write_text
from flowmap.base.images import save_picture, stack, to_grid
from flowmap.data.codes import ENCODINGS
from flowmap.flow.codes import NormalDraws
from flowmap.flow.draws import RowGenerator, normal_like
from flowmap.flow.prior import LearnedPrior
from flowmap.objectives.lediflow import kl_of, negative_log_likelihood
from flowmap.plan.plan import Stage
from flowmap.student.config import StudentConfig
from flowmap.student.prior import PriorConfig, save_prior
from flowmap.student.student import Student
from flowmap.train.callbacks import AtPictures, Keep
from flowmap.train.card import short_card
from flowmap.train.logging import log_pictures
from flowmap.train.module import DistillModule

ACTIVE = 0.01  # nats of KL from which a dimension of z counts as active
MOST_ENCODED, MOST_MEASURED = 100_000, 2048


class KeepPrior(Keep):
    """Saves student/ as a learned prior with codes ~ N(0, I)."""

    def ship(self, module: DistillModule, state: dict[str, Tensor], done: int) -> None:
        keep_prior(self.stage, self.config, module, state, done)


def keep_prior(
    stage: Stage,
    config: StudentConfig,
    module: DistillModule,
    state: dict[str, Tensor],
    done: int,
    metrics: dict | None = None,
) -> None:
    """Write student/; with the last figures also the posteriors of the training data, for the fitting of z-samplers."""
    folder, recipe = stage.folder / "student", stage.recipe
    if metrics is not None:
        write_tensors(folder / ENCODINGS, _posteriors(module))
    prior = PriorConfig(config.net, tuple(config.shape), recipe=recipe.name, recipe_hash=recipe.hash(), step=done)
    save_prior(folder, prior, {name.removeprefix("net."): tensor for name, tensor in state.items()}, {})
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    what = f"The auxiliary model of a learned prior (flowmap, LeDiFlow), trained for {done} steps."
    write_text(folder / "README.md", short_card(recipe.name, what, metrics))


@torch.no_grad()
def _posteriors(module: DistillModule) -> dict[str, Tensor]:
    count = min(len(module.data), MOST_ENCODED)
    parts = [module.averaged.net.encode(x) for x in _batches(module, torch.arange(count) * len(module.data) // count)]
    return {name: torch.cat([part[i].float().cpu() for part in parts]) for i, name in enumerate(("mean", "logvar"))}


def _batches(module: DistillModule, places: Tensor):
    """The training samples at those places, batch by batch, on the network's device."""
    device = next(module.averaged.parameters()).device
    for part in places.split(256):
        yield module.data.__getitems__(part.tolist())[0].to(device)


def looked_at(module: DistillModule, num: int) -> Tensor:
    """Held-out samples in the space of training.

    They are training samples if none are held out, or if the held-out ones are pictures of latents.
    """
    held_out = module.data.held_out
    if len(held_out) and tuple(held_out.shape[1:]) == tuple(module.data.shape) and module.recipe.data.in_pixels:
        return held_out[:num]
    count = min(num, len(module.data))
    return torch.cat([x.cpu() for x in _batches(module, torch.arange(count) * len(module.data) // count)])


class Drawn(AtPictures):
    """Draws samples/step-N.png: real samples, the means of their codes, starts of these and of random codes."""

    def __init__(self, stage: Stage, student: Student):
        super().__init__(stage)
        self.student = student

    @torch.no_grad()
    def show(self, trainer, module: DistillModule, done: int) -> None:
        net, x = module.averaged.net, looked_at(module, self.stage.recipe.log.grid_images).to(module.device)
        prior = LearnedPrior(net, NormalDraws(), net.size)
        generator = RowGenerator(f"drawn/{self.stage.recipe.evaluation.seed}", torch.arange(len(x)))
        z, noise = prior.encode(x), normal_like(x, generator)
        rows = {
            "real": x,
            "mean": net.decode(z)[0],
            "start": prior.place(z, noise).x1,
            "drawn": prior.place(normal_like(z, generator), noise).x1,
        }
        grids = {name: to_grid(self.student.pictures(row), columns=16) for name, row in rows.items()}
        if trainer.is_global_zero:
            save_picture(
                self.stage.folder / "samples" / f"step-{done:08d}.png", stack(list(grids.values()), list(grids))
            )
            log_pictures(trainer, grids, done)


@torch.no_grad()
def measure_prior(module: DistillModule, log: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The contents of metrics.json.

    The row "1" of "student" has, on held-out samples, the negative log-likelihood per entry, the root mean square error
    of the decoder's mean, the KL in nats, the share of active dimensions of z, and the Frechet distance of codes from
    N(0, I).
    """
    started, net = time.perf_counter(), module.averaged.net
    x = looked_at(module, MOST_MEASURED).to(next(net.parameters()).device)
    mean, logvar = _by_parts(net.encode, x)
    noise = RowGenerator(f"codes/{module.recipe.evaluation.seed}", torch.arange(len(mean)))
    z = mean + (logvar / 2).exp() * normal_like(mean, noise)
    guess, spread = _by_parts(net.decode, z)
    units = kl_of(mean, logvar).mean(0).double().cpu()
    active = int((units > ACTIVE).sum())
    row = {
        "nll": float(negative_log_likelihood(x, guess, spread).mean()),
        "rmse": float((guess - x).square().mean().sqrt()),
        "kl_nats": float(units.sum()),
        "active_share": active / net.size,
        "codes_to_normal": _to_normal(z.double().cpu()),
    }
    if log is not None:
        log(
            f"{_state(active, net.size)}: {active} of {net.size} numbers of z have a KL above {ACTIVE} nats, "
            f"{row['kl_nats']:.3g} nats in all; the decoder's mean leaves {row['rmse']:.3g} (root mean square)"
        )
    seconds = {"evaluate": round(time.perf_counter() - started, 4)}
    of_units = {"kl": [round(float(value), 6) for value in units], "active": active}
    return {"student": {"1": row}, "floor": {}, "units": of_units, "seconds": seconds, "nfe": {"student": {"1": 1}}}


def _by_parts(function: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor]:
    """function(rows), in parts of 256 rows."""
    first, second = zip(*(function(part) for part in rows.split(256)), strict=True)
    return torch.cat(first), torch.cat(second)


def _to_normal(codes: Tensor) -> float:
    """The Frechet distance of codes (N, size) from N(0, I)."""
    from flowmap.metrics.frechet import gaussian_frechet

    size = codes.shape[1]
    zero, one = torch.zeros(size).double(), torch.eye(size).double()
    return float(gaussian_frechet(codes.mean(0), codes.T.cov().reshape(size, size), zero, one))


def _state(active: int, size: int) -> str:
    return "collapsed posterior" if active == 0 else "posterior" if active == size else "posterior in part collapsed"

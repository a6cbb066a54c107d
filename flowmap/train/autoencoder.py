"""The artifact of the objective `reconstruction`: an autoencoder in diffusers' format, reconstructions, figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowmap.base.batches import rebatched
from flowmap.base.distributed import gathered, rank, world_size
from flowmap.base.files import write_json, write_tensors, write_text
from flowmap.base.images import save_picture, stack, to_grid
from flowmap.metrics import DrawnBatch, baselines
from flowmap.metrics.real import chunk_of, metric_device
from flowmap.plan.plan import Stage
from flowmap.plan.references import located
from flowmap.train.callbacks import AtPictures, Keep
from flowmap.train.card import short_card
from flowmap.train.logging import log_pictures
from flowmap.train.module import DistillModule

MAX_FOR_STATISTICS = 4096  # pictures by which the latents' shift and scale are measured


class KeepAutoencoder(Keep):
    """Saves student/ as a folder that diffusers' AutoencoderKL.from_pretrained loads."""

    def ship(self, module: DistillModule, state: dict[str, Tensor], done: int) -> None:
        save_autoencoder(self.stage, module, state, done)


class Reconstructions(AtPictures):
    """Draws samples/step-N.png: held-out pictures above their reconstructions."""

    @torch.no_grad()
    def show(self, trainer, module: DistillModule, done: int) -> None:
        x = _unseen(module)[: self.stage.recipe.log.grid_images].to(module.device)
        pictures = {"real": x, "reconstructed": module.averaged.net(x)}
        grids = {name: to_grid(part.clamp(-1, 1), columns=16) for name, part in pictures.items()}
        if trainer.is_global_zero:
            save_picture(
                self.stage.folder / "samples" / f"step-{done:08d}.png", stack(list(grids.values()), list(grids))
            )
            log_pictures(trainer, grids, done)


@torch.no_grad()
def measure_autoencoder(module: DistillModule) -> dict[str, Any]:
    """The contents of metrics.json.

    The row "1" of "student" has the signal-to-noise ratio of reconstructions and every metric of samples on them.
    """
    data, started = module.data, time.perf_counter()
    specs = [spec for spec in located(module.recipe, module.recipe.metrics) if spec.on_samples]
    num = max([256, *(spec.images for spec in specs)])
    built = [(spec, spec.build_on(data, metric_device(module.device))) for spec in specs]
    for spec, metric in built:
        spec.begin(metric)
    errors, first = [], 0
    for batch in _reconstructed(module, num):
        rebuilt = batch["rebuilt"]
        errors.append((rebuilt - batch["real"]).square().flatten(1).mean(1).cpu())
        for spec, metric in built:
            spec.update(metric, DrawnBatch(rebuilt, first, world_size(), dict))
        first += len(rebuilt)
    error = torch.cat(gathered(torch.cat(errors)))
    row = {"psnr": float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean())}
    for _, metric in built:
        row |= metric.report()
    lowest = baselines(built, data)
    seconds = {"evaluate": round(time.perf_counter() - started, 4)}
    return {"student": {"1": row}, "floor": lowest, "seconds": seconds, "nfe": {"student": {"1": 1}}}


def _reconstructed(module: DistillModule, num: int) -> Iterator[Mapping[str, Tensor]]:
    """ "real" and "rebuilt" pictures in chunks: this process's share of `num` held-out ones, then training ones."""
    unseen, reference, net = _unseen(module), module.data.reference, module.averaged.net
    world, count = world_size(), min(num, len(unseen) + len(reference))
    places = torch.arange(count // world * world)[rank() :: world]

    def batch(at: Tensor) -> dict[str, Tensor]:
        real = torch.cat([unseen[at[at < len(unseen)]], reference[at[at >= len(unseen)] - len(unseen)]])
        real = real.to(module.device)
        return {"real": real, "rebuilt": net(real).clamp(-1, 1)}

    return rebatched(map(batch, places.split(module.recipe.evaluation.batch_size)), chunk_of(unseen.shape[1:]))


def save_autoencoder(
    stage: Stage, module: DistillModule, state: dict[str, Tensor], done: int, metrics: dict | None = None
) -> None:
    """Write student/: weights, then the config with the shift and scale that normalise latents of training pictures."""
    folder, model = stage.folder / "student", module.averaged.net.model
    shift, scale = module.averaged.net.normalisation(module.data.reference[:MAX_FOR_STATISTICS].to(module.device))
    config = json.loads(model.to_json_string()) | {"shift_factor": shift, "scaling_factor": scale}
    write_tensors(
        folder / "diffusion_pytorch_model.safetensors", {k.removeprefix("net.model."): v for k, v in state.items()}
    )
    write_json(folder / "config.json", config)
    write_text(folder / "recipe.yaml", stage.recipe.to_yaml())
    loads = "`diffusers.AutoencoderKL.from_pretrained(folder)` loads it."
    what = f"An autoencoder of pictures, trained for {done} steps: {loads}"
    write_text(folder / "README.md", short_card(stage.recipe.name, what, metrics))


def _unseen(module: DistillModule) -> Tensor:
    """Held-out pictures, or training pictures if none are held out."""
    return module.data.held_out if len(module.data.held_out) else module.data.reference

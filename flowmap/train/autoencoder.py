"""The artifact of the objective `reconstruction`: an autoencoder in diffusers' format, reconstructions, figures."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import write_json, write_tensors, write_text
from flowmap.base.images import save_picture, stack, to_grid
from flowmap.metrics import baselines
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
    recipe, data, started = module.recipe, module.data, time.perf_counter()
    net, specs = module.averaged.net, [spec for spec in located(recipe, recipe.metrics) if spec.on_samples]
    num = max([256, *(spec.images for spec in specs)])
    x = torch.cat([_unseen(module), data.reference])[:num]
    size = recipe.evaluation.batch_size
    rebuilt = torch.cat([net(part.to(module.device)).clamp(-1, 1).cpu() for part in x.split(size)])
    error = (rebuilt - x).square().flatten(1).mean(1)
    row = {"psnr": float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean())}
    built = [(spec, spec.build_on(data)) for spec in specs]
    for _, metric in built:
        metric.update(rebuilt)
        row |= metric.report()
    lowest = baselines(built, data)
    seconds = {"evaluate": round(time.perf_counter() - started, 4)}
    return {"student": {"1": row}, "floor": lowest, "seconds": seconds, "nfe": {"student": {"1": 1}}}


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

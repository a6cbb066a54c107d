"""A `LightningModule` of your own whose loss is an objective of flowmap: MeanFlow from data alone, on 8x8 digits.

    python examples/own_lightning.py [--steps 2000] [--out digits.png]

Lightning trains, logs and saves as it does for any module.  flowmap gives the path, the times, the objective, the
network and the sampler.  The clock is t = 0 for data and t = 1 for noise.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from flowmap.base.images import save_picture, to_grid
from flowmap.flow.path import Linear
from flowmap.flow.times import LogitNormal, Mixture
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives.meanflow import MeanFlow
from flowmap.samplers import Deterministic


class OneStepDigits(L.LightningModule):
    """A flow map of digits, conditioned on the class."""

    def __init__(self, preset: str = "nano"):
        super().__init__()
        network = DiT(preset=preset, patch=2).build(
            (1, 8, 8), num_classes=10
        )  # or any module (x, t, s, cond) -> like x
        self.student = FlowMapNet(network)
        self.path, self.times = Linear(), Mixture(base=LogitNormal(pairs="sorted"), diagonal=0.75)
        self.objective = MeanFlow()

    def training_step(self, batch, batch_idx):
        x0, labels = batch
        t, s = self.times(len(x0), device=self.device)
        sample = self.path.sample(x0, torch.randn_like(x0), t, s, {"class": labels})
        loss = self.objective(self.student, None, sample, self.global_step)  # None: no teacher
        self.log("train/loss", loss.value)
        return loss.value

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), 1e-3)

    @torch.no_grad()
    def draw(self, labels, steps: int = 1):
        noise = torch.randn(len(labels), 1, 8, 8, device=self.device)
        return Deterministic()(self.student, noise, {"class": labels}, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    given = parser.parse_args()
    L.seed_everything(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y))
    module = OneStepDigits()
    trainer = L.Trainer(max_steps=given.steps, logger=False, enable_checkpointing=False, accelerator="auto")
    trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
    module.eval()
    save_picture(given.out, to_grid(module.draw(torch.arange(40) % 10, steps=1), columns=10))
    print(f"pictures after 1 step: {given.out}")


if __name__ == "__main__":
    main()

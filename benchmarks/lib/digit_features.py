"""A feature space of digits for figures: the numbers before the logits of a small classifier, trained when first used.

It is trained on the training digits of flowmap's data `digits` in about a second, and part of no loss.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.data import Digits

WIDTH, STEPS, ROWS = 32, 400, 256


@torch.no_grad()
def classifier(x: Tensor) -> Tensor:
    """The features (B, 32) of digits x (B, 1, 8, 8) in [-1, 1]."""
    return trained()[0](x.float())


@lru_cache(maxsize=1)
def trained() -> nn.Sequential:
    """(features, logits), the same ones in every run."""
    data, generator = Digits().build(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, WIDTH))
        net = nn.Sequential(features, nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(WIDTH, 10)))
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
        for _ in range(STEPS):
            rows = torch.randint(len(data.train), (ROWS,), generator=generator)
            loss = F.cross_entropy(net(data.train[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)

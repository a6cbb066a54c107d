"""Precision (are generated samples near real ones?) and recall (are real ones near generated ones?), by neighbours.

Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, "improved precision and recall".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowmap.metrics.real import Features, features_in


class PrecisionRecallScore(Metric):
    """The two shares, by balls around each sample that reach its k-th nearest neighbour of its own kind.

    `reset` forgets the generated samples and keeps the real ones. Keeps all features, in float64: 8 (N + M) D bytes for
    N real and M generated samples, and 4096 max(N, M) for rows of the distance matrix. Its time grows with N M.
    """

    is_differentiable = False
    full_state_update = True
    real: list[Tensor]
    fake: list[Tensor]
    chunk = 256  # rows of the distance matrix at once

    def __init__(self, features: Features, k: int = 3):
        super().__init__()
        self.features, self.k = features, k
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, x: Tensor | None, real: bool, found: Tensor | None = None) -> None:
        """Count x; found (B, D): its features, if they are known, in which case x may be None."""
        kept = self.real if real else self.fake
        kept.extend(part.double() for part in features_in(self.features, x, found))

    def compute(self) -> dict[str, Tensor]:
        """{"precision", "recall"}: float64 scalars in [0, 1]. Raises ValueError for k or fewer samples of a kind."""
        sets = {}
        for kind in ("real", "fake"):
            held = getattr(self, kind)
            sets[kind] = dim_zero_cat(held) if len(held) else torch.empty(0)
            if len(sets[kind]) <= self.k:
                raise ValueError(
                    f"precision and recall with k = {self.k} need more than {self.k} {kind} samples, "
                    f"got {len(sets[kind])}"
                )
        real, fake = sets["real"], sets["fake"]
        return {"precision": self._covered(fake, real), "recall": self._covered(real, fake)}

    def reset(self) -> None:
        kept = list(self.real)
        super().reset()
        self.real = kept

    def reset_real(self) -> None:
        self.real = []
        self._computed = None  # torchmetrics' cache of the last result

    def _covered(self, points: Tensor, centres: Tensor) -> Tensor:
        """The share of points that are in the ball of a centre."""
        rows = (torch.cdist(part, centres) for part in centres.split(self.chunk))
        radii = torch.cat([d.kthvalue(self.k + 1, dim=1).values for d in rows])  # + 1: each centre is its own nearest
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(self.chunk)]
        return torch.cat(inside).double().mean()

"""Figures of lists of sentences that need no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of words, in lower case."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of distinct ones among all word n-grams; 0 if there are none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def lcs_share(text: str, other: str) -> float:
    """The longest common subsequence of words as a share of the words of `text`."""
    a, b = text.lower().split(), other.lower().split()
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1] / max(len(a), 1)


def divergence(real: Tensor, fakes: Tensor, clusters: int, scaling: float = 5.0) -> float:
    """1 - the area under the frontier of two sets of features (N, D), (M, D): 0 if they are equal, 1 if disjoint.

    The frontier is exp(-scaling KL(P || R)) against exp(-scaling KL(Q || R)), R between the histograms P and Q over
    k-means clusters of both.
    """
    from sklearn.cluster import KMeans

    both = torch.cat([real, fakes]).numpy()
    labels = KMeans(n_clusters=min(clusters, len(both)), n_init=2, random_state=0).fit_predict(both)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    p, q = (torch.bincount(part, minlength=clusters).double() for part in (labels[: len(real)], labels[len(real) :]))
    return frontier_divergence(p / p.sum(), q / q.sum(), scaling)


def frontier_divergence(p: Tensor, q: Tensor, scaling: float = 5.0, points: int = 25) -> float:
    """The same for two histograms (K,) that sum to 1. Source: Pillutla et al. 2021, arXiv:2102.01454, eq. 1."""
    weights = torch.linspace(1e-6, 1 - 1e-6, points, dtype=torch.float64)
    between = weights[:, None] * p + (1 - weights[:, None]) * q
    x, y = (torch.exp(-scaling * _kl(one, between)) for one in (q, p))
    x, y = (
        torch.cat([torch.zeros(1), x.flip(0), torch.ones(1)]).double(),
        torch.cat([torch.ones(1), y.flip(0), torch.zeros(1)]).double(),
    )
    order = torch.argsort(x, stable=True)
    return float(1 - torch.trapezoid(y[order], x[order]).abs())


def _kl(p: Tensor, other: Tensor) -> Tensor:
    """KL(p || each row of other), nats."""
    seen = p > 0
    return (p[seen] * (p[seen].log() - other[:, seen].clamp_min(1e-300).log())).sum(1)

"""Does a sample show what its condition asks for: its class, by a classifier, or its caption, found among others?

Both metrics are fitted to real samples alone, deterministically, and are used by no loss. Both rise as samples blur
into the mean of their condition: read them with a distance, never alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from flowmap.flow.types import Cond
from flowmap.metrics.real import Features, features_in

# cosine from which two encodings are those of one caption; half precision and batch sizes change it by 1e-7
SAME = 1 - 1e-5
RIDGES = torch.logspace(-4, 3, 15, dtype=torch.float64)  # in units of the mean variance of a feature


class ClassAgreement(Metric):
    """The share of samples in which a support vector machine (radial kernel, C = 10) finds the class asked for.

    features maps (B, ...) to (B, dims). The classifier is fitted to real samples by their features `real` (N, dims) and
    `labels` (N,), on the CPU; labels below 0 are no class and do not count. ValueError for less than two classes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, features: Features, real: Tensor, labels: Tensor):
        super().__init__()
        from sklearn.svm import SVC

        known = labels.cpu() >= 0
        if len(labels[known].unique()) < 2:
            raise ValueError("metrics: agreement needs real samples of two classes or more")
        self.features = features
        self.classifier = SVC(C=10.0).fit(real.double().cpu()[known].numpy(), labels.cpu()[known].numpy())
        for name in ("right", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, x: Tensor | None, cond: Cond, found: Tensor | None = None) -> None:
        """Count x (B, ...) with cond["class"] (B,); found (B, dims): its features, if they are known."""
        labels = cond["class"].cpu()
        known = labels >= 0
        if not bool(known.any()):
            return
        rows = torch.cat(list(features_in(self.features, x, found)))
        seen = torch.as_tensor(self.classifier.predict(rows.double().cpu()[known].numpy()))
        self.right += float((seen == labels[known]).sum())
        self.count += len(seen)

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]. Raises ValueError if no sample had a class."""
        if not self.count:
            raise ValueError("metrics: agreement was given no sample with a class")
        return self.right / self.count


class CaptionRetrieval(Metric):
    """How often the caption of a sample is among the k nearest, for each k of `top`, of `among` captions.

    A ridge regression from features to sentence embeddings is fitted to real samples by their features `real` (N, dims)
    and the embeddings of their `captions` (N, P), as `sentences` gives them, which are kept: 8 N P bytes. Nearest is by
    cosine to the prediction, both less the mean embedding. The other captions are among - 1 different ones of the real
    samples. The figure is the mean over all ways to draw them (the hypergeometric law), so that nothing is random.
    Captions as near as the true one count against it. Chance is k / among.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        features: Features,
        real: Tensor,
        captions: Tensor,
        *,
        top: tuple[int, ...] = (1, 5),
        among: int = 100,
    ):
        super().__init__()
        self.features, self.top, self.among = features, top, among
        self.regression = Ridge(real.double(), captions)
        self.pool = _different(captions)
        if len(self.pool) < among + 1:  # one of them may be that of the sample
            raise ValueError(
                f"metrics.among: {among} wants more than {among} different captions of real samples; "
                f"there are {len(self.pool)}"
            )
        self.add_state("found", torch.zeros(len(top), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, x: Tensor | None, cond: Cond, found: Tensor | None = None) -> None:
        """Count x (B, ...) with its text conditions: "pooled" (B, P), or "text" (B, L, P) and its mask.

        found (B, dims): its features, if they are known, in which case x may be None.
        """
        own, mean = sentences(cond).to(self.pool.device), self.regression.mean
        rows = torch.cat(list(features_in(self.features, x, found)))
        predicted = F.normalize(self.regression(rows.double()) - mean)
        near = predicted @ F.normalize(self.pool - mean).T
        true = (predicted * F.normalize(own - mean)).sum(1, keepdim=True)
        others = own @ self.pool.T < SAME
        nearer = ((near >= true) & others).sum(1).double()
        chances = below(nearer, others.sum(1).double(), draws=self.among - 1, most=max(self.top))
        self.found += torch.stack([chances[:, :k].sum(1).sum() for k in self.top])
        self.count += len(own)

    def compute(self) -> Tensor:
        """(len(top),) float64 in [0, 1]. Raises ValueError if no sample was given."""
        if not self.count:
            raise ValueError("metrics: retrieval was given no sample")
        return self.found / self.count


class Ridge:
    """A linear map with a constant from features (N, D) to targets (N, P), by least squares with a ridge penalty.

    The penalty minimises the leave-one-out error (closed form). A call maps (B, D) to (B, P); `mean` (P,) is the mean
    target.
    """

    def __init__(self, features: Tensor, targets: Tensor):
        self.centre, self.scale = features.mean(0), features.std(0).clamp_min(1e-12)
        self.mean = targets.mean(0)
        x, y = (features - self.centre) / self.scale, targets - self.mean
        left, sizes, right = torch.linalg.svd(x, full_matrices=False)
        z, shared, values = left * sizes, sizes[:, None] * (left.T @ y), sizes.square()
        penalties = (RIDGES.to(x) * len(x)).tolist()
        best = min(penalties, key=lambda penalty: _left_out_error(z, values + penalty, shared, y))
        self.weights = right.T @ (shared / (values + best)[:, None])

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.centre) / self.scale @ self.weights + self.mean


def _left_out_error(z: Tensor, shrunk: Tensor, shared: Tensor, y: Tensor) -> float:
    """The leave-one-out mean squared error; z (N, D) in principal directions, shrunk z^T z + penalty, shared z^T y."""
    leverage = (z.square() / shrunk).sum(1) + 1 / len(z)
    return float(
        ((y - z @ (shared / shrunk[:, None])).square().sum(1) / (1 - leverage).clamp_min(1e-6).square()).mean()
    )


def below(marked: Tensor, total: Tensor, *, draws: int, most: int) -> Tensor:
    """(B, most): the probabilities that 0, 1, ... most - 1 of the marked ones are among `draws` without replacement.

    marked, total: (B,), how many are marked and how many there are.
    """

    def ways(n: Tensor, k: Tensor) -> Tensor:
        inside = (k >= 0) & (k <= n)
        k = torch.where(inside, k, 0)
        return torch.where(inside, torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1), -torch.inf)

    b, m = marked[:, None], total[:, None]
    j = torch.arange(most, dtype=torch.float64, device=marked.device).expand(len(marked), most)
    return (ways(b, j) + ways(m - b, draws - j) - ways(m, torch.full_like(m, draws))).exp()


def sentences(cond: Cond) -> Tensor:
    """(B, P) float64 of length 1: the pooled embedding of a text, or the mean of its words. ValueError without text."""
    if "pooled" in cond:
        return F.normalize(cond["pooled"].double())
    if "text" not in cond:
        raise ValueError(
            f"metrics: retrieval needs conditions of text (pooled or text); these are {', '.join(cond) or 'none'}"
        )
    words = cond["text"].double()
    mask = cond["text_mask"] if "text_mask" in cond else torch.ones(words.shape[:2], device=words.device)
    return F.normalize((words * mask.double()[..., None]).sum(1))


def _different(captions: Tensor) -> Tensor:
    """The rows that differ from every row before them."""
    # argmax gives the first row that is the same
    repeats = torch.cat([((part @ captions.T) >= SAME).double().argmax(1) for part in captions.split(1024)])
    return captions[repeats == torch.arange(len(captions), device=captions.device)]

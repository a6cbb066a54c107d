"""A feature space that no loss uses: a small network trained only on the real pictures, to classify them.

It is to these data what Inception is to ImageNet.  Use it as `features: _labels:labels` in a metric, after `fit`. It is
the same on every run.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

MOST = 10_000  # pictures that it is taught with
_known: dict[str, list[Tensor]] = {}


def fit(dataset) -> float:
    """Teaches the network the training samples' classes; the share of held-out samples that it then tells rightly."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    net = MLPClassifier((128, 64), max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net.fit(_rows(dataset.train[:MOST]).numpy(), dataset.labels[:MOST].numpy())
    _known["weights"], _known["biases"] = (
        [torch.as_tensor(np.array(part)) for part in parts[:2]] for parts in (net.coefs_, net.intercepts_)
    )
    return float(net.score(_rows(dataset.held_out).numpy(), dataset.held_out_labels.numpy()))


def labels(x: Tensor) -> Tensor:
    """(B, 64) for pictures x (B, ...): the last hidden layer."""
    x = _rows(x)
    for weight, bias in zip(_known["weights"], _known["biases"], strict=True):
        x = torch.relu(x @ weight + bias)
    return x


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1).double()

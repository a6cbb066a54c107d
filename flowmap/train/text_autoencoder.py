"""The artifact of the objective `text_elbo`: a text autoencoder with its tokenizer, reconstructions, figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.base.files import write_text
from flowmap.data import TextDataset
from flowmap.data.text.autoencoder import save_text_autoencoder
from flowmap.data.text.tokens import Tokens
from flowmap.objectives.language import IGNORED, divergence
from flowmap.plan.plan import Stage
from flowmap.train.callbacks import AtPictures, Keep
from flowmap.train.card import short_card
from flowmap.train.module import DistillModule

MEASURED = 1000  # sentences that are measured, if there are as many
MAX_FOR_STATISTICS = 4096  # sentences by which the latents' shift and scale are measured


class KeepAutoencoder(Keep):
    """Saves student/ as a folder that text_autoencoder.TextAutoencoder loads."""

    def ship(self, module: DistillModule, state: dict[str, Tensor], done: int) -> None:
        save_autoencoder(self.stage, module, state, done)


class Reconstructions(AtPictures):
    """Writes samples/step-N.txt: held-out sentences, each above its reconstruction."""

    def show(self, trainer, module: DistillModule, done: int) -> None:
        if not trainer.is_global_zero:
            return
        rows = _unseen(module)[: self.stage.recipe.log.grid_images]
        pairs = zip(_tokens(module).decode(rows), reconstructed(module, rows), strict=True)
        write_text(
            self.stage.folder / "samples" / f"step-{done:08d}.txt", "\n".join(f"{a}\n  {b}" for a, b in pairs) + "\n"
        )


@torch.no_grad()
def reconstructed(module: DistillModule, rows: Tensor, batch_size: int = 256) -> list[str]:
    """The reconstructions of token rows (N, L): the posterior's mean, decoded greedily."""
    net = module.averaged.net
    parts = [net.generate(net.moments(part.to(module.device).float())[0]).cpu() for part in rows.split(batch_size)]
    return [text for part in parts for text in _tokens(module).decode(part)]


@torch.no_grad()
def measure_autoencoder(module: DistillModule) -> dict[str, Any]:
    """The contents of metrics.json, on held-out sentences as tokens (cut to the length of training).

    The row "1" of "student" has exact: the share of sentences that are reconstructed letter by letter; word_accuracy:
    that of words at their places; token_accuracy and nll_per_token: of next tokens given the true ones before, from the
    posterior's mean; kl, in nats; active: the number of latent entries with a KL above 0.01 nats.
    """
    started, rows = time.perf_counter(), _unseen(module)
    rows = rows[:: -(-len(rows) // MEASURED)]  # evenly spaced, since a source may be sorted
    net, texts = module.averaged.net, _tokens(module).decode(rows)
    again = reconstructed(module, rows)
    row = {
        "exact": sum(a == b for a, b in zip(texts, again, strict=True)) / len(texts),
        "word_accuracy": sum(map(_words_kept, texts, again)) / len(texts),
        **_teacher_forced(net, rows.to(module.device)),
    }
    seconds = {"evaluate": round(time.perf_counter() - started, 4)}
    sentences = {key: int(value) for key, value in (module.data.sentence_counts() or {}).items()}
    return {
        "student": {"1": row},
        "floor": {},
        "seconds": seconds,
        "nfe": {"student": {"1": 1}},
        "sentences": sentences,
    }


def _teacher_forced(net, rows: Tensor) -> dict[str, float]:
    right = tokens = nll = 0.0
    kls, active = [], 0
    for part in rows.split(256):
        mean, logvar = net.moments(part)
        logits, targets = net.logits(mean, part)
        counted = targets != IGNORED
        right += float(((logits.argmax(-1) == targets) & counted).sum())
        tokens += float(counted.sum())
        nll += float(
            torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="sum"
            )
        )
        kls.append(float(divergence(mean, logvar, 0.0)[0]) * len(part))
    each = ((mean.square() + logvar.exp() - 1 - logvar) / 2).flatten(1).mean(0)
    active = int((each > 0.01).sum())
    return {
        "token_accuracy": right / tokens,
        "nll_per_token": nll / tokens,
        "kl": sum(kls) / len(rows),
        "active": active,
    }


def _words_kept(text: str, again: str) -> float:
    words, found = text.split(), again.split()
    return sum(a == b for a, b in zip(words, found, strict=False)) / max(len(words), len(found), 1)


def save_autoencoder(
    stage: Stage,
    module: DistillModule,
    state: dict[str, Tensor],
    done: int,
    metrics: dict | None = None,
    *,
    net=None,
    folder: Path | None = None,
) -> None:
    """Write student/: weights, tokenizer, and the shift and scale that normalise latents of training sentences.

    net, folder: the autoencoder and its folder, if they are not the whole network and student/.
    """
    call = "flowmap.data.text.autoencoder.TextAutoencoder(source=folder).load()"
    what = f"A text autoencoder, trained for {done} steps: `{call}` has encode and decode."
    card = short_card(stage.recipe.name, what, metrics)
    weights = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    rows = module.data.reference[:: max(1, len(module.data) // MAX_FOR_STATISTICS)].long()
    folder, net = folder or stage.folder / "student", module.averaged.net if net is None else net
    save_text_autoencoder(folder, net, weights, _tokens(module), rows, recipe=stage.recipe.to_yaml(), card=card)


def _tokens(module: DistillModule) -> Tokens:
    """The tokenizer of the token rows that are trained on."""
    data = module.data
    assert isinstance(data, TextDataset) and data.tokens is not None, "a text autoencoder trains on token rows"
    return data.tokens


def _unseen(module: DistillModule) -> Tensor:
    """Rows of held-out sentences, or of training sentences if none are held out."""
    return (module.data.held_out if len(module.data.held_out) else module.data.reference).long()

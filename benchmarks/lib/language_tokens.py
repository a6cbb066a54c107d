"""The parts of benchmarks/language.py on conditions that are tokens: infilling, and sequences of tags.

A student's `loss` is its flow's on all held-out sentences, at fixed times and noise; `loss of another` is that with the
conditions of another sentence: their difference is what the flow makes of the conditions.
"""

from __future__ import annotations

from functools import cached_property

import torch

from lib.language_nets import language_model

TIMES = (0.2, 0.4, 0.6, 0.8)


class Trained:
    """A student of a run, its data, and its conditions of all held-out sentences in the order of an evaluation."""

    def __init__(self, bench, name: str):
        from flowmap.build.data import build_data
        from flowmap.data.dataset import looked_at
        from flowmap.evaluation.conditions import conditions_for
        from flowmap.plan.plan import resolve
        from flowmap.recipe.recipe import read_resolved

        folder = bench.folder(name)
        self.bench, self.student = bench, bench.student(name)
        self.data = build_data(resolve(read_resolved(folder / "recipe.yaml")))
        self.num = len(self.data.held_out)
        self.order = looked_at(torch.arange(self.num), self.num)
        self.cond = dict(conditions_for(self.student, self.data, self.num)(torch.arange(self.num)))

    def drawn(self, steps: int, cond: dict | None = None) -> list[str]:
        cond = self.cond if cond is None else cond
        return self.student.sample(self.num, steps=steps, cond=cond, seed=self.bench.seed)

    @property
    def none(self) -> dict:
        """No condition, for every sentence."""
        return dict(self.student.conditions(self.num))

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        x0 = self.data.held_out[self.order]
        x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        others = {key: rows.roll(1, 0) for key, rows in self.cond.items()}
        found = {"loss": self.cond, "loss_of_another": others}
        return {name: sum(self._loss(x0, x1, t, cond) for t in TIMES) / len(TIMES) for name, cond in found.items()}

    def _loss(self, x0, x1, t: float, cond: dict) -> float:
        xt, total = (1 - t) * x0 + t * x1, 0.0
        for i in range(0, len(x0), 256):
            at = slice(i, i + 256)
            rows = {key: value[at] for key, value in cond.items()}
            v = self.student.flow_map.velocity(xt[at], torch.full((len(xt[at]),), t), rows)
            total += float((v - (x1 - x0)[at]).square().mean()) * len(v)
        return total / len(x0)


class Likelihood:
    """perplexity(texts), under a GPT-2 trained on the training sentences."""

    def __init__(self, bench, steps: int):
        self.bench, self.steps = bench, steps

    @cached_property
    def _metric(self):
        from flowmap.metrics.text import Perplexity
        from flowmap.recipe import read_recipe

        texts = [one.text for one in read_recipe("language/wordnet").data.read()[0]]
        if self.bench.smoke:
            texts = texts[:1500]
        lm = language_model(self.bench.root / "lm", texts, steps=self.steps)
        return Perplexity(source=str(lm)).build(None)

    def perplexity(self, texts: list[str]) -> float:
        return self._metric.perplexity([text for text in texts if text.strip()])


def infill_tokens(bench, likelihood: Likelihood) -> None:
    """Middle thirds of all held-out sentences: both sides as vectors, and as tokens, under equal terms."""
    from flowmap.data.text.described import outer_thirds
    from flowmap.metrics.text import Distinct
    from flowmap.metrics.text_conditioned import Infilled

    vectors, tokens = Trained(bench, "infill"), Trained(bench, "infill-tokens")
    wanted = tokens.data.wanted(tokens.num)
    sides = [outer_thirds(tokens.data.held_out_texts[i]) for i in tokens.order.tolist()]

    def figures(middles: list[str]) -> dict:
        whole = [
            " ".join(f"{left} {middle} {right}".split())
            for (left, _, right), middle in zip(sides, middles, strict=True)
        ]
        found = Infilled().report(None, middles, {"left": tokens.cond["left"]}, wanted)
        found |= Distinct().report(None, middles, {}) | {"perplexity": likelihood.perplexity(whole)}
        return found | ({"first": whole[:10]} if bench.seed == 0 else {})

    for name, trained in (("vectors", vectors), ("tokens", tokens)):
        for steps in (1, 4, 20):
            made = lambda trained=trained, steps=steps: {"calls": steps} | figures(trained.drawn(steps))
            bench.keep("infill_tokens", f"{name} {steps}", made)
        bench.keep("infill_tokens", f"{name}, the flow", trained.losses)
    rows = {
        "another sentence's": lambda: [*wanted[1:], wanted[0]],
        "what stood there, through the autoencoder": lambda: tokens.student.sentences(
            tokens.data.held_out[tokens.order]
        ),
        "what stood there": lambda: wanted,
    }
    for name, middles in rows.items():
        bench.keep("infill_tokens", name, lambda middles=middles: figures(middles()))


def tags(bench, likelihood: Likelihood) -> None:
    """Sentences with the tags of held-out ones; without any condition; the held-out ones themselves."""
    from flowmap.metrics.text import Distinct
    from flowmap.metrics.text_conditioned import TagHit

    trained = Trained(bench, "tags")
    metric, real = TagHit(), [trained.data.held_out_texts[i] for i in trained.order.tolist()]
    built = metric.build(trained.data)

    def figures(texts: list[str]) -> dict:
        found = metric.report(built, texts, trained.cond) | Distinct().report(None, texts, {})
        found |= {"perplexity": likelihood.perplexity(texts)}
        return found | ({"first": texts[:10]} if bench.seed == 0 else {})

    for steps in (1, 4, 20):
        bench.keep("tags", f"tags {steps}", lambda steps=steps: {"calls": steps} | figures(trained.drawn(steps)))
    bench.keep("tags", "no condition 20", lambda: {"calls": 20} | figures(trained.drawn(20, trained.none)))
    bench.keep("tags", "tags, the flow", trained.losses)
    decoded = lambda: trained.student.sentences(trained.data.held_out[trained.order])
    bench.keep("tags", "held-out sentences, through the autoencoder", lambda: figures(decoded()))
    bench.keep("tags", "held-out sentences", lambda: figures(real))

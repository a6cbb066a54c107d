"""How good are sentences of a latent flow in 1 to 20 network calls?  And its editing, control and infilling?

They are compared with its reflow, its distilled student, a diffusion in the same latents at 20 to 1,000 calls, and the
VAE's prior.

Everything is trained by shipped recipes (language/wordnet*) and kept in runs/bench/language; finished runs are not made
again.  Every row is kept as soon as it is finished, and parts are left unfinished after `--minutes`; the same command
continues them. One autoencoder serves all seeds: figures compare flows, not decoders.  Its reconstruction is the first
row. Perplexity is under a GPT-2 of transformers that this script trains on the training sentences and no loss uses.
Conditions are those of held-out sentences, without guidance unless the row names it.  Seconds are of the network's
calls alone; decoding is given once.  phrase_hit uses a tagger to find what part of speech a sentence is a phrase of:
real definitions, the row "held-out sentences", are its ceiling.
The parts infill-tokens and tags (lib/language_tokens.py) are written to language_tokens.json. With --short they are
measured on shorter trainings (SHORT), whose figures compare with one another alone.
`python benchmarks/language.py [--seeds 3] [--parts few diffusion edit control infill infill-tokens tags]
[--minutes M] [--smoke] [--short]`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from lib.language_nets import Unconditional, ancestral, classifier_of_latents, language_model
from lib.language_tokens import Likelihood, infill_tokens, tags
from lib.report import environment, keep, kept, table, write
from tables.language import TOKEN_TABLES, tables

KEPT = Path("runs/bench/language")
NUM = 400  # sentences of a row
LM_STEPS = 2000
OF_TOKENS = {"infill-tokens": infill_tokens, "tags": tags}
PARTS = ("few", "diffusion", "edit", "control", "infill", *OF_TOKENS)
NAMES = ("vae", "flow", "reflow", "ayf", "edit", "edit-reflow", "infill", "infill-tokens", "tags")
RECIPE = {name: f"language/wordnet{'' if name == 'flow' else '-' + name}" for name in NAMES}
RECIPE |= {name: RECIPE["edit"] for name in ("edit-verb", "edit-independent")}
STYLES = "{kind: styles, source: [part_of_speech=noun], target: [part_of_speech=verb], match: optimal}"
VERB = ["name=language-wordnet-edit-verb", "data.attributes=[part_of_speech]", f"coupling={STYLES}"]
SHORT = {"autoencoder_steps": 1300, "flow_steps": 1500, "language_model_steps": 600}
SMOKE = ["data.limit=1500", "trainer.steps=8"]
SMOKE_VAE = [*SMOKE, "data.batch_size=8", "student.width=32", "student.depth=1", "student.heads=2"]


class OutOfTime(Exception):
    """The minutes that were given are over; what is done is kept."""


class Bench:
    """One seed: its runs, made when first asked for, and its figures, kept in seed-<k>.json as they come."""

    def __init__(self, seed: int, smoke: bool, until: float = math.inf, *, short: bool = False):
        self.until, self.short = until, short
        kind = "-smoke" if smoke else "-short" if short else ""
        self.seed, self.smoke, self.root = seed, smoke, KEPT.with_name(f"language{kind}")
        self.num = 40 if smoke else NUM
        self.kept = self.root / f"seed-{seed}.json"
        self.figures = kept(self.kept)
        os.environ["FLOWMAP_RUNS"] = str(self.root)

    def overrides(self, name: str) -> list[str]:
        """What the recipes of this seed differ in from the shipped ones."""
        steps = [f"trainer.steps={SHORT['autoencoder_steps']}"]
        vae = SMOKE_VAE if self.smoke else steps if self.short else []
        if name == "vae":
            return vae
        own = [
            f"seed={self.seed}",
            "log.wandb=false",
            "log.grid_images=10",
            "metrics=[]",
            "trainer.accelerator=cpu",
            *(SMOKE if self.smoke else [f"trainer.steps={SHORT['flow_steps']}"] if self.short else []),
        ]
        own += [f"data.autoencoder.overrides={json.dumps(vae)}"] if vae else []
        flow = json.dumps(self.overrides("flow")) if name in ("reflow", "ayf") else ""
        if name == "reflow":
            own += ["coupling.teacher.guidance=null", f"coupling.teacher.overrides={flow}", f"student.overrides={flow}"]
        if name == "edit-verb":
            own += VERB
        if name == "edit-independent":
            own += ["name=language-wordnet-edit-independent", "coupling.match=independent"]
        if name == "edit-reflow":
            edit = json.dumps(self.overrides("edit"))
            own += [f"coupling.teacher.overrides={edit}", f"student.overrides={edit}"]
        if name in ("reflow", "edit-reflow") and self.smoke:
            own += ["coupling.num=100"]
        if name == "ayf":
            own += [f"teacher.overrides={flow}"]
        if name == "diffusion":
            own += ["path={kind: trig}", "name=language-wordnet-diffusion", "times={kind: uniform}"]
        return own

    def folder(self, name: str) -> Path:
        """The finished run of that name, trained first where it is not there."""
        from flowmap.plan.run_folders import dependency_folder, is_complete
        from flowmap.recipe import read_recipe

        recipe, changes = RECIPE.get(name, RECIPE["flow"]), self.overrides(name)
        out = dependency_folder(read_recipe(recipe, changes))
        if not is_complete(out, read_recipe(recipe, changes)):
            self.must_have_time()
            print(f"seed {self.seed}: training {name} -> {out}", flush=True)
            subprocess.run(
                [sys.executable, "-m", "flowmap", "fit", "--recipe", recipe, *changes, "--out", str(out), "--resume"],
                check=True,
            )
        return out

    def must_have_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def student(self, name: str):
        from flowmap.student.folder import load_student

        return load_student(self.folder(name))

    def keep(self, part: str, key: str, make) -> dict:
        """The figures under that key.

        `make()` makes them if they are missing, or if they were computed against training sentences alone.
        """
        rows = self.figures.setdefault(part, {})
        if key not in rows or "divergence_words" in rows[key] and "divergence_words_train" not in rows[key]:
            self.must_have_time()
            rows[key] = make()
            keep(self.kept, self.figures)
            print(f"seed {self.seed}: {part}: {key}: {rows[key]}", flush=True)
        return rows[key]


class Look:
    """The metrics of sentences, fitted once for all seeds.

    look(texts, cond) returns the figures of a row, brief(texts, cond) those of control.
    """

    def __init__(self, bench: Bench):
        from flowmap.build.data import build_data
        from flowmap.metrics.text import Distinct, Memorised, Perplexity, SelfBLEU, TextDivergence
        from flowmap.metrics.text_conditioned import Control, Phrase
        from flowmap.plan.plan import resolve
        from flowmap.recipe import read_recipe

        self.data = build_data(resolve(read_recipe(RECIPE["flow"], bench.overrides("flow"))))
        lm = language_model(bench.root / "lm", self.data.texts, steps=10 if bench.smoke else LM_STEPS)
        num = bench.num
        self.specs = [
            Perplexity(num, source=str(lm)), Distinct(num), Control(num), Phrase(num), TextDivergence(num),
            TextDivergence(num, features="minilm"),
            SelfBLEU(looked_at=50), Memorised(num),
        ]  # fmt: skip
        self.built = [spec.build(self.data) for spec in self.specs]

    def __call__(self, texts, cond, sources=None, first: int | None = None) -> dict[str, float]:
        found = list(zip(self.specs, self.built, strict=True))[:first]
        return {
            key: value for spec, metric in found for key, value in spec.report(metric, texts, cond, sources).items()
        }

    def brief(self, texts, cond) -> dict[str, float]:
        return self(texts, cond, first=4)

    def floor(self) -> dict[str, float]:
        return {
            key: v
            for spec, metric in zip(self.specs, self.built, strict=True)
            for key, v in spec.floor(metric, self.data).items()
        }


def asked(student, data, num: int) -> dict:
    """The conditions of `num` held-out sentences, as the student takes them."""
    from flowmap.evaluation.conditions import conditions_for

    return dict(conditions_for(student, data, num)(torch.arange(num)))


def drawn(bench: Bench, look: Look, name: str, steps: int, guidance: float | None = None) -> dict:
    """Figures of sentences of a student at so many steps; with the first ten of seed 0."""
    student = bench.student(name)
    cond = {key: value for key, value in asked(student, look.data, bench.num).items() if key != "guidance"}
    if guidance is None and student.config.guidance is not None:
        guidance = 1.0
    started = time.perf_counter()
    latents = student.sample(bench.num, steps=steps, cond=cond, guidance=guidance, seed=bench.seed, latents=True)
    seconds = time.perf_counter() - started
    return read(bench, look, student, latents, cond, {"calls": steps, "seconds": seconds})


def read(bench: Bench, look, student, latents, cond, row: dict) -> dict:
    started = time.perf_counter()
    texts = student.sentences(latents)
    return (
        row
        | {"decode_seconds": time.perf_counter() - started}
        | look(texts, cond)
        | ({"first": texts[:10]} if bench.seed == 0 else {})
    )


def few(bench: Bench, look: Look) -> None:
    for name, counts in (("flow", (1, 2, 4, 8, 20)), ("reflow", (1, 2, 4)), ("ayf", (1, 2, 4))):
        for steps in counts:
            bench.keep("few", f"{name} {steps}", lambda name=name, steps=steps: drawn(bench, look, name, steps))
    bench.keep("few", "ayf 4, guidance 2", lambda: drawn(bench, look, "ayf", 4, 2.0))
    bench.keep("few", "prior of the VAE", lambda: prior(bench, look))
    bench.keep("few", "held-out sentences", look.floor)


def prior(bench: Bench, look: Look) -> dict:
    """What the decoder makes of the Gaussian that the VAE's posterior is drawn towards."""
    student = bench.student("flow")
    words, cond = student.words, asked(student, look.data, bench.num)
    z = torch.randn(bench.num, *words.shape, generator=torch.Generator().manual_seed(bench.seed))
    return read(bench, look, student, (z - words.shift) * words.scale, cond, {"calls": 0, "seconds": 0.0})


def diffusion(bench: Bench, look: Look) -> None:
    for steps in (2, 4) if bench.smoke else (20, 200, 1000):
        bench.keep("diffusion", f"diffusion {steps}", lambda steps=steps: diffused(bench, look, steps))


def diffused(bench: Bench, look: Look, steps: int) -> dict:
    student = bench.student("diffusion")
    cond, started = asked(student, look.data, bench.num), time.perf_counter()
    latents = torch.cat([
        ancestral(
            student, steps, {key: value[i : i + 250] for key, value in cond.items()},
            len(range(i, min(i + 250, bench.num))), bench.seed + i,
        )
        for i in range(0, bench.num, 250)
    ])  # fmt: skip
    return read(bench, look, student, latents, cond, {"calls": steps, "seconds": time.perf_counter() - started})


def edit(bench: Bench, look: Look) -> None:
    """Edit from one category to another, and from nouns to verbs.

    Compared are the flow between sets joined by minibatch optimal transport, its reflow, the flow between sets joined
    independently, and the difference of mean latents added to the source.
    """
    edited(bench, "category", ("edit", "edit-reflow", "edit-independent"))
    edited(bench, "part of speech", ("edit-verb",))


def edited(bench: Bench, what: str, names) -> None:
    from flowmap.build.data import build_data
    from flowmap.flow.prior import Start
    from flowmap.metrics.text import Distinct
    from flowmap.metrics.text_conditioned import ContentKept, Phrase, StyleHit
    from flowmap.plan.plan import resolve
    from flowmap.recipe.recipe import read_resolved

    data = build_data(resolve(read_resolved(bench.folder(names[0]) / "recipe.yaml")))
    x1, sources = data.starts(min(bench.num, len(data.held_out_sources)))
    specs, asked_for = (
        [StyleHit(), ContentKept(embedding=True), Distinct(), *([Phrase()] if what == "part of speech" else [])],
        {},
    )
    built = [spec.build(data) for spec in specs]
    if what == "part of speech":
        asked_for = {"part_of_speech": data.codes["part_of_speech"][:1].expand(len(x1))}  # of the target, all alike

    def figures(texts, calls: int) -> dict:
        found = {
            key: v
            for spec, metric in zip(specs, built, strict=True)
            for key, v in spec.report(metric, texts, asked_for, sources).items()
        }
        return (
            found
            | {"calls": calls}
            | ({"first": list(zip(sources, texts, strict=True))[:10]} if bench.seed == 0 else {})
        )

    for name in names:
        student = bench.student(name)
        carried = lambda steps, student=student: student.carry(
            Start(x1), student.conditions(len(x1)), steps, torch.Generator().manual_seed(0)
        )
        kind = {"edit-reflow": "reflow", "edit-independent": "flow, independent"}.get(name, "flow")
        for steps in (1, 2, 4) if kind == "reflow" else (1, 2, 4, 8, 20):
            bench.keep(
                "edit", f"{what}: {kind} {steps}", lambda steps=steps, carried=carried: figures(carried(steps), steps)
            )
    difference = data.train.mean(0) - data.sources.mean(0)
    for factor in (0.0, 1.0, 2.0, 3.0):
        moved = lambda factor=factor: figures(student.sentences(x1 + factor * difference), 0)
        bench.keep("edit", f"{what}: mean difference x {factor:g}", moved)


def control(bench: Bench, look: Look) -> None:
    """One attribute given, the rest free: by classifier-free guidance of the student, and by a latent classifier."""
    for name in ("length", "part_of_speech", "category"):
        for scale in (1.0, 3.0):
            bench.keep(
                "control",
                f"{name}, guidance {scale:g}",
                lambda name=name, scale=scale: one_attribute(bench, look, name, scale),
            )
    for scale in (0.0, 1.0, 3.0):
        bench.keep(
            "control", f"part_of_speech, classifier {scale:g}", lambda scale=scale: by_classifier(bench, look, scale)
        )


def one_attribute(bench: Bench, look: Look, name: str, scale: float) -> dict:
    student = bench.student("ayf")
    cond = {name: asked(student, look.data, bench.num)[name]}
    latents = student.sample(bench.num, steps=4, cond=cond, guidance=scale, seed=bench.seed, latents=True)
    return read(bench, look.brief, student, latents, cond, {"calls": 4})


def by_classifier(bench: Bench, look: Look, scale: float) -> dict:
    from flowmap.flow.solver import Euler
    from flowmap.teachers.classifier import ClassifierGuided
    from flowmap.teachers.network import NetworkTeacher

    student = bench.student("flow")
    wanted = asked(student, look.data, bench.num)["part_of_speech"]
    net = classifier_of_latents(look.data, steps=20 if bench.smoke else 2000, seed=bench.seed)
    log_prob = lambda x, t, cond: (
        net(torch.cat([x.flatten(1), t[:, None]], 1)).log_softmax(-1).gather(1, cond["wanted"][:, None])[:, 0]
    )
    guided = ClassifierGuided(Unconditional(NetworkTeacher(student.flow_map)), log_prob, scale=scale)
    x1 = torch.randn(bench.num, *student.config.shape, generator=torch.Generator().manual_seed(bench.seed))
    latents = Euler(steps=20)(lambda x, t: guided.velocity(x, t, {"wanted": wanted}), x1).x
    return read(bench, look.brief, student, latents, {"part_of_speech": wanted}, {"calls": 20})


def infill(bench: Bench, look: Look) -> None:
    """Middle thirds of all held-out sentences from their sides.

    Compared with the original middle through the autoencoder, and with the middle of another sentence.
    """
    from flowmap.build.data import build_data
    from flowmap.data.dataset import looked_at
    from flowmap.data.text.described import outer_thirds
    from flowmap.metrics.text import Distinct
    from flowmap.metrics.text_conditioned import Infilled
    from flowmap.plan.plan import resolve
    from flowmap.recipe.recipe import read_resolved

    data, student = build_data(resolve(read_resolved(bench.folder("infill") / "recipe.yaml"))), bench.student("infill")
    num, order = len(data.held_out), looked_at(torch.arange(len(data.held_out)), len(data.held_out))
    sides, wanted, cond = (
        [outer_thirds(data.held_out_texts[i]) for i in order.tolist()],
        data.wanted(num),
        asked(student, data, num),
    )

    def figures(middles: list[str]) -> dict:
        whole = [
            " ".join(f"{left} {middle} {right}".split())
            for (left, _, right), middle in zip(sides, middles, strict=True)
        ]
        found = Infilled().report(None, middles, cond, wanted) | Distinct().report(None, middles, cond)
        return (
            found | {"perplexity": look.built[0].perplexity(whole)} | ({"first": whole[:10]} if bench.seed == 0 else {})
        )

    drawn = lambda steps: student.sample(num, steps=steps, cond=cond, seed=bench.seed)
    for steps in (1, 2, 4, 8, 20):
        bench.keep("infill", f"flow {steps}", lambda steps=steps: {"calls": steps} | figures(drawn(steps)))
    bench.keep("infill", "another sentence's", lambda: figures([*wanted[1:], wanted[0]]))
    bench.keep(
        "infill", "what stood there, through the autoencoder", lambda: figures(student.sentences(data.held_out[order]))
    )
    bench.keep("infill", "what stood there", lambda: figures(wanted))


def report(benches: list[Bench]) -> dict[str, dict]:
    made = tables([bench.figures for bench in benches])
    for name, one in made.items():
        print(f"\n{name}\n{table(one['rows'], one['columns'])}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="nothing is begun after these; what is done is kept"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed: does it run?")
    parser.add_argument("--short", action="store_true", help="shorter trainings, for infill-tokens and tags")
    a = parser.parse_args()
    if a.short and not set(a.parts) <= set(OF_TOKENS):
        parser.error(f"--short: is for --parts {' '.join(OF_TOKENS)}")
    until = time.monotonic() + 60 * a.minutes
    benches = [Bench(seed, a.smoke, until, short=a.short) for seed in range(1 if a.smoke else a.seeds)]
    reconstruction = json.loads((benches[0].folder("vae") / "metrics.json").read_text())["student"]["1"]
    print(f"autoencoder, held-out sentences: {reconstruction}", flush=True)
    try:
        measured(a.parts, benches)
    except OutOfTime:
        print(f"{a.minutes:g} minutes are over: the same command goes on", flush=True)
    payload = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "settings": {"seeds": list(range(len(benches)))} | (SHORT if a.short else {}),
        "autoencoder": reconstruction,
    }
    made = report(benches)
    for name, of_tokens in (("language", False), ("language_tokens", True)):
        parts = [part for part in a.parts if (part in OF_TOKENS) == of_tokens]
        if parts and not a.smoke:
            write(name, payload | of(made, benches, of_tokens))


def measured(parts: list[str], benches: list[Bench]) -> None:
    """Measure the parts; what the metrics need is fitted for those that use them."""
    steps = 10 if benches[0].smoke else SHORT["language_model_steps"] if benches[0].short else LM_STEPS
    likelihood = Likelihood(benches[0], steps)
    look = Look(benches[0]) if set(parts) - set(OF_TOKENS) else None
    for bench in benches:
        for part in parts:
            if part in OF_TOKENS:
                OF_TOKENS[part](bench, likelihood)
            else:
                globals()[part](bench, look)


def of(made: dict, benches: list[Bench], tokens: bool) -> dict:
    """The tables and figures of one of the two result files."""
    ours = lambda part: (part.replace("_", "-") in OF_TOKENS) == tokens
    return {
        "tables": {name: one for name, one in made.items() if (name in TOKEN_TABLES) == tokens},
        "figures": [{part: rows for part, rows in bench.figures.items() if ours(part)} for bench in benches],
    }


if __name__ == "__main__":
    main()

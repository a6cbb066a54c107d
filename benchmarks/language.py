"""How good are sentences of a latent flow in 1 to 20 network calls, beside its reflow, its distilled student, a diffusion in the same latents at
20 to 1,000 calls and the VAE's prior?  And editing, control and infilling.

Everything is trained by shipped recipes (language/wordnet*), kept under runs/bench/language and not made again: a benchmark that was cut goes on.
One autoencoder serves all seeds: figures compare flows, not decoders, and its own reconstruction stands first.  Perplexity is under a GPT-2 of
transformers that this script trains on the training sentences and no loss uses.  Conditions are those of held-out sentences, without guidance
where the row does not say otherwise.  Seconds are of the network's calls alone; decoding is given once.
`python benchmarks/language.py [--seeds 3] [--parts few diffusion edit control infill] [--smoke]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _report import environment, table, write

KEPT = Path("runs/bench/language")
NUM = 1000  # sentences of a row
PARTS = ("few", "diffusion", "edit", "control", "infill")
RECIPE = {name: f"language/wordnet{'' if name == 'flow' else '-' + name}" for name in ("vae", "flow", "reflow", "ayf", "edit", "infill")}
SMOKE = ["data.limit=1500", "trainer.accelerator=cpu", "trainer.steps=8", "metrics=[]", "log.grid_images=10"]
SMOKE_VAE = ["data.limit=1500", "trainer.steps=8", "data.batch_size=8", "student.width=32", "student.depth=1", "student.heads=2"]


class Bench:
    """One seed: its runs, made when first asked for, and its figures, kept in seed-<k>.json as they come."""

    def __init__(self, seed: int, smoke: bool):
        self.seed, self.smoke, self.root = seed, smoke, KEPT.with_name("language-smoke") if smoke else KEPT
        self.num = 40 if smoke else NUM
        self.kept = self.root / f"seed-{seed}.json"
        self.figures = json.loads(self.kept.read_text()) if self.kept.is_file() else {}
        os.environ["FLOWMAP_RUNS"] = str(self.root)

    def overrides(self, name: str) -> list[str]:
        """What the recipes of this seed differ in from the shipped ones."""
        vae = SMOKE_VAE if self.smoke else []
        if name == "vae":
            return vae
        own = [f"seed={self.seed}", "log.wandb=false", *(SMOKE if self.smoke else [])]
        own += [f"data.autoencoder.overrides={json.dumps(vae)}"] if vae else []
        flow = json.dumps(self.overrides("flow")) if name in ("reflow", "ayf") else ""
        if name == "reflow":
            own += [f"coupling.teacher.overrides={flow}", f"student.overrides={flow}", *(["coupling.num=100"] if self.smoke else [])]
        if name == "ayf":
            own += [f"teacher.overrides={flow}"]
        if name == "diffusion":
            own += ["path={kind: trig}", "name=language-wordnet-diffusion", "times={kind: uniform}"]
        return own

    def folder(self, name: str) -> Path:
        """The finished run of that name, trained first where it is not there."""
        from flowmap.planning.plan import dependency_folder, is_complete
        from flowmap.recipe import read_recipe

        recipe, changes = RECIPE.get(name, RECIPE["flow"]), self.overrides(name)
        out = dependency_folder(read_recipe(recipe, changes))
        if not is_complete(out, read_recipe(recipe, changes)):
            print(f"seed {self.seed}: training {name} -> {out}", flush=True)
            subprocess.run([sys.executable, "-m", "flowmap", "fit", "--recipe", recipe, *changes, "--out", str(out), "--resume"], check=True)
        return out

    def student(self, name: str):
        from flowmap.student.folder import load_student

        return load_student(self.folder(name))

    def keep(self, part: str, key: str, make) -> dict:
        """The figures under that key: made by `make()` where they are not there yet."""
        rows = self.figures.setdefault(part, {})
        if key not in rows:
            rows[key] = make()
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(json.dumps(self.figures, indent=1))
            print(f"seed {self.seed}: {part}: {key}: {rows[key]}", flush=True)
        return rows[key]


class Look:
    """The metrics of sentences, fitted once: look(texts, cond) are the figures of a row."""

    def __init__(self, bench: Bench):
        from flowmap.build import build_data
        from flowmap.metrics.text import Control, Distinct, Memorised, Perplexity, SelfBLEU, TextDivergence
        from flowmap.recipe import read_recipe

        self.data = build_data(read_recipe(RECIPE["flow"], bench.overrides("flow")))
        lm = language_model(bench.root / "lm", self.data.texts, steps=10 if bench.smoke else 3000)
        num = bench.num
        self.specs = [
            Perplexity(num, source=str(lm)), TextDivergence(num), TextDivergence(num, features="minilm"), Distinct(num), SelfBLEU(num),
            Control(num), Memorised(num),
        ]  # fmt: skip
        self.built = [spec.build(self.data) for spec in self.specs]

    def __call__(self, texts, cond, sources=None) -> dict[str, float]:
        found = zip(self.specs, self.built, strict=True)
        return {key: value for spec, metric in found for key, value in spec.report(metric, texts, cond, sources).items()}

    def floor(self) -> dict[str, float]:
        return {key: v for spec, metric in zip(self.specs, self.built, strict=True) for key, v in spec.floor(metric, self.data).items()}


def language_model(folder: Path, texts, *, steps: int, batch: int = 32) -> Path:
    """A small GPT-2 trained on the texts, kept in the folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from flowmap.data.tokens import BPE

    tokens = BPE(vocab=4096, max_tokens=40).fit(list(texts))
    rows, _ = tokens.encode(list(texts))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokens.vocab, n_positions=64, n_embd=128, n_layer=3, n_head=4, bos_token_id=2, eos_token_id=2)
    model = GPT2LMHeadModel(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=min(0.5, 100 / steps))
    for _ in range(steps):
        ids = torch.cat([torch.full((batch, 1), tokens.end), rows[torch.randint(len(rows), (batch,))]], 1)
        model(input_ids=ids, labels=ids.masked_fill(ids == tokens.pad, -100)).loss.backward()
        optimiser.step(), schedule.step(), optimiser.zero_grad()
    PreTrainedTokenizerFast(tokenizer_object=tokens.fast, eos_token="<end>", bos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def asked(student, data, num: int) -> dict:
    """The conditions of `num` held-out sentences, as the student takes them."""
    from flowmap.evaluate import conditions_for

    return dict(conditions_for(student, data, num)(torch.arange(num)))


def drawn(bench: Bench, look: Look, name: str, steps: int, guidance: float | None = None) -> dict:
    """Figures of sentences of a student at so many steps; the first ten of seed 0 stand beside them."""
    student = bench.student(name)
    cond = {key: value for key, value in asked(student, look.data, bench.num).items() if key != "guidance"}
    if guidance is None and student.config.guidance is not None:
        guidance = 1.0
    started = time.perf_counter()
    latents = student.sample(bench.num, steps=steps, cond=cond, guidance=guidance, seed=bench.seed, latents=True)
    seconds = time.perf_counter() - started
    return read(bench, look, student, latents, cond, {"calls": steps, "seconds": seconds})


def read(bench: Bench, look: Look, student, latents, cond, row: dict) -> dict:
    started = time.perf_counter()
    texts = student.sentences(latents)
    return row | {"decode_seconds": time.perf_counter() - started} | look(texts, cond) | ({"first": texts[:10]} if bench.seed == 0 else {})


@torch.no_grad()
def ancestral(student, steps: int, cond, num: int, seed: int):
    """DDPM's sampler on the diffusion's own path: x_s = a_s x0 + sqrt(b_s^2 - h^2) eps + h noise, h^2 = b_s^2 / b_t^2 (1 - a_t^2 / a_s^2)."""
    from flowmap.flow.path import Trig

    path, generator = Trig(), torch.Generator().manual_seed(seed)
    x = torch.randn(num, *student.config.shape, generator=generator)
    for i in range(steps, 0, -1):
        t, s = torch.full((num,), i / steps), torch.full((num,), (i - 1) / steps)
        v = student.flow_map.velocity(x, t, cond)
        x0, noise = (path.convert(v, x, t, source="velocity", target=target) for target in ("x0", "epsilon"))
        at, to = path.coefficients(t[0]), path.coefficients(s[0])
        put_back = (to.b**2 / at.b**2 * (1 - at.a**2 / to.a**2)).clamp_min(0)
        x = to.a * x0 + (to.b**2 - put_back).clamp_min(0).sqrt() * noise + put_back.sqrt() * torch.randn(x.shape, generator=generator)
        x = x.float()
    return x


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
        ancestral(student, steps, {key: value[i : i + 250] for key, value in cond.items()}, len(range(i, min(i + 250, bench.num))), bench.seed + i)
        for i in range(0, bench.num, 250)
    ])  # fmt: skip
    return read(bench, look, student, latents, cond, {"calls": steps, "seconds": time.perf_counter() - started})


def edit(bench: Bench, look: Look) -> None:
    """Of the flow between two categories, and of the difference of their mean latents added to the source."""
    from flowmap.build import build_data
    from flowmap.flow.prior import Start
    from flowmap.metrics.text import ContentKept, Distinct, StyleHit
    from flowmap.recipe import read_resolved

    folder = bench.folder("edit")
    data, student = build_data(read_resolved(folder / "recipe.yaml")), bench.student("edit")
    x1, sources = data.starts(min(bench.num, len(data.held_out_sources)))
    specs = [StyleHit(), ContentKept(embedding=True), Distinct()]
    built = [spec.build(data) for spec in specs]

    def figures(texts, calls: int) -> dict:
        found = {key: v for spec, metric in zip(specs, built, strict=True) for key, v in spec.report(metric, texts, {}, sources).items()}
        return found | {"calls": calls} | ({"first": list(zip(sources, texts, strict=True))[:10]} if bench.seed == 0 else {})

    carried = lambda steps: student.carry(Start(x1), student.conditions(len(x1)), steps, torch.Generator().manual_seed(0))
    for steps in (1, 2, 4, 20):
        bench.keep("edit", f"flow {steps}", lambda steps=steps: figures(carried(steps), steps))
    difference = data.train.mean(0) - data.sources.mean(0)
    for factor in (0.0, 1.0, 2.0, 3.0):
        bench.keep("edit", f"mean difference x {factor:g}", lambda factor=factor: figures(student.sentences(x1 + factor * difference), 0))


def control(bench: Bench, look: Look) -> None:
    """One attribute asked for, the rest free: by classifier-free guidance of the distilled student, and by a classifier of latents."""
    for name in ("length", "part_of_speech", "category"):
        for scale in (1.0, 3.0):
            bench.keep("control", f"{name}, guidance {scale:g}", lambda name=name, scale=scale: one_attribute(bench, look, name, scale))
    for scale in (0.0, 1.0, 3.0):
        bench.keep("control", f"part_of_speech, classifier {scale:g}", lambda scale=scale: by_classifier(bench, look, scale))


def one_attribute(bench: Bench, look: Look, name: str, scale: float) -> dict:
    student = bench.student("ayf")
    cond = {name: asked(student, look.data, bench.num)[name]}
    latents = student.sample(bench.num, steps=4, cond=cond, guidance=scale, seed=bench.seed, latents=True)
    return read(bench, look, student, latents, cond, {"calls": 4})


def by_classifier(bench: Bench, look: Look, scale: float) -> dict:
    from flowmap.flow.solver import Euler
    from flowmap.teachers.classifier import ClassifierGuided
    from flowmap.teachers.network import NetworkTeacher

    student = bench.student("flow")
    wanted = asked(student, look.data, bench.num)["part_of_speech"]
    net = classifier_of_latents(look.data, steps=20 if bench.smoke else 2000, seed=bench.seed)
    log_prob = lambda x, t, cond: net(torch.cat([x.flatten(1), t[:, None]], 1)).log_softmax(-1).gather(1, cond["wanted"][:, None])[:, 0]
    guided = ClassifierGuided(_Without(NetworkTeacher(student.flow_map)), log_prob, scale=scale)
    x1 = torch.randn(bench.num, *student.config.shape, generator=torch.Generator().manual_seed(bench.seed))
    latents = Euler(steps=20)(lambda x, t: guided.velocity(x, t, {"wanted": wanted}), x1).x
    return read(bench, look, student, latents, {"part_of_speech": wanted}, {"calls": 20})


class _Without:
    """The unconditional velocity."""

    def __init__(self, teacher):
        self.teacher = teacher

    def velocity(self, x, t, cond=None):
        return self.teacher.velocity(x, t, None)


def classifier_of_latents(data, *, steps: int, seed: int) -> torch.nn.Module:
    """log p(part of speech | noisy latents, t) on the linear path, by a small perceptron."""
    torch.manual_seed(seed)
    classes = len(next(one for one in data.attributes if one.name == "part_of_speech").values)
    net = torch.nn.Sequential(torch.nn.Linear(data.train[0].numel() + 1, 256), torch.nn.SiLU(), torch.nn.Linear(256, classes))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data.train), (256,))
        t, x0 = torch.rand(256, 1), data.train[rows].flatten(1)
        loss = torch.nn.functional.cross_entropy(net(torch.cat([(1 - t) * x0 + t * torch.randn_like(x0), t], 1)), data.codes["part_of_speech"][rows])
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return net.requires_grad_(False)


def infill(bench: Bench, look: Look) -> None:
    from dataclasses import replace

    from flowmap.build import build_data
    from flowmap.evaluate import measure
    from flowmap.metrics.text import Distinct, Infilled
    from flowmap.recipe import read_resolved

    def figures() -> dict:
        recipe = read_resolved(bench.folder("infill") / "recipe.yaml")
        found = measure(replace(recipe, metrics=(Infilled(bench.num), Distinct(bench.num))), bench.student("infill"), None, build_data(recipe))
        return found["student"]

    for steps, row in bench.keep("infill", "flow", figures).items():
        bench.keep("infill", f"flow {steps}", lambda row=row: row)


def report(benches: list[Bench], parts) -> None:
    """A table for each part: medians over seeds, with the least and the most of the first figure."""
    for part in parts:
        rows = {key: [b.figures[part][key] for b in benches] for key in benches[0].figures.get(part, {})}
        rows = {key: values for key, values in rows.items() if not isinstance(next(iter(values[0].values())), dict)}
        names = list(dict.fromkeys(name for values in rows.values() for name in values[0] if name != "first"))
        middle = lambda values, name: statistics.median(v[name] for v in values) if name in values[0] else ""
        print(f"\n{part}\n" + table([[key, *(middle(values, name) for name in names)] for key, values in rows.items()], [part, *names]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed: does it run?")
    a = parser.parse_args()
    benches = [Bench(seed, a.smoke) for seed in range(1 if a.smoke else a.seeds)]
    reconstruction = json.loads((benches[0].folder("vae") / "metrics.json").read_text())["student"]["1"]
    print(f"autoencoder, held-out sentences: {reconstruction}", flush=True)
    for bench in benches:
        look = Look(bench)
        for part in a.parts:
            globals()[part](bench, look)
    report(benches, a.parts)
    payload = {"environment": environment(), "seeds": len(benches), "autoencoder": reconstruction, "figures": [b.figures for b in benches]}
    if not a.smoke:
        write("language", {"question": __doc__.splitlines()[0], **payload})


if __name__ == "__main__":
    main()

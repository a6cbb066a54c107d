"""What do samples gain by a reward, at what cost, and what do they lose?  Digits; one student, chosen or tuned.

Arms that need no training: the best of n, particles by their weights, moves by the gradient through the jump that leave
the tilted law as it is, and moves uphill (samplers/tilted.py), all of one step. Passes are those of the student for
each sample; a backward pass counts as two.
Arms of training: the same student after reward_tuning, one pass for each sample.
Rewards: symmetry, and log p(own class) of a classifier that is trained on a third of the held-out digits. The other two
thirds are the reference of all figures: Frechet distance on pixels, and in the features of a second network (trained on
the training digits, _labels.py), precision and recall on pixels, and the share of samples that the second network tells
rightly. One student, a finished run of digits; one seed of tuning, --seeds of sampling.
`python benchmarks/rewards.py [--student runs/digits] [--tuned-steps 60] [--seeds 2] [--images 400]`
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import _labels
import torch
from lib.report import environment, write
from torch.nn import functional as F

import flowmap
from flowmap.build.data import build_data
from flowmap.metrics.frechet import FrechetDistance
from flowmap.metrics.precision_recall import PrecisionRecallScore
from flowmap.metrics.rewards import Classifier, Symmetry, write_classifier
from flowmap.plan.plan import resolve
from flowmap.samplers import Tilted

KEPT = Path("runs/bench/rewards")
JUDGE = KEPT / "judge.safetensors"
TUNED = {"symmetry": (0.3, 3.0, 30.0), "classifier": (0.03, 0.3, 3.0)}
UPHILL = dict(particles=1, moves=5, move="ascent")
ARMS = [  # settings, and passes for each sample
    ("student", None, 1),
    *((f"best of {n}", dict(particles=n, choice="best"), n) for n in (4, 16)),
    *((f"16 particles, scale {scale:g}", dict(particles=16, scale=scale), 16) for scale in (1.0, 10.0)),
    *((f"4 moves, scale {scale:g}", dict(particles=1, moves=4, scale=scale), 15) for scale in (1.0, 10.0)),
    ("4 moves of size 0.1, scale 30", dict(particles=1, moves=4, scale=30.0, move_size=0.1), 15),
    *((f"5 moves uphill, scale {scale:g}", UPHILL | dict(scale=scale), 16) for scale in (0.3, 1.0, 3.0)),
]
COLUMNS = ["arm", "passes", "reward", "Frechet", "Frechet, labels", "precision", "recall", "right class"]


QUIET = ("log.wandb=false", "log.samples_every_steps=0", "log.metrics_every_steps=0", "metrics=[]")


def teach(x: torch.Tensor, labels: torch.Tensor) -> None:
    """Train the reward's classifier on those digits and write it."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)]
    optimizer = torch.optim.AdamW([p for one in layers for p in one.parameters()], lr=3e-3, weight_decay=0.1)
    for _ in range(400):
        seen = x.flatten(1) + 0.2 * torch.randn(len(x), 64)
        loss = F.cross_entropy(layers[1](F.silu(layers[0](seen))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_classifier(JUDGE, layers)


class Figures:
    """The figures of samples (N, 1, 8, 8) drawn for the classes in turn, against the reference."""

    def __init__(self, reference: torch.Tensor):
        self.metrics = {
            "Frechet": FrechetDistance(lambda x: x.flatten(1), 64),
            "Frechet, labels": FrechetDistance(_labels.labels, 64),
            "shares": PrecisionRecallScore(lambda x: x.flatten(1)),
        }
        for metric in self.metrics.values():
            metric.update(reference, real=True)

    def __call__(self, x: torch.Tensor, reward) -> dict[str, float]:
        cond = {"class": torch.arange(len(x)) % 10}
        for metric in self.metrics.values():
            metric.reset()
            metric.update(x, real=False)
        shares = self.metrics["shares"].compute()
        found = {name: float(self.metrics[name].compute()) for name in ("Frechet", "Frechet, labels")}
        right = (told(x) == cond["class"]).double().mean()
        shared = {name: float(value) for name, value in shares.items()}
        return {"reward": float(reward(x, cond).mean()), **found, **shared, "right class": float(right)}


def told(x: torch.Tensor) -> torch.Tensor:
    """The classes that the second network tells."""
    h = x.flatten(1).double()
    for weight, bias in zip(_labels._known["weights"], _labels._known["biases"], strict=True):
        h = torch.relu(h @ weight + bias)
    return (h @ _labels._known["last"][0] + _labels._known["last"][1]).argmax(1)


def fit_second(data) -> None:
    """The second network, with its last layer, which _labels does not keep."""
    import sklearn.neural_network as networks

    made = []

    class Kept(networks.MLPClassifier):
        def fit(self, *arguments):
            made.append(self)
            return super().fit(*arguments)

    original, networks.MLPClassifier = networks.MLPClassifier, Kept
    try:
        _labels.fit(data)
    finally:
        networks.MLPClassifier = original
    _labels._known["last"] = [torch.as_tensor(made[0].coefs_[-1]), torch.as_tensor(made[0].intercepts_[-1])]


def tuned(kind: str, scale: float, options: argparse.Namespace) -> Path:
    """The run of the student tuned by a reward, made unless it is there."""
    name, started = f"tuned-{kind}-{scale:g}-{options.tuned_steps}", options.student / "recipe.yaml"
    reward = f"{{kind: classifier, weights: {JUDGE.resolve()}}}" if kind == "classifier" else f"{{kind: {kind}}}"
    base = "{kind: ayf_mixed, warmup_steps: 0, lagrangian: 0.25, own_lagrangian: 1.0}"
    changes = [
        f"student={{kind: from_recipe, recipe: {started}}}",
        f"objective={{kind: reward_tuning, base: {base}, reward: {reward}, scale: {scale}, steps: [1]}}",
        "optimizer={lr: 1.0e-4, warmup_steps: 0, schedule: cosine}",
        f"trainer.steps={options.tuned_steps}",
        f"name={name}",
        *QUIET,
    ]
    flowmap.fit(flowmap.read_recipe(started, changes), KEPT / name, resume="auto", log=lambda line: None)
    return KEPT / name


def measured(student, figures: Figures, reward, settings: dict | None, options) -> dict[str, float]:
    """The medians over the seeds."""
    sampler = None if settings is None else Tilted(reward=reward, resample=0.0, **settings)
    rows = [figures(student.sample(options.images, seed=k, reward=sampler), reward) for k in range(options.seeds)]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = "a finished run of digits, with its teacher next to it"
    parser.add_argument("--student", type=Path, default=Path("runs/digits"), help=what)
    parser.add_argument("--tuned-steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="of sampling")
    parser.add_argument("--images", type=int, default=400)
    options, started = parser.parse_args(), time.process_time()
    options.student = options.student.resolve()
    os.environ["FLOWMAP_RUNS"] = str(options.student.parent)
    KEPT.mkdir(parents=True, exist_ok=True)
    student, recipe = flowmap.load_student(options.student), flowmap.read_recipe(options.student / "recipe.yaml")
    data = build_data(resolve(recipe))
    teach(data.held_out[::3], data.held_out_labels[::3])
    fit_second(data)
    rest = torch.arange(len(data.held_out)) % 3 != 0
    figures, tables = Figures(data.held_out[rest]), {}
    rewards = {"symmetry": Symmetry(), "classifier": Classifier(str(JUDGE))}
    for kind, reward in rewards.items():
        rows_of = lambda one, settings=None, reward=reward: measured(one, figures, reward, settings, options)
        found = [(name, passes, rows_of(student, settings)) for name, settings, passes in ARMS]
        for scale in TUNED[kind]:
            one = flowmap.load_student(tuned(kind, scale, options))
            found.append((f"tuned, scale {scale:g}", 1, rows_of(one)))
        rows = [[name, passes, *(row[key] for key in COLUMNS[2:])] for name, passes, row in found]
        tables[kind] = {"columns": COLUMNS, "rows": rows}
        print(kind, *rows, sep="\n", flush=True)
    settings = {key: getattr(options, key) for key in ("tuned_steps", "seeds", "images")}
    settings |= {"student_steps": student.config.step, "reference": int(rest.sum())}
    settings["cpu_seconds"] = round(time.process_time() - started)
    question = "What do samples gain by a reward, at what cost, and what do they lose?"
    write("rewards", {"question": question, "environment": environment(), "settings": settings, "tables": tables})


if __name__ == "__main__":
    main()

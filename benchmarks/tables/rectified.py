"""The tables of rectified.py: medians over seeds, with least and most in brackets where there are several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lib.report import spread

# of one seed: arm -> {"student": {steps: {metric: value}}, "euler": ..., "cpu_seconds": {"pairs": s, "fit": s}}
Found = dict
PAPER = {"a": 12.21, "b": 7.14, "c": 5.17, "d": 5.24, "e": 3.42, "f": 3.38, "g": 3.07}
NAMES = {
    "teacher": "teacher, guided",
    "reflow": "one reflow",
    "third": "two reflows",
    "first": "first flow, unguided",
    "ayf": "AYF-EMD",
    "ayf of reflow": "AYF-EMD from the reflowed model (costs: beyond it)",
    "insta teacher": "teacher, guidance 2",
    "insta reflow": "reflow",
    "insta reflow + distil": "reflow, then distillation",
    "insta distil": "distillation alone, as many steps",
    "insta reflow + distil, seen": "reflow, then distillation, perceptual at its end",
    "insta distil, seen": "distillation alone, perceptual at its end",
}


def tables(runs: Sequence[Found], distance: str, many: int) -> dict[str, dict]:
    """Every table that the runs have figures for: name -> {"columns": [...], "rows": [[...], ...]}."""
    here = Tables(runs, distance, str(many))
    kinds = ("reflow", "train", "ratios", "rule", "ablation", "few", "loss", "instaflow", "speed")
    made = {name: getattr(here, name)() for name in kinds}
    return {name: one for name, one in made.items() if one["rows"]}


class Tables:
    def __init__(self, runs: Sequence[Found], distance: str, many: str):
        self.runs, self.distance, self.many = runs, distance, many

    def reflow(self) -> dict:
        columns = [
            "",
            f"1-step {self.distance}",
            "2",
            "4",
            f"{self.many}, Euler",
            "straightness",
            f"endpoint error^2, 1 against {self.many}",
            "seen as asked",
        ]
        rows = []
        for arm in ("teacher", "reflow", "third"):
            cells = [self.cell(arm, k, self.distance) for k in ("1", "2", "4")] + [
                self.cell(arm, self.many, self.distance, "euler")
            ]
            cells += [
                self.cell(arm, "1", "straightness"),
                self.spread(arm, lambda one: one["student"]["1"]["endpoint_error"] ** 2),
            ]
            rows.append([NAMES[arm], *cells, self.cell(arm, "1", self.agreement(arm))])
        return self.table(columns, rows, "floor")

    def train(self) -> dict:
        """Every arm's distances to training samples, where `reflow` and the others have those to held-out ones."""
        key = f"{self.distance}_train"
        steps = ("1", "2", "4", self.many)
        arms = [
            arm for arm in dict.fromkeys(name for run in self.runs for name in run) if arm not in ("first", "speed")
        ]
        rows = [[NAMES.get(arm, arm), *(self.cell(arm, k, key) for k in steps)] for arm in arms]
        return self.table([key, *(f"{k} step{'s' * (k != '1')}" for k in steps)], rows)

    def ratios(self) -> dict:
        """Medians of ratios within one seed."""
        square = lambda one: one["student"]["1"]["endpoint_error"] ** 2
        asked = {
            f"1-step {self.distance}": lambda one: one["student"]["1"][self.distance],
            "straightness": lambda one: one["student"]["1"]["straightness"],
            f"endpoint error^2, 1 against {self.many}": square,
            f"{self.many}-step {self.distance}": lambda one: one.get("euler", one["student"])[self.many][self.distance],
        }
        rows = []
        for what, read in asked.items():
            cells = [self.ratio(over, under, read) for over, under in (("teacher", "reflow"), ("reflow", "third"))]
            rows.append([what, *cells])
        return self.table(["", "teacher / one reflow", "one reflow / two"], rows)

    def rule(self) -> dict:
        """The sampler's update rule beside Euler's, from the same noise."""
        steps = ("2", "4", self.many)
        rows = []
        for arm in ("reflow", "third"):
            for name, source in (("2-rectified flow++'s rule", "student"), ("Euler", "euler")):
                if any(source in run.get(arm, {}) for run in self.runs):
                    rows.append([f"{NAMES[arm]}, {name}", *(self.cell(arm, k, self.distance, source) for k in steps)])
        return self.table([self.distance, *(f"{k} steps" for k in steps)], rows)

    def ablation(self) -> dict:
        columns = [
            "row",
            f"1-step {self.distance}",
            "2",
            "endpoint error^2",
            "seen as asked",
            "the paper's FID, CIFAR-10",
        ]
        rows = []
        for arm in [arm for arm in PAPER if any(arm in run for run in self.runs)]:
            cells = [self.cell(arm, k, self.distance) for k in ("1", "2")]
            cells += [
                self.spread(arm, lambda one: one["student"]["1"]["endpoint_error"] ** 2),
                self.cell(arm, "1", self.agreement(arm)),
            ]
            rows.append([arm.upper(), *cells, str(PAPER[arm])])
        return self.table(columns, rows)

    def few(self) -> dict:
        columns = ["", f"1-step {self.distance}", "2", "4", "CPU seconds of pairs", "of training"]
        rows = []
        for arm in ("teacher", "reflow", "ayf", "ayf of reflow"):
            costs = [self.spread(arm, lambda one, part=part: one["cpu_seconds"][part]) for part in ("pairs", "fit")]
            rows.append([NAMES[arm], *(self.cell(arm, k, self.distance) for k in ("1", "2", "4")), *costs])
        return self.table(columns, rows)

    def loss(self) -> dict:
        have = next((run["reflow"]["student"]["1"] for run in self.runs if "reflow" in run), {})
        times = [key for key in have if key.startswith("loss_t")]
        step = lambda arm: self.many if arm == "first" else "1"
        rows = [
            [NAMES[arm], *(self.cell(arm, step(arm), key, bare=True) for key in times)]
            for arm in ("first", "reflow", "third")
        ]
        return self.table(["loss at t =", *(key.removeprefix("loss_t") for key in times)], rows)

    def instaflow(self) -> dict:
        arms = [arm for arm in dict.fromkeys(name for run in self.runs for name in run) if arm.startswith("insta")]
        columns = [
            "",
            f"1-step {self.distance}",
            f"{self.many}",
            "seen as asked, 1 step",
            f"{self.many}",
            "straightness",
        ]
        rows = []
        for arm in arms:
            seen = [self.cell(arm, k, self.agreement(arm)) for k in ("1", self.many)]
            cells = [
                *(self.cell(arm, k, self.distance) for k in ("1", self.many)),
                *seen,
                self.cell(arm, "1", "straightness"),
            ]
            rows.append([NAMES.get(arm, arm.removeprefix("insta ")), *cells])
        return self.table(columns, rows)

    def speed(self) -> dict:
        found = next((run["speed"] for run in self.runs if "speed" in run), None)
        if found is None:
            return self.table([], [])
        columns = [
            "network calls a pair",
            "pairs a CPU second",
            "of what the network alone would make",
            "least",
            "most",
        ]
        cells = [
            found["calls a pair"],
            found["pairs a CPU second"],
            found["of the bound"],
            min(found["each"]),
            max(found["each"]),
        ]
        return {"columns": columns, "rows": [cells]}

    def cell(self, arm: str, k: str, metric: str, source: str = "student", bare: bool = False) -> str:
        """Of that metric at k steps; where there is no row by Euler's steps, the sampler's own."""
        return self.spread(arm, lambda one: one.get(source, one["student"])[k][metric], bare=bare)

    def spread(self, arm: str, read: Callable[[dict], float], bare: bool = False) -> str:
        values = []
        for run in self.runs:
            try:
                values.append(read(run[arm]))
            except KeyError:
                continue
        return spread(values, bare)

    def ratio(self, over: str, under: str, read: Callable[[dict], float]) -> str:
        return spread([read(run[over]) / read(run[under]) for run in self.runs if over in run and under in run])

    def agreement(self, arm: str) -> str:
        """The name of the figure that says whether samples show what was asked for."""
        rows = [row for run in self.runs for row in run.get(arm, {}).get("student", {}).values()]
        return next((key for row in rows for key in row if key.startswith(("agreement", "retrieval_top5"))), "")

    def table(self, columns: list[str], rows: list[list[str]], floor: str = "") -> dict:
        rows = [row for row in rows if any(cell for cell in row[1:])]
        floors = [run["teacher"]["floor"][self.distance] for run in self.runs if "floor" in run.get("teacher", {})]
        if floor and floors:
            rows.append([f"floor: real against real {spread(floors[:1])}", *[""] * (len(columns) - 1)])
        return {"columns": columns, "rows": rows}

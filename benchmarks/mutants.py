"""Would the tests of an objective notice that it is wrong?  One textual mutation at a time, the objective tests against each.

`python benchmarks/mutants.py [NAME ...] [--jobs N]`; exit 1 if a mutant survives.  A mutation whose text is not found exactly once is an error:
it moves with the code.  Each mutant is a copy of the package in a scratch folder, tested there by `pytest -x tests/objectives` in a process
of its own.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _report import environment, table, write

ROOT = Path(__file__).resolve().parent.parent
FM, AYF, DERIVATIVE, DISTANCE = "objectives/flow_matching.py", "objectives/ayf.py", "flow/derivative.py", "flow/distance.py"


class Mutant(NamedTuple):
    objective: str
    what: str
    file: str
    old: str
    new: str


EMD_G = "g = (mean_velocity.detach() - v) + r * along(t - s, x) * rate"
LMD_G = "g = mean_velocity.detach() - (teacher.velocity(arrival, s, cond) + r * along(t - s, x) * rate)"
ASK_STUDENT = "student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond)"
ASK_TEACHER = "teacher.velocity(sample.xt, sample.t, sample.cond)"
ARRIVAL = "arrival = x + along(s - t, x) * mean_velocity.detach()"
STILL = "still = sample.t <= sample.s if needed else torch.ones_like(sample.t, dtype=torch.bool)"
BACK = "return mean_velocity[place], rate[place]"
EMD_TEACHER = "v = sample.vt if teacher is None else teacher.velocity(x, t, cond)"
WARM_UP = "return min(self.r_max, step / self.warmup_steps) if self.warmup_steps else self.r_max"
TARGET = "target = (_wide(F) - _wide(g)).detach()"

MUTANTS = [
    Mutant("flow_matching", "flipped sign of the teacher", FM, ASK_TEACHER, f"-{ASK_TEACHER}"),
    Mutant("flow_matching", "flipped sign of vt", FM, "target = sample.vt", "target = -sample.vt"),
    Mutant("flow_matching", "student asked at s", FM, ASK_STUDENT, ASK_STUDENT.replace("sample.t, sample.t", "sample.t, sample.s")),
    Mutant("flow_matching", "teacher asked at s", FM, ASK_TEACHER, ASK_TEACHER.replace("sample.t", "sample.s")),
    Mutant("flow_matching", "teacher asked at the data", FM, ASK_TEACHER, ASK_TEACHER.replace("xt", "x0")),
    Mutant("flow_matching", "teacher's condition lost", FM, ASK_TEACHER, ASK_TEACHER.replace("sample.cond", "None")),
    Mutant("flow_matching", "student's condition lost", FM, ASK_STUDENT, ASK_STUDENT.replace("sample.cond", "None")),
    Mutant("flow_matching", "vt in place of the teacher", FM, "sample.vt if teacher is None", "sample.vt if teacher is not False"),
    Mutant("flow_matching", "no stop-gradient on the target", FM, "target.detach()", "target"),
    Mutant("flow_matching", "stop-gradient on the student", FM, "self.distance(velocity, ", "self.distance(velocity.detach() + 0 * velocity, "),
    Mutant("flow_matching", "ascent", FM, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("flow_matching", "sum over the batch", FM, "Loss(error.mean(),", "Loss(error.sum(),"),
    Mutant("ayf_emd", "flipped sign of the derivative", AYF, EMD_G, EMD_G.replace("+ r", "- r")),
    Mutant("ayf_emd", "flipped sign of the residual", AYF, EMD_G, EMD_G.replace("g = (", "g = -(").replace("+ r", "- r")),
    Mutant("ayf_emd", "flipped sign of the velocity", AYF, EMD_G, EMD_G.replace("- v", "+ v")),
    Mutant("ayf_emd", "(t - s) missing", AYF, EMD_G, EMD_G.replace("along(t - s, x) * ", "")),
    Mutant("ayf_emd", "(t - s) turned round", AYF, EMD_G, EMD_G.replace("t - s", "s - t")),
    Mutant("ayf_emd", "t in place of (t - s)", AYF, EMD_G, EMD_G.replace("t - s", "t")),
    Mutant("ayf_emd", "warm-up weight missing", AYF, EMD_G, EMD_G.replace("r * ", "")),
    Mutant("ayf_emd", "warm-up weight on all of it", AYF, EMD_G, EMD_G.replace("g = (", "g = r * (").replace("+ r *", "+ r *")),
    Mutant("ayf_emd", "teacher asked at s", AYF, EMD_TEACHER, EMD_TEACHER.replace("velocity(x, t,", "velocity(x, s,")),
    Mutant("ayf_emd", "teacher asked at the noise", AYF, EMD_TEACHER, EMD_TEACHER.replace("velocity(x,", "velocity(sample.x1,")),
    Mutant("ayf_emd", "teacher's condition lost", AYF, EMD_TEACHER, EMD_TEACHER.replace("t, cond", "t, None")),
    Mutant("ayf_emd", "vt in place of the teacher", AYF, EMD_TEACHER, "v = sample.vt"),
    Mutant("ayf_emd", "flipped sign of vt", AYF, EMD_TEACHER, EMD_TEACHER.replace("v = sample.vt", "v = -sample.vt")),
    Mutant("ayf_emd", "derivative along vt", AYF, "derive, sample, v, needed", "derive, sample, sample.vt, needed"),
    Mutant("ayf_emd", "zero time tangent", DERIVATIVE, "(velocity.to(x.dtype), torch.ones_like(t))", "(velocity.to(x.dtype), torch.zeros_like(t))"),
    Mutant("ayf_emd", "zero space tangent", DERIVATIVE, "(velocity.to(x.dtype), torch", "(0 * velocity.to(x.dtype), torch"),
    Mutant("ayf_lmd", "flipped sign of the derivative", AYF, LMD_G, LMD_G.replace("+ r", "- r")),
    Mutant("ayf_lmd", "flipped sign of the residual", AYF, LMD_G, LMD_G.replace("g = mean", "g = -mean").replace("- (t", "+ (t")),
    Mutant("ayf_lmd", "flipped sign of the velocity", AYF, LMD_G, LMD_G.replace("(teacher", "(-teacher")),
    Mutant("ayf_lmd", "(t - s) missing", AYF, LMD_G, LMD_G.replace("along(t - s, x) * ", "")),
    Mutant("ayf_lmd", "(t - s) turned round", AYF, LMD_G, LMD_G.replace("t - s", "s - t")),
    Mutant("ayf_lmd", "warm-up weight missing", AYF, LMD_G, LMD_G.replace("r * ", "")),
    Mutant("ayf_lmd", "teacher asked at the departure", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(x, t,")),
    Mutant("ayf_lmd", "teacher asked at x, s", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(x, s,")),
    Mutant("ayf_lmd", "teacher asked at arrival, t", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(arrival, t,")),
    Mutant("ayf_lmd", "teacher's condition lost", AYF, LMD_G, LMD_G.replace("s, cond", "s, None")),
    Mutant("ayf_lmd", "arrival on the other side", AYF, ARRIVAL, ARRIVAL.replace("s - t", "t - s")),
    Mutant("ayf_lmd", "graph through the teacher", AYF, ARRIVAL, ARRIVAL.replace(".detach()", "")),
    Mutant("ayf_lmd", "zero time tangent", DERIVATIVE, "(s,), (torch.ones_like(s),)", "(s,), (torch.zeros_like(s),)"),
    Mutant("ayf_lmd", "no teacher, no refusal", AYF, 'raise ValueError("objective.kind: ayf_lmd', 'print("objective.kind: ayf_lmd'),
    Mutant("ayf, both", "warm-up turned round", AYF, WARM_UP, WARM_UP.replace("step / self.warmup_steps", "1 - step / self.warmup_steps")),
    Mutant("ayf, both", "warm-up: the larger of both", AYF, WARM_UP, WARM_UP.replace("min(", "max(")),
    Mutant("ayf, both", "no warm-up means no derivative", AYF, WARM_UP, WARM_UP.replace("else self.r_max", "else 0.0")),
    Mutant("ayf, both", "diagonal mask inverted", AYF, STILL, STILL.replace("<=", ">")),
    Mutant("ayf, both", "diagonal rows pay", AYF, STILL, STILL.replace("<=", "<")),
    Mutant("ayf, both", "weight zero pays", AYF, STILL, STILL.replace("ones_like", "zeros_like")),
    Mutant("ayf, both", "mixed batch out of order", AYF, BACK, "return mean_velocity, rate"),
    Mutant("ayf, both", "rates out of order", AYF, BACK, "return mean_velocity[place], rate"),
    Mutant("ayf, both", "put back the way it came", AYF, "place = torch.argsort(order)", "place = order"),
    Mutant("ayf, both", "rows with others' conditions", AYF, "{key: value[order] for", "{key: value for"),
    Mutant("ayf, both", "others' rows derived", DERIVATIVE, "tangent[:rows] for", "tangent[-rows:] for"),
    Mutant("ayf, both", "sum over the batch", AYF, "Loss(loss.mean(),", "Loss(loss.sum(),"),
    Mutant("ayf, both", "ascent", AYF, "Loss(loss.mean(),", "Loss(-loss.mean(),"),
    Mutant("ayf, both", "settings of the norm ignored", AYF, "c=self.c, norm=self.norm", "c=self.c"),
    Mutant("ayf, both", "c ignored", AYF, "c=self.c, norm=self.norm", "norm=self.norm"),
    Mutant("ayf, both", "residual not normalised", AYF, "normalise(g, c=self.c, norm=self.norm)", "g"),
    Mutant("ayf, both", "no stop-gradient", DISTANCE, TARGET, TARGET.replace(".detach()", "")),
    Mutant("ayf, both", "target on the other side", DISTANCE, TARGET, TARGET.replace(" - ", " + ")),
    Mutant("ayf, both", "normalised across the batch", DISTANCE, "vector_norm(flat, dim=1)", "vector_norm(flat, dim=1).mean().expand(len(flat))"),
    Mutant("ayf, both", "dimension left out of rms", DISTANCE, "length / flat.shape[1] ** 0.5", "length / flat.shape[0] ** 0.5"),
]


def first_failure(mutant: Mutant | None) -> tuple[str | None, float]:
    """Which test failed first (None: all passed), and the CPU seconds it took; without a mutant, of the package as it is.

    Runs in a process of its own, forked from one that has imported torch and pytest and nothing of ours.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy_of_package(Path(scratch))
        if mutant is not None:
            apply(mutant, Path(scratch))
        os.chdir(scratch)
        sys.path.insert(0, scratch)
        torch.set_num_threads(1)
        start, said, failures = time.process_time(), io.StringIO(), Failures()
        with redirect_stdout(said):
            code = pytest.main([*OPTIONS, *files_for(mutant)], plugins=[failures])
        seconds = time.process_time() - start
        tested = sys.modules["flowmap"].__file__
        os.chdir(ROOT)
    if not os.path.realpath(tested).startswith(os.path.realpath(scratch)):
        raise RuntimeError(f"not the mutated copy was tested but {tested}")
    if code not in (0, 1) or bool(code) != bool(failures.names):  # pytest: 0 passed, 1 some failed; anything else is this script's fault
        raise RuntimeError(f"{mutant}: pytest ended with {code}\n{said.getvalue()}")
    return (failures.names[0] if failures.names else None), seconds


OPTIONS = ["-x", "-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider"]


def files_for(mutant: Mutant | None) -> list[str]:
    """The objective tests, with those of the mutated file first: they are the likeliest to fail."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "objectives").glob("test_*.py"))
    return sorted(files, key=lambda name: mutant is not None and Path(mutant.file).stem not in name)


class Failures:
    """A plugin that remembers the names of tests, and of files, that failed."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        self.names += [report.nodeid.split("::")[-1]] if report.failed else []

    def pytest_collectreport(self, report):
        self.names += [report.nodeid] if report.failed else []


def copy_of_package(folder: Path) -> None:
    """The package, the objective tests and their oracle; nothing else that a test could import instead."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flowmap", folder / "flowmap", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "objectives", folder / "tests" / "objectives", ignore=ignore)
    shutil.copy(ROOT / "tests" / "oracle.py", folder / "tests" / "oracle.py")
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")


def apply(mutant: Mutant, folder: Path) -> None:
    path = folder / "flowmap" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        found = f"{mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}; it must stand once"
        raise ValueError(f"{mutant.objective}, {mutant.what}: {found}")
    if mutant.old == mutant.new:
        raise ValueError(f"{mutant.objective}, {mutant.what}: it changes nothing")
    path.write_text(text.replace(mutant.old, mutant.new))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objectives", nargs="*", help="only mutants of these: " + ", ".join(dict.fromkeys(m.objective for m in MUTANTS)))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one a core)")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if not arguments.objectives or m.objective in arguments.objectives]
    for mutant in mutants:  # a text that has moved is said at once
        with tempfile.TemporaryDirectory() as scratch:
            copy_of_package(Path(scratch))
            apply(mutant, Path(scratch))
    start = time.perf_counter()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torch.func", "torch.utils.checkpoint", "pytest"])
    with processes.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        failed, *results = pool.map(first_failure, [None, *mutants], chunksize=1)
    if failed[0] is not None:
        print(f"the objective tests fail without a mutation ({failed[0]}): nothing can be concluded")
        return 1
    rows = [[m.objective, m.what, "survived" if by is None else "killed", by or ""] for m, (by, _) in zip(mutants, results, strict=True)]
    survivors = [row for row in rows if row[2] == "survived"]
    print(table(rows, ["objective", "mutation", "result", "first test to fail"]))
    seconds, cpu = time.perf_counter() - start, failed[1] + sum(spent for _, spent in results)
    print(f"{len(rows) - len(survivors)} of {len(rows)} killed in {seconds:.0f} s ({cpu:.0f} CPU seconds; the unmutated tests {failed[1]:.0f})")
    if not arguments.objectives:
        write("mutants", {"question": __doc__.splitlines()[0], "environment": environment(), "seconds": seconds, "cpu_seconds": cpu, "rows": rows})
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

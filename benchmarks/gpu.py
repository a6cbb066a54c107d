"""What only a GPU shows, in one run of under 25 minutes that can be interrupted: `make gpu`.

The jobs, in order: the tests marked `gpu`; the cost of a training step of the large recipes at their own batch, with
random weights; the latency of sampling; the error of the tangent in bf16; autoguidance on one and on two streams;
throughput of encoding and of evaluation; and `fashion` at 28x28, trained for real. Each result is written to
benchmarks/results/gpu.json when its job ends. A second call runs only the jobs that are missing or were measured on
another commit or device.
`python benchmarks/gpu.py [--device cuda] [--minutes 24] [--jobs NAME ...] [--out FILE] [--toy]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import torch
from lib.full_scale import Built, FullScale, sample_of
from lib.report import RESULTS, environment, keep, kept, table

from flowmap.flow.derivative import eulerian_derivative
from flowmap.objectives import FlowMatching
from flowmap.teachers.autoencoder import stable_diffusion_autoencoder
from flowmap.teachers.guidance import Autoguidance

NETWORKS = ("dit256", "imagenet512", "sd15", "sd35-medium", "flux-dev-lora")
ROUNDS, WARM = 8, 2
STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Campaign:
    device: torch.device
    toy: bool
    folder: Path

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self, recipe) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.trainer.precision == "bf16")

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of a call, after calls that warm up."""
        found, warm = [], 0 if self.toy else WARM
        for i in range(warm + (1 if self.toy else ROUNDS)):
            self.synchronize()
            started = time.perf_counter()
            call()
            self.synchronize()
            if i >= warm:
                found.append(time.perf_counter() - started)
        return statistics.median(found)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None

    def forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def gpu_tests(campaign: Campaign) -> dict:
    report = campaign.folder / "tests.xml"
    where = ["tests/test_gpu.py"] if campaign.toy else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, cwd=RESULTS.parents[1])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return counts | {"exit": done.returncode, "failed": failed}


def step_cost(name: str) -> Callable[[Campaign], dict]:
    """A job that times a plain flow-matching step, the recipe's step, and optimizer and average, at its own batch."""

    def job(campaign: Campaign) -> dict:
        scale = FullScale.of(name, campaign.toy)
        recipe, built = scale.recipe, Built.of(scale, campaign.device, half=scale.recipe.trainer.precision == "bf16")
        sample = sample_of(scale, built)
        optimizer = recipe.optimizer(built.trained)
        averages = [[p.detach().clone() for p in built.trained]]

        def step(objective, teacher) -> None:
            with campaign.autocast(recipe):
                loss = objective(built.student, teacher, sample, 10**9).value
            loss.backward()

        def update() -> None:
            optimizer.step()
            torch._foreach_lerp_(averages[0], [p.detach() for p in built.trained], 0.01)

        found = {"batch": scale.rows, "trained_parameters": sum(p.numel() for p in built.trained)}
        plain = FlowMatching()
        found["plain_ms"] = 1e3 * campaign.seconds(lambda: step(plain, None))
        campaign.forget()
        found["step_ms"] = 1e3 * campaign.seconds(lambda: step(recipe.distillation, built.teacher))
        found["update_ms"] = 1e3 * campaign.seconds(update)
        found["plain_steps"] = found["step_ms"] / found["plain_ms"]
        found["images_per_second"] = scale.rows / (found["step_ms"] + found["update_ms"]) * 1e3
        found["peak_gib"] = campaign.peak_gib()
        return found | latency(campaign, scale, built) | tangent(campaign, scale, built)

    return job


@torch.no_grad()
def latency(campaign: Campaign, scale: FullScale, built: Built) -> dict:
    """Milliseconds of sampling one picture's latents, and a batch of them, at each number of steps."""
    found, recipe = {}, scale.recipe
    built.student.eval()
    for rows in dict.fromkeys((1, min(8, scale.rows))):
        x1 = torch.randn(rows, *scale.config.shape, device=campaign.device)
        cond = {key: value[:rows] for key, value in built.cond.items()}
        for k in STEPS:

            def draw(k=k, x1=x1, cond=cond) -> None:
                with campaign.autocast(recipe):
                    recipe.sampler(built.student, x1, cond, steps=k)

            found[f"sample_{rows}_in_{k}_steps_ms"] = 1e3 * campaign.seconds(draw)
    return found


def tangent(campaign: Campaign, scale: FullScale, built: Built) -> dict:
    """The relative difference of the tangent in the recipe's precision from that in float32, on two samples."""
    sample, rows = sample_of(scale, built), slice(0, 2)
    cond = {key: value[rows] for key, value in (sample.cond or {}).items()}
    points = (sample.xt[rows], sample.t[rows], sample.s[rows], sample.vt[rows], cond)
    built.student.train().float()  # also the frozen base under adapters
    exact = eulerian_derivative(built.student, *points)[1]
    with campaign.autocast(scale.recipe):
        rate = eulerian_derivative(built.student, *points)[1]
    return {"tangent_error": float((rate.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30))}


def autoguidance(campaign: Campaign) -> dict:
    """Milliseconds of the guided velocity of EDM2-S by EDM2-XS, with the networks in turn and on two streams."""
    scale = FullScale.of("imagenet512", campaign.toy)
    built = Built.of(scale, campaign.device, half=True)
    guided, sample, found = built.teacher, sample_of(scale, built), {}
    assert isinstance(guided, Autoguidance)
    for rows in sorted({1, min(8, scale.rows), scale.rows}):
        x, t = sample.xt[:rows], sample.t[:rows]
        cond = {key: value[:rows] for key, value in built.cond.items()} | {"guidance": torch.full_like(t, 2.0)}
        for name, independent in (("in_turn", False), ("on_two_streams", True)):
            teacher = replace(guided, scales_differ=True)
            vars(teacher)["_independent"] = independent

            def call(teacher=teacher, x=x, t=t, cond=cond) -> None:
                with campaign.autocast(scale.recipe):
                    teacher.velocity(x, t, cond)

            found[f"velocity_of_{rows}_{name}_ms"] = 1e3 * campaign.seconds(call)
    return found


def autoencoder(toy: bool):
    """Stable Diffusion's autoencoder with random weights."""
    return stable_diffusion_autoencoder((8, 8, 8, 8), 1, 8) if toy else stable_diffusion_autoencoder()


def encoding(campaign: Campaign) -> dict:
    """Pictures a second of `flowmap encode`: JPEG files at 512 pixels through the autoencoder of Stable Diffusion."""
    import numpy
    from PIL import Image

    from flowmap.data import Encoded
    from flowmap.data.images.folder import FolderImages
    from flowmap.prepare.encode import encode
    from flowmap.teachers.autoencoder import Autoencoder

    count, side = (4, 32) if campaign.toy else (512, 512)
    root = campaign.folder / "pictures"
    root.mkdir(exist_ok=True)
    draw = numpy.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).resize((side, side))
        smooth.save(root / f"{i:04d}.jpg", quality=90)
    source = campaign.folder / "vae"
    autoencoder(campaign.toy).save_pretrained(source)
    spec = Encoded(
        images=FolderImages(root=str(root), size=side, captions=False), autoencoder=Autoencoder(source=str(source)),
        held_out=1, reference_images=2, conditional=False,
    )  # fmt: skip
    started = time.perf_counter()
    encode(spec, campaign.folder / "encoded", device=campaign.device)
    return {"pictures": count, "side": side, "pictures_per_second": count / (time.perf_counter() - started)}


@torch.no_grad()
def evaluation(campaign: Campaign) -> dict:
    """Pictures a second of evaluating: DiT-XL/2 in two steps, decoding at 256 pixels, features of Inception's size."""
    from flowmap.metrics.frechet import FrechetDistance

    scale = FullScale.of("dit256", campaign.toy)
    built = Built.of(scale, campaign.device, half=True)
    built.student.eval()
    vae = autoencoder(campaign.toy).to(campaign.device).eval()
    weight = torch.randn(48, 8 if campaign.toy else 2048, device=campaign.device)

    def features(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ weight

    metric = FrechetDistance(features, weight.shape[1]).to(campaign.device)

    def batch() -> None:
        with campaign.autocast(scale.recipe):
            x1 = torch.randn(scale.rows, *scale.config.shape, device=campaign.device)
            pictures = vae.decode(scale.recipe.sampler(built.student, x1, built.cond, steps=2)).sample
        metric.update(pictures.float(), real=False)

    return {"batch": scale.rows, "pictures_per_second": scale.rows / campaign.seconds(batch)}


def fashion(campaign: Campaign) -> dict:
    """`fashion` at 28x28 for real, with a fifth of its steps: the figures of its metrics.json."""
    import flowmap
    from flowmap.base.files import read_json

    accelerator = "gpu" if campaign.device.type == "cuda" else "cpu"
    name, teacher_steps, steps = ("digits", 4, 4) if campaign.toy else ("fashion", 8000, 4000)
    teacher = [f"trainer.steps={teacher_steps}", f"trainer.checkpoint_every_steps={max(2, teacher_steps // 8)}"]
    teacher += [f"ema.snapshot_every_steps={max(1, teacher_steps // 8)}", f"trainer.accelerator={accelerator}"]
    overrides = [f"trainer.steps={steps}", f"trainer.checkpoint_every_steps={max(2, steps // 8)}", "log.wandb=false"]
    overrides += [f"trainer.accelerator={accelerator}"]
    if campaign.toy:
        few = ["metrics=[{kind: frechet, images: 20}]", "evaluation.teacher_steps=2"]
        overrides, teacher = overrides + few, teacher + few
    overrides += [f"teacher.overrides={json.dumps(teacher)}"]
    out = Path("runs") / "gpu" / name
    if campaign.toy:
        os.environ["FLOWMAP_RUNS"] = str(campaign.folder / "runs")
        out = campaign.folder / "runs" / name
    run = flowmap.fit(flowmap.read_recipe(name, overrides), out, resume=True)
    return {"teacher_steps": teacher_steps, "steps": steps, "metrics": read_json(run.folder / "metrics.json")}


JOBS: dict[str, tuple[float, Callable[[Campaign], dict]]] = {  # name -> (minutes that it may take, the job)
    "tests": (4, gpu_tests),
    **{f"step {name}": (2, step_cost(name)) for name in NETWORKS},
    "autoguidance": (1, autoguidance),
    "encoding": (1, encoding),
    "evaluation": (1, evaluation),
    "fashion": (8, fashion),
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=24, help="no job begins that may take longer than what is left"
    )
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--toy", action="store_true", help="tiny networks, to try the campaign itself without a GPU")
    a = parser.parse_args(words)
    if a.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA device; --device cpu --toy tries the campaign itself", file=sys.stderr)
        return 3
    here, found, ends = environment(), kept(a.out), time.monotonic() + 60 * a.minutes
    stamp = {"commit": here["commit"], "device": here["device"] if a.device == "cuda" else a.device, "toy": a.toy}
    jobs = {name: job for name, job in found.get("jobs", {}).items() if job.get("stamp") == stamp}
    with tempfile.TemporaryDirectory() as folder:
        for name in a.jobs:
            minutes, job = JOBS[name]
            if name in jobs and "error" not in jobs[name]:
                print(f"{name}: measured before")
                continue
            if time.monotonic() + 60 * minutes > ends:
                print(f"{name}: not begun, it may take {minutes:g} minutes; a second call runs it")
                continue
            jobs[name] = measured(name, job, Campaign(torch.device(a.device), a.toy, Path(folder))) | {"stamp": stamp}
            keep(a.out, {"question": __doc__.splitlines()[0], "environment": here, "jobs": jobs})
    print(summary(jobs))
    missing = [name for name in a.jobs if name not in jobs or "error" in jobs[name]]
    print(f"missing: {', '.join(missing)}" if missing else f"all jobs are measured: {a.out.name}")
    return 1 if missing else 0


def measured(name: str, job: Callable[[Campaign], dict], campaign: Campaign) -> dict:
    """The job's result and seconds; an error is part of the result, and the next job runs."""
    print(f"{name}: begins", flush=True)
    started = time.perf_counter()
    campaign.forget()
    try:
        found = job(campaign)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    found["seconds"] = round(time.perf_counter() - started, 2)
    print(f"{name}: {found.get('error', 'done')} in {found['seconds']:.0f} s", flush=True)
    return found


def summary(jobs: dict[str, dict]) -> str:
    steps = {name: job for name, job in jobs.items() if "step_ms" in job}
    keys = ("batch", "plain_ms", "step_ms", "update_ms", "plain_steps", "peak_gib", "tangent_error")
    rows = [[name.removeprefix("step "), *(job[key] if job[key] is not None else "?" for key in keys)]
            for name, job in steps.items()]  # fmt: skip
    return table(rows, ["recipe", *keys]) if rows else ""


if __name__ == "__main__":
    raise SystemExit(main())

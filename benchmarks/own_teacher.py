"""Does a teacher trained by diffusers' unconditional example, and nothing of ours, become a student that works?

`python benchmarks/own_teacher.py train` trains a small UNet2DModel on 32x32 pictures with diffusers' own classes, as
diffusers' examples/unconditional_image_generation does with `--prediction_type sample`, and saves a DDPMPipeline.
docs/guide/own_teacher.md continues from there with flowmap's commands.
Then `python benchmarks/own_teacher.py report` writes the figures of that run for the page. Needs `make data`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from lib.report import environment, table, write

import flowmap.base.torchvision_shim  # noqa: F401  (before diffusers, on machines whose torchvision does not fit)
from flowmap.build.teacher import build_teacher
from flowmap.data import Folder
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import read_resolved
from flowmap.student.folder import load_student

SIZE, BATCH, STEPS, RATE = 32, 16, 1200, 2e-3


def train(pictures: Path, out: Path, steps: int, seed: int = 0) -> dict:
    """The loop of diffusers' example: predicted data weighted by the signal-to-noise ratio, averaged weights.

    It saves a DDPMPipeline.
    """
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    data = Folder(root=str(pictures), size=SIZE).build().train
    net = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type="sample")  # clip_sample: true is its default
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6)
    rate, average = get_cosine_schedule_with_warmup(optimizer, 50, steps), EMAModel(net.parameters(), decay=0.995)
    started, losses = time.process_time(), []
    for step in range(steps):
        x0 = data[torch.randint(len(data), (BATCH,))]
        x0 = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x0, x0.flip(-1))
        noise, time_step = torch.randn_like(x0), torch.randint(1000, (BATCH,))
        predicted = net(scheduler.add_noise(x0, noise, time_step), time_step).sample
        alpha = scheduler.alphas_cumprod[time_step].view(-1, 1, 1, 1)
        loss = ((alpha / (1 - alpha)) * (predicted - x0).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(net.parameters())
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: loss {sum(losses[-100:]) / 100:.4f}, "
                f"{time.process_time() - started:.0f} CPU-seconds",
                flush=True,
            )
    average.copy_to(net.parameters())
    DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(out)
    seconds = time.process_time() - started
    (out / "training.json").write_text(json.dumps({"cpu_seconds": seconds, "steps": steps, "pictures": len(data)}))
    return {"cpu_seconds": seconds}


@torch.no_grad()
def report(run: Path, teacher: Path, num: int = 32, many: int = 25) -> None:
    """The distance of few-step samples from the teacher's many-step end points, from the same noise.

    Written to benchmarks/results/own_teacher.json.
    """
    recipe, training = read_resolved(run / "recipe.yaml"), json.loads((teacher / "training.json").read_text())
    student, taught = load_student(run), build_teacher(resolve(recipe))
    x1 = torch.randn(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    ends = taught.solve(x1, None, many)
    error = lambda x: float((x - ends).square().mean().sqrt() / ends.std())
    rows = [
        [k, error(recipe.sampler(student.flow_map, x1, None, steps=k)), error(taught.solve(x1, None, k))]
        for k in (1, 2, 4)
    ]
    columns = ["steps", "student", "teacher"]
    print(table(rows, columns))
    settings = {
        "pictures": training["pictures"],
        "teacher steps": training["steps"],
        "teacher CPU-seconds": round(training["cpu_seconds"]),
    }
    settings |= {"student steps": recipe.trainer.steps, "samples": num, "end points at": many}
    write("own_teacher", {"rows": rows, "columns": columns, "settings": settings, "environment": environment()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("train", "report"))
    parser.add_argument("--pictures", type=Path, default=Path(".data/emoji/smileys-emotion"))
    parser.add_argument("--teacher", type=Path, default=Path("my-ddpm"))
    parser.add_argument("--run", type=Path, default=Path("runs/my-student"))
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.pictures, args.teacher, args.steps) if args.verb == "train" else report(args.run, args.teacher)

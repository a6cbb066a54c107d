"""How good is the emoji student at 1, 2 and 4 steps, and does stock diffusers draw what it draws?

Run `make data` and `flowmap fit --recipe emoji32` first, then `python benchmarks/emoji.py [--run runs/emoji32]`. It
exports the student for 1, 2 and 4 steps.  A process in which flowmap cannot be imported samples the captions of
training samples with StableDiffusion3Pipeline, and the result is compared with student.sample from the same noise.
docs/images/emoji.png has rows of real pictures, the teacher, and diffusers at 4, 2 and 1 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from lib.report import environment, table, write
from safetensors.torch import load_file, save_file

from flowmap.base.images import save_picture, stack, to_grid
from flowmap.build.data import build_data
from flowmap.build.teacher import build_teacher
from flowmap.evaluation.conditions import conditions_for
from flowmap.export import export
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import read_resolved
from flowmap.student.folder import load_student

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where tests/ is
from tests.export.alone import alone  # noqa: E402

STEPS, NUM, SEED = (1, 2, 4), 32, 1
DRAW = """
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
given = load_file("given.safetensors")
names = ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
not_here = dict.fromkeys(names)
pipe = DiffusionPipeline.from_pretrained("steps-{steps}", **not_here)
images = pipe(prompt_embeds=given["text"], pooled_prompt_embeds=given["pooled"], latents=given["noise"],
              num_inference_steps={steps},
              guidance_scale=1.0, height={side}, width={side}, output_type="pt").images
save_file(dict(images=images.contiguous()), "drawn-{steps}.safetensors")
"""


def drawn(student, cond, noise: torch.Tensor, side: int) -> dict[int, torch.Tensor]:
    """Pictures in [-1, 1] by number of steps, each from an exported folder by stock diffusers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(
            {"text": cond["text"].contiguous(), "pooled": cond["pooled"].contiguous(), "noise": noise},
            folder / "given.safetensors",
        )
        for k in STEPS:
            export(student, folder / f"steps-{k}", steps=k)
            alone(DRAW.format(steps=k, side=side), folder)
        return {k: load_file(folder / f"drawn-{k}.safetensors")["images"] * 2 - 1 for k in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/emoji32"))
    run = parser.parse_args().run
    recipe, metrics = read_resolved(run / "recipe.yaml"), json.loads((run / "metrics.json").read_text())
    data, student = build_data(resolve(recipe)), load_student(run)
    teacher = build_teacher(resolve(recipe), data)
    cond = conditions_for(student, data, NUM)(torch.arange(NUM))
    noise = torch.randn(NUM, *data.shape, generator=torch.Generator().manual_seed(SEED))
    theirs = drawn(student, cond, noise, data.reference.shape[-1])
    parity = {k: float((theirs[k] - student.sample(NUM, steps=k, cond=cond, seed=SEED)).abs().max()) for k in STEPS}
    with torch.no_grad():
        by_teacher = student.pictures(teacher.solve(noise, cond, recipe.evaluation.teacher_steps))
    real = student.pictures(data.__getitems__([i * len(data) // NUM for i in range(NUM)])[0])
    save_picture(
        ROOT / "docs" / "images" / "emoji.png",
        stack([to_grid(x, columns=16) for x in (real, by_teacher, *(theirs[k] for k in (4, 2, 1)))]),
    )
    figures = {f"student {k}": row for k, row in metrics["student"].items()}
    figures |= {f"teacher {k}": row for k, row in metrics.get("teacher_few", {}).items()}
    figures |= {f"teacher {metrics['teacher']['steps']}": metrics["teacher"], "floor": metrics["floor"]}
    same = {f"student {k}": value for k, value in parity.items()}
    keys = ("frechet_efficientnet_lite0", "frechet_efficientnet_lite0_train")
    rows = [[name, *(row[key] for key in keys), same.get(name, "")] for name, row in figures.items()]
    columns = ["row", "FD-efficientnet-lite0", "to training pictures", "largest difference to stock diffusers"]
    print(table(rows, columns))
    settings = {
        "seeds": [recipe.seed],
        "steps": recipe.trainer.steps,
        "objective": type(recipe.objective).__name__,
        "pictures": NUM,
    }
    payload = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "settings": settings,
        "metrics": metrics,
    }
    write("emoji", {**payload, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()

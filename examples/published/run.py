"""A published model becomes a student of 1, 2 and 4 steps: checked, distilled, measured, drawn and exported.

    python examples/published/run.py mnist-flow-vit [--root FOLDER] [--out FOLDER] [key=value ...]

FOLDER of --root (by default ../shared/published) has the files of ORIGINS. Settings are those of the recipe,
mnist_flow_vit.yaml or mnist_ddpm.yaml, such as trainer.steps=300. The pictures are in samples/ of the run's folder,
the programs for use without flowmap in steps-1/, steps-2/ and steps-4/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flowmap
from flowmap.base.files import file_digest
from flowmap.export import export

HERE = Path(__file__).parent
MODELS = ("mnist-flow-vit", "mnist-ddpm")
ORIGINS = {
    "mnist-flow-vit/DiffusionViT.pth": "github: sofia-dominguezc/MNIST-diffusion, commit 88bc058, parameters/MNIST",
    "mnist-ddpm/ddpm_mnist.pth": "github: Charles-yueyue831/DDPM, commit d5fc506, model",
    "mnist-test/t10k-images-idx3-ubyte.gz": "MNIST's test pictures, for example github: lijie2020/vae",
    "mnist-test/t10k-labels-idx1-ubyte.gz": "MNIST's test labels, for example github: lijie2020/vae",
}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--root", type=Path, default=Path("../shared/published"))
    parser.add_argument("--out", type=Path, help="the run's folder, by default runs/NAME")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(words)
    try:
        distil(args)
    except ValueError as error:
        sys.exit(str(error))


def distil(args: argparse.Namespace) -> None:
    stem = args.model.replace("-", "_")
    data = flowmap.allow_import(str(HERE / "mnist_test.py"))
    net = flowmap.allow_import(str(HERE / f"{stem}.py"))
    check(args.root / net.WEIGHTS, net.SHA256, net.WEIGHTS)
    for name in data.FILES:
        check(args.root / "mnist-test" / name, None, f"mnist-test/{name}")
    places = [f"teacher.weights={args.root / net.WEIGHTS}", f"data.root={args.root / 'mnist-test'}"]
    recipe = flowmap.read_recipe(HERE / f"{stem}.yaml", [*places, *args.settings])
    run = flowmap.fit(recipe, args.out, resume="auto")
    for steps, row in run.metrics["student"].items():
        print(f"student, {steps} steps: {shown(row)}")
    print(f"teacher, {run.metrics['teacher']['steps']} steps: {shown(run.metrics['teacher'])}")
    for steps in recipe.sampler.steps:
        export(run.student, run.folder / f"steps-{steps}", to="torch", steps=steps, overwrite=True)
    print(f"pictures: {run.folder / 'samples'}, programs: {run.folder}/steps-K")


def check(path: Path, sha256: str | None, name: str) -> None:
    """Raise ValueError with the file's origin if it is missing, or altered where its SHA-256 is known."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; it is of {ORIGINS[name]}")
    if sha256 is not None and file_digest(path) != sha256:
        raise ValueError(f"{path}: is altered, its SHA-256 is {file_digest(path)}; the original is of {ORIGINS[name]}")


def shown(row: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items())


if __name__ == "__main__":
    main(sys.argv[1:])

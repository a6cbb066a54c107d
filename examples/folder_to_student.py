"""A folder of pictures to a student that draws new ones in 2 steps.

    python examples/folder_to_student.py my_pictures --size 32 --out runs/mine

Subfolders are classes.  The first run trains a teacher on the pictures (flow matching), the second distils it.  The
default numbers of steps suit a few thousand small pictures and a GPU; --teacher-steps and --student-steps change them.
"""

import argparse
from pathlib import Path

import flowmap

TEACHER = """\
base: method/teacher
data: {{kind: folder, root: "{root}", size: {size}, batch_size: {batch_size}}}
student: {{preset: {preset}, patch: {patch}}}
trainer: {{steps: {teacher_steps}, accelerator: auto}}
ema: {{kind: power, std: 0.1, snapshot_every_steps: {snapshots}}}
"""
STUDENT = """\
base: method/ayf_mixed
data: {{kind: folder, root: "{root}", size: {size}, batch_size: {batch_size}}}
teacher: {{recipe: {teacher}, guidance: {{kind: autoguidance, snapshot: 0.25, scale: [1.0, 2.0], default: 1.5}}}}
sampler: {{steps: [2]}}
trainer: {{steps: {student_steps}, accelerator: auto}}
metrics: [{{kind: endpoint_error, images: {images}, steps: {teacher_calls}}}]  # distance to where the teacher arrives
evaluation: {{teacher_steps: {teacher_calls}}}
log: {{wandb: false}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the folder of pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--size", type=int, default=32, help="height and width to which pictures are cut and scaled")
    parser.add_argument("--preset", default="mini", help="the network: nano, tiny, mini, S, B, L or XL")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--teacher-steps", type=int, default=20_000)
    parser.add_argument("--student-steps", type=int, default=10_000)
    parser.add_argument("--teacher-calls", type=int, default=64, help="steps of the teacher when it is measured")
    parser.add_argument("--images", type=int, default=256, help="samples that are measured")
    settings = vars(parser.parse_args())
    out = settings.pop("out")
    settings["root"] = settings["root"].resolve()
    out.mkdir(parents=True, exist_ok=True)

    teacher, student = out / "teacher.yaml", out / "student.yaml"
    teacher.write_text(TEACHER.format(snapshots=max(1, settings["teacher_steps"] // 8), **settings))
    student.write_text(STUDENT.format(teacher=teacher.resolve(), **settings))

    run = flowmap.fit(flowmap.read_recipe(student), out / "run", resume=True)  # trains the teacher first
    (grid,) = flowmap.sample(run.folder / "student", out / "pictures", steps=(2,), num=16)
    print(f"student: {run.folder / 'student'}\npictures: {grid}")


if __name__ == "__main__":
    main()

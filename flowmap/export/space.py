"""Exports a student as a Space of a hub: the page of `flowmap demo` as an app, with the student's folder beside it."""

from __future__ import annotations

import warnings
from pathlib import Path

from flowmap.base.files import write_text
from flowmap.export.folder import whole_folder
from flowmap.export.metadata import front_matter, read_front_matter
from flowmap.nets.module import Module
from flowmap.nets.stacked import net_within
from flowmap.student.student import Student

STUDENT = "student"  # the folder of the student in the Space
GRADIO = "6.31.0"  # the version with which the page was tested
COPIED = ("license", "license_name", "datasets")  # keys of the student's card that a Space has too

APP = '''"""A page to try this student. A hub runs this file; `python app.py` serves the page on your machine."""

from pathlib import Path

from flowmap.evaluation.demo import open_demo
from flowmap.evaluation.demo_page import page

demo = page(open_demo(Path(__file__).parent / "{student}", steps={steps}, teacher=False))

if __name__ == "__main__":
    demo.launch()
'''

PAGE = """# {name}

A page to try a few-step student made with flowmap, at {steps} steps from the same noise.

## Run it here

```sh
pip install -r requirements.txt
python app.py
```

`{student}/` is the student's folder, with its model card. `app.py` imports flowmap, which `requirements.txt` names; if
the package index that you use does not have it, put its wheel into this folder and name the file there instead.
"""


def write_space(student: Student, out: Path, *, overwrite: bool = False) -> Path:
    """Write app.py, requirements.txt, README.md with the metadata of a Space, and the student's folder; return `out`.

    Raises a ValueError if nothing but this machine could load or draw the student.
    """
    _check(student)
    config = student.config
    note = {"format": 1, "to": "space", "recipe": config.recipe, "recipe_hash": config.recipe_hash}
    steps = tuple(sorted(set(config.sampler.steps)))
    with whole_folder(out, note, overwrite=overwrite) as folder:
        student.save_pretrained(folder / STUDENT)
        write_text(folder / "app.py", APP.format(student=STUDENT, steps=steps))
        write_text(folder / "requirements.txt", _requirement(student) + "\n")
        write_text(folder / "README.md", _card(student, steps))
    return out


def _check(student: Student) -> None:
    own = net_within(student.config.net)
    if isinstance(own, Module):
        raise ValueError(f"--to space: the student is the module {own.module!r}, whose source flowmap does not have")
    if student.config.edits:
        raise ValueError("--to space: the student edits sentences, and the page draws samples from noise")
    config = student.config
    for key, part in (("base", config.base), ("autoencoder", config.autoencoder), ("text", config.text)):
        source = getattr(part, "source", None)
        if source and source != "autoencoder" and Path(source).exists():
            warnings.warn(f"{key}: {source} is a folder of this machine, which a Space cannot read", stacklevel=3)


def _requirement(student: Student) -> str:
    from flowmap import __version__

    extras = ["demo", *["lora"] * (student.config.lora is not None)]
    return f"flowmap-distillation[{','.join(extras)}]>={__version__}"


def _card(student: Student, steps: tuple[int, ...]) -> str:
    """README.md: the metadata that a hub reads, and how to run the page elsewhere."""
    path = None if student.folder is None else student.folder / "README.md"
    own = read_front_matter(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    about = {
        "title": student.config.recipe,
        "emoji": "\N{GAME DIE}",
        "colorFrom": "gray",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "tags": ["flowmap", "few-step"],
        **{key: own[key] for key in COPIED if key in own},
    }
    listed = ", ".join(map(str, steps[:-1])) + (" and " if len(steps) > 1 else "") + str(steps[-1])
    return "\n".join([*front_matter(about), PAGE.format(name=student.config.recipe, steps=listed, student=STUDENT)])

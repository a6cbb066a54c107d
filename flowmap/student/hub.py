"""What a student does on a hub: save_pretrained, from_pretrained and push_to_hub, as other libraries name them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from flowmap.base.hub import check_repository, upload
from flowmap.base.images import save_picture, stack, steps_label, to_grid
from flowmap.student.config import StudentConfig
from flowmap.student.files import check_place, copy_models, read_student, save_student

PICTURE = "samples.png"
HERE = "path/to/this/folder"  # in a card's example
FIGURES = "## Figures"


class OnHub:
    """The methods of a student that read and write its folder, here or on the hub."""

    config: StudentConfig
    flow_map: Any
    folder: Path | None
    if TYPE_CHECKING:
        sample: Any
        check_whole: Any

        def __init__(self, config: StudentConfig, flow_map: Any, folder: Path | None = None): ...

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        base: str | Path | None = None,
        imports: str | Sequence[str] = (),
        quantize: str | None = None,
    ) -> Self:
        """The student of that folder or hub id: see load_student, whose arguments and errors these are."""
        return cls(*read_student(source, base=base, imports=imports, revision=revision, quantize=quantize))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the student's folder and return it: config, weights, recipe, card, and the models next to them.

        Raises a ValueError if the folder has other files than a student's, or the student is quantised.
        """
        self.check_whole()
        out = Path(folder)
        check_place(out, "folder")
        recipe, card = self._file_text("recipe.yaml"), self._file_text("README.md") or self._short_card()
        if self.folder is not None and not (out.is_dir() and out.samefile(self.folder)):
            copy_models(self.folder, out)
        save_student(out, self.config, self.flow_map.state_dict(), recipe=recipe, card=card)
        return out

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "flowmap student",
        pictures: int = 16,
    ) -> str:
        """Upload the student's folder to the repository owner/name and return the address of the commit.

        The repository is created if it does not exist, private or not; revision is a branch of it. The card gets a grid
        of `pictures` samples (0: none) at each number of steps, where no prompt is needed to draw them. Raises a
        ValueError for the name, and a one-line RuntimeError if the hub refuses.
        """
        check_repository(repository, "push_to_hub")
        if self.config.base is not None and Path(self.config.base.source).exists():
            what = f"{self.config.base.source} is a folder of this machine: load_student needs base= elsewhere"
            warnings.warn(f"base: {what}", stacklevel=2)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "student")
            card = folder / "README.md"
            text = card.read_text(encoding="utf-8").replace(HERE, repository)
            if pictures and self._draw(folder / PICTURE, pictures):
                text = _with_picture(text, f"{pictures} samples")
            card.write_text(text, encoding="utf-8")
            return upload(folder, repository, message=message, key="push_to_hub", private=private, revision=revision)

    def _draw(self, path: Path, num: int) -> bool:
        """Draw a grid at each number of steps, all from the same noise; False for sentences and prompts."""
        if self.config.text is not None or self.config.text_autoencoder is not None or self.config.edits:
            return False
        grids, steps = [], sorted(set(self.config.sampler.steps))
        for k in steps:
            samples = self.sample(num, steps=k, seed=0)
            assert isinstance(samples, Tensor)
            grids.append(to_grid(samples.float()))
        save_picture(path, stack(grids, [steps_label("student", k) for k in steps]))
        return True

    def _file_text(self, name: str) -> str:
        """The text of a file in the student's folder; empty if there is none."""
        path = None if self.folder is None else self.folder / name
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""

    def _short_card(self) -> str:
        load = ["import flowmap", f'student = flowmap.load_student("{HERE}")']
        lines = ["---", "library_name: flowmap", "tags: [flowmap, few-step]", "---", f"# {self.config.recipe}", ""]
        lines += [f"A flowmap student: samples of shape {tuple(self.config.shape)}.", "", "```python", *load, "```", ""]
        lines += [self.config.classes_listed(), ""] if self.config.class_names else []
        return "\n".join([*lines, FIGURES, "", "Not measured yet.", ""])


def _with_picture(card: str, what: str) -> str:
    """The card with the picture above its figures."""
    head, heading, rest = card.partition(FIGURES)
    return f"{head}## Samples\n\n![{what} at each number of steps]({PICTURE})\n\n{heading}{rest}"

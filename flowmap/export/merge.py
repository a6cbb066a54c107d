"""`flowmap merge`: add a finetune or a LoRA of the same base to a student's weights, without training.

W += alpha (W_custom - W_base), and W += scale (alpha / rank) B A for a LoRA. Source: InstaFlow (Liu et al. 2023,
arXiv:2309.06380), which transfers community finetunes of Stable Diffusion to its one-step student in this way. The
quality of the result is not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from flowmap.base.files import read_json, read_tensors
from flowmap.export.folder import whole_folder
from flowmap.nets.flow_map import SILENT
from flowmap.nets.lora_file import read_lora
from flowmap.student.config import StudentConfig
from flowmap.student.folder import copy_models, load_student, save_student
from flowmap.student.student import Student

PARTS = ("unet", "transformer")
# the prefix of a student's weights before the network's own name
WITHIN = re.compile(r"^net\.(?:(?:first|second)\.)?(?:model\.)?")
STAMP = "flowmap_merge.json"


@dataclass(frozen=True)
class Report:
    """The student's tensors that a delta or LoRA changed, and the names that do not match, by reason."""

    what: str
    changed: tuple[str, ...]
    unmatched: tuple[str, ...]
    shapes: tuple[str, ...]
    untouched: tuple[str, ...]

    @property
    def mismatches(self) -> tuple[str, ...]:
        return (*self.unmatched, *self.shapes)

    def lines(self) -> list[str]:
        rows = [f"{self.what}: {len(self.changed)} tensors of the student changed"]
        for names, why in (
            (self.unmatched, "of its weights are not in the student"),
            (self.shapes, "have another shape there"),
            (self.untouched, "of the student's are not in it and stay as they were"),
        ):
            if names:
                rows.append(f"  {len(names)} {why}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        return rows


@dataclass(frozen=True)
class Merged:
    """A student's configuration and weights after merging, and reports of the changes."""

    config: StudentConfig
    weights: dict[str, Tensor]
    reports: tuple[Report, ...]

    def lines(self) -> list[str]:
        return [line for report in self.reports for line in report.lines()]


def merge(
    student: Student,
    *,
    delta: str | Path | None = None,
    base: str | Path | None = None,
    alpha: float = 1.0,
    lora: str | Path | None = None,
    scale: float = 1.0,
    strict: bool = False,
) -> Merged:
    """Add alpha (delta - base), and scale times the LoRA's product, to the student's weights.

    A LoRA student is merged into its base first. delta and base: a folder of a diffusers pipeline or network, a
    student's folder, or a safetensors file. lora: a safetensors file. For a stack, changes apply to both networks.
    Raises a ValueError if nothing matches or changes. With `strict` it also raises for any mismatch, and for weights
    of the student that a delta does not change (except arrival and guidance branches, which no base has).
    """
    if delta is None and lora is None:
        raise ValueError("--delta: give --delta with --base, or --lora, or both")
    if (delta is None) != (base is None):
        raise ValueError("--base: the weights that --delta was trained from; give both or neither")
    student = student.merged()
    weights = {name: tensor.clone() for name, tensor in student.flow_map.state_dict().items()}
    reports = []
    if delta is not None and base is not None:
        changes, alone = _difference(delta, base, alpha)
        reports.append(_add(weights, changes, f"{delta} - {base}, times {alpha:g}", alone=alone))
    if lora is not None:
        changes = {name: scale * value for name, value in read_lora(Path(lora), _names(weights)).items()}
        reports.append(_add(weights, changes, f"{lora}, times {scale:g}", all_of_it=False))
    for report in reports if strict else ():
        found = (*report.mismatches, *report.untouched)
        if found:
            names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise ValueError(f"--strict: {report.what}: {len(found)} weights do not fit: {names}")
    return Merged(replace(student.config, tuned=()), weights, tuple(reports))


def write_merged(merged: Merged, student: Student, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the student folder `out`, completely or not at all, with a card that lists the changes, and return it."""
    recipe = student.folder / "recipe.yaml" if student.folder is not None else None
    text = recipe.read_text(encoding="utf-8") if recipe is not None and recipe.is_file() else ""
    what = [report.what for report in merged.reports]
    note = {"recipe": merged.config.recipe, "merged": what, "report": merged.lines()}
    with whole_folder(Path(out), note, overwrite=overwrite, stamp=STAMP, what="merge") as folder:
        if student.folder is not None:
            copy_models(student.folder, folder)
        save_student(folder, merged.config, merged.weights, recipe=text, card=_card(merged))
    return Path(out)


def _names(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The student's tensor names by the network's own name: one each, or two in a stack."""
    found: dict[str, list[str]] = {}
    for key in weights:
        found.setdefault(WITHIN.sub("", key), []).append(key)
    return found


def _difference(delta: str | Path, base: str | Path, alpha: float) -> tuple[dict[str, Tensor], list[str]]:
    """alpha (delta - base) by name, and the names that only one of them has, or that have different shapes."""
    one, other = (network_tensors(where, key) for where, key in ((delta, "--delta"), (base, "--base")))
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    both = [name for name in shared if one[name].is_floating_point()]
    changes = {name: alpha * (one[name].float() - other[name].float()) for name in both}
    if both and not any(bool(change.any()) for change in changes.values()):
        what = "hold the same weights" + ("" if alpha else ", or --alpha is 0")
        raise ValueError(f"--delta: {delta} and {base} {what}: nothing would change")
    constants = {name for name in one if not one[name].is_floating_point()}
    return changes, [name for name in dict.fromkeys([*one, *other]) if name not in changes and name not in constants]


def _add(
    weights: dict[str, Tensor],
    changes: Mapping[str, Tensor],
    what: str,
    *,
    alone: list[str] | None = None,
    all_of_it: bool = True,
) -> Report:
    """Add the changes that match to the weights, in float32.

    alone: names without a change. all_of_it: whether a change is expected for every weight.
    """
    places = _names(weights)
    changed, shapes = [], []
    for name, change in changes.items():
        for key in places.get(name, ()):
            if weights[key].shape == change.shape:
                weights[key] = (weights[key].float() + change).to(weights[key].dtype)
                changed.append(key)
            else:
                shapes.append(f"{key} ({tuple(change.shape)} there, {tuple(weights[key].shape)} here)")
    if not changed:
        theirs, ours = next(iter([*changes, *(alone or ())]), "none"), next(iter(places), "none")
        firsts = f"the first is {theirs!r}, the student's first {ours!r}"
        raise ValueError(f"{what}: none of its {len(changes)} weights fits the student: {firsts}")
    unmatched = [name for name in [*changes, *(alone or ())] if name not in places]
    here = [key for name, keys in places.items() for key in keys if not any(part in name for part in SILENT)]
    there = {*changed, *(shape.split(" ")[0] for shape in shapes)}
    untouched = [key for key in here if key not in there] if all_of_it else []
    return Report(what, tuple(changed), tuple(unmatched), tuple(shapes), tuple(untouched))


def network_tensors(where: str | Path, key: str) -> dict[str, Tensor]:
    """The weights of a diffusers folder, a student's folder or a safetensors file, by the network's own names.

    ValueErrors name `key`.
    """
    path = Path(where)
    if path.is_file():
        return {WITHIN.sub("", name): tensor for name, tensor in read_tensors(path).items()}
    if not path.is_dir():
        raise ValueError(f"{key}: {str(where)!r} is no folder and no safetensors file")
    config = path / "config.json"
    if (path / "student").is_dir() or (config.is_file() and "format" in read_json(config)):
        state = load_student(path).merged().flow_map.state_dict()
        return {WITHIN.sub("", name): tensor for name, tensor in state.items()}
    folder = next((path / part for part in PARTS if (path / part).is_dir()), path)
    return {name: tensor for file in _files(folder, key) for name, tensor in read_tensors(file).items()}


def _files(folder: Path, key: str) -> list[Path]:
    """The safetensors files of a diffusers network; those of a variant (.fp16) only if there are no others."""
    found = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    plain = [path for path in found if path.name.count(".") == 1]
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        what = f"; {pickles[0]} is a pickle and is not read" if pickles else ""
        raise ValueError(f"{key}: {folder} holds no diffusion_pytorch_model*.safetensors{what}")
    return plain or found


def _card(merged: Merged) -> str:
    head = "The weights of a flowmap student, with these changes added onto them, not trained:"
    load = ["import flowmap", 'student = flowmap.load_student("path/to/this/folder")']
    lines = [f"# {merged.config.recipe}, merged", "", head, "", "```", *merged.lines(), "```", ""]
    lines += ["```python", *load, "```", ""]
    lines += [
        "`recipe.yaml` is the recipe of the student before. "
        "Not measured: figures of that student are not figures of this one."
    ]
    return "\n".join(lines) + "\n"

"""How far is a student at step 0 from its teacher, our clock from theirs, the dual tangent from torch.func.jvp?

And an export from its student?  The functions that the tests assert on are called and printed: real architectures of
small size, random weights, guidance on (tests/nets, tests/export; tests/support/parity.py defines the figures).
`python benchmarks/parity.py`, about ten minutes; rows of ONNX need the extra `onnx`.

The last two tables have every network in every format (tests/support/formats.py). `--only NETWORK...` measures these
rows alone, such as `--only FluxTransformer2DModel`, and `--formats FORMAT...` these columns; everything else that was
measured is kept, and each row at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lib.report import RESULTS, environment, keep, kept, table, write
from tables.parity import format_tables

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where tests/ is
from tests.export import test_custom, test_onnx, test_program, test_stock  # noqa: E402
from tests.nets import test_diffusers_model, test_edm, test_edm2  # noqa: E402
from tests.support.formats import FORMATS, NETWORKS, measured  # noqa: E402

TEACHERS = ["network", "schedule", "step 0, largest difference", "Euler on its scheduler's grid", "dual tangent"]
EXPORTS = ["export", "network", "steps", "loads in", "largest difference", "test"]
EDM = {"ddpmpp": "EDM DDPM++", "ncsnpp": "EDM NCSN++", "adm": "EDM ADM"}
SMALL = {"weights": "random", "samples": "float32"}
NAMES = {
    "sd3": "SD3", "sana": "Sana", "flux": "Flux", "flux_dev": "Flux, guidance-distilled", "qwen": "QwenImage",
    "z_image": "Z-Image", "flux2": "FLUX.2 klein", "flux2_dev": "FLUX.2 dev", "hunyuan_image": "HunyuanImage",
    "lumina2": "Lumina 2", "aura_flow": "AuraFlow",
    "dit": "our DiT", "edm2": "EDM2",
    "mlp": "our MLP", "table_dit": "DiT of diffusers", "table_unet": "UNet2D",
}  # fmt: skip


def teachers() -> Iterator[list]:
    """A row for each network and schedule: the student at step 0, our clock, the tangent."""
    diffusers = test_diffusers_model
    for row in diffusers.ROWS:
        yield [
            *row,
            diffusers.from_its_teacher(*row),
            diffusers.from_its_scheduler(*row),
            diffusers.from_the_reference_tangent(*row),
        ]
    measures = test_edm.from_its_teacher, test_edm.from_its_scheduler, test_edm.from_the_reference_tangent
    yield [
        "EDM2",
        "EDM",
        test_edm2.from_its_teacher(),
        test_edm2.from_its_scheduler(),
        test_edm2.from_the_reference_tangent(),
    ]
    for family, name in EDM.items():
        yield [name, "EDM", *(measure(family) for measure in measures)]


def exports(at: Path) -> Iterator[list]:
    """A row for each export and number of steps; the exports are in folders below `at`.

    A Python without flowmap samples them.
    """
    places = [at / kind for kind in ("stock", "custom", "torch")]
    for place in places:
        place.mkdir()
    stock, custom = test_stock.exported(places[0]), test_custom.exported(places[1])
    programs = test_program.exported(list(test_program.STUDENTS), places[2])
    for name, steps in test_stock.ROWS:
        yield _row("stock", name, steps, "diffusers", test_stock.from_the_student(stock, name, steps), test_stock)
    for name, steps in test_custom.ROWS:
        found = test_custom.from_the_student(custom, name, steps)
        yield _row("own code", name, steps, "diffusers, trust_remote_code", found, test_custom)
    for name, (steps, _) in test_program.STUDENTS.items():
        found = test_program.from_the_student(programs, name)
        yield _row("torch", name, steps, "torch.export.load", found, test_program)
    for name in test_onnx.CONVERTED:
        steps = test_program.STUDENTS[name][0]
        yield _row("onnx", name, steps, "onnxruntime", test_onnx.from_the_student(name, at), test_onnx)


def _row(export: str, name: str, steps: int, loads_in: str, difference: float, test) -> list:
    return [export, NAMES[name], steps, loads_in, difference, f"`{test.__name__.replace('.', '/')}.py`"]


def every_format(made: dict) -> dict[str, dict]:
    """The tables of what was measured in every format, and where."""
    readers = {name: reader for name, (_, reader) in FORMATS.items()}
    here = {"settings": SMALL, "environment": made.get("formats_environment")}
    return {name: one | here for name, one in format_tables(made.get("formats", {}), NETWORKS, readers).items()}


def formats(names: list[str], wanted: list[str]) -> None:
    """Measure these networks in these formats, and keep each at once."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder) / "made", tuple(wanted))
        print(name, found, flush=True)
        made = kept(RESULTS / "parity.json")
        made.setdefault("formats", {}).setdefault(name, {}).update(found)
        made["formats_environment"] = environment()
        made.setdefault("tables", {}).update(every_format(made))
        keep(RESULTS / "parity.json", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK", help="these rows of the last tables")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), metavar="FORMAT", help="these columns alone")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.only is None and a.formats is None:
        teachers_and_exports()
    formats(a.only or list(NETWORKS), a.formats or list(FORMATS))
    tables = kept(RESULTS / "parity.json")["tables"]
    for name in ("parity_formats", "parity_refused"):
        print(table(tables[name]["rows"], tables[name]["columns"]), end="\n\n")


def teachers_and_exports() -> None:
    """Measure the first two tables; rows of the others stay as they are."""
    start, before, made = time.perf_counter(), kept(RESULTS / "parity.json"), {}
    made["parity_teachers"] = {"columns": TEACHERS, "rows": list(teachers())}
    with tempfile.TemporaryDirectory() as folder:
        made["parity_exports"] = {"columns": EXPORTS, "rows": list(exports(Path(folder)))}
    for part in made.values():
        print(table(part["rows"], part["columns"]), end="\n\n")
    settings = {"weights": "random", "first two columns and exports": "float32", "tangents": "float64"}
    payload = {"question": __doc__.splitlines()[0], "environment": environment(), "settings": settings}
    payload |= {key: before[key] for key in ("formats", "formats_environment") if key in before}
    tables = made | every_format(payload)
    write("parity", {**payload, "seconds": time.perf_counter() - start, "tables": tables})


if __name__ == "__main__":
    main()

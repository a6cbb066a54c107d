"""How far is a student at step 0 from its teacher, our clock from theirs, the dual tangent from torch.func.jvp?

And an export from its student?  The functions that the tests assert on are called and printed: real architectures of
small size, random weights, guidance on (tests/nets, tests/export; tests/support/parity.py defines the figures).
`python benchmarks/parity.py`, about ten minutes; rows of ONNX need the extra `onnx`.

The last two tables have every network in every format (tests/support/formats.py). `--only NETWORK...` measures these
rows alone, such as `--only FluxTransformer2DModel`, and keeps everything else that was measured; each is kept at once.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where tests/ is
from tests.export import test_custom, test_onnx, test_program, test_stock  # noqa: E402
from tests.nets import test_diffusers_model, test_edm, test_edm2  # noqa: E402
from tests.support.formats import FORMATS, NETWORKS, measured  # noqa: E402

TEACHERS = ["network", "schedule", "step 0, largest difference", "Euler on its scheduler's grid", "dual tangent"]
EXPORTS = ["export", "network", "steps", "loads in", "largest difference", "test"]
EDM = {"ddpmpp": "EDM DDPM++", "ncsnpp": "EDM NCSN++", "adm": "EDM ADM"}
NAMES = {
    "sd3": "SD3", "sana": "Sana", "flux": "Flux", "flux_dev": "Flux, guidance-distilled", "qwen": "QwenImage",
    "z_image": "Z-Image", "flux2": "FLUX.2 klein", "flux2_dev": "FLUX.2 dev", "hunyuan_image": "HunyuanImage",
    "lumina2": "Lumina 2",
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


OURS = {
    "mlp": "our MLP", "dit": "our DiT", "stacked": "two of our DiT in series", "edm2": "EDM2",
    "edm_ddpmpp": "EDM DDPM++", "edm_ddpmpp, ncsnpp": "EDM NCSN++", "edm_adm": "EDM ADM",
}  # fmt: skip


def format_tables(found: dict[str, dict[str, float | str]]) -> dict[str, dict]:
    """The table network x format, and that of the reasons of refusals."""
    rows, reasons = [["loads in", *(reader for _, reader in FORMATS.values())]], {}
    for name in (name for name in NETWORKS if name in found):
        cells = [found[name][one] for one in FORMATS]
        rows.append([OURS.get(name, name), *("no" if isinstance(cell, str) else f"{cell:.1e}" for cell in cells)])
        for one, cell in zip(FORMATS, cells, strict=True):
            if isinstance(cell, str):
                reasons.setdefault(cell, []).append((one, OURS.get(name, name)))
    distinct = lambda values: ", ".join(dict.fromkeys(values))
    refused = [
        [distinct(one for one, _ in where), distinct(name for _, name in where), reason]
        for reason, where in reasons.items()
    ]
    return {
        "parity_formats": {"columns": ["network", *FORMATS], "rows": rows},
        "parity_refused": {"columns": ["formats", "networks", "why not"], "rows": refused},
    }


def formats(names: list[str]) -> None:
    """Measure these networks in every format, and keep each at once."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder) / "made")
        print(name, found, flush=True)
        made = kept(RESULTS / "parity.json")
        made.setdefault("formats", {})[name] = found
        made["formats_environment"] = environment()
        made.setdefault("tables", {}).update(format_tables(made["formats"]))
        keep(RESULTS / "parity.json", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK", help="these rows of the last tables")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only is None:
        teachers_and_exports()
    formats(list(NETWORKS) if only is None else only)
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
    payload["formats"] = before.get("formats", {})
    tables = made | format_tables(payload["formats"])
    write("parity", {**payload, "seconds": time.perf_counter() - start, "tables": tables})


if __name__ == "__main__":
    main()

"""The pages are true: their Python runs, their commands parse, their tables match the code and the benchmarks."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import flowmap
from flowmap.cli import parse
from flowmap.plan.sweep import sweep_of
from flowmap.recipe import read_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_COMMANDS = [page for page in PAGES if name_of(page) != "docs/reference/recipes.md"]
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block in that language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in found]


def run_blocks(page: Path) -> dict:
    """The names that the page's Python blocks leave, run in order in one module of their own."""
    module = types.ModuleType(f"blocks_of_{page.stem}")
    sys.modules[module.__name__] = module  # where dataclasses look up their annotations
    try:
        for line, text in blocks(page, "python"):
            exec(compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True), vars(module))
    finally:
        del sys.modules[module.__name__]
    return vars(module)


def shell_lines(page: Path) -> list[list[str]]:
    """The words of every command in ```sh blocks, comments left out, continued lines joined."""
    lines = [line for _, text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def module_of(path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """An empty current folder, with the files that the pages ask the reader to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    for page in PAGES:
        for _, text in blocks(page, "yaml"):
            if named := re.match(r"# file: (\S+)\n", text):
                (tmp_path / named[1]).write_text(text)
    return tmp_path


@pytest.fixture
def digits_run(desk, monkeypatch):
    """runs/digits as a finished run would leave it, with a small untrained student; fit finds it and trains nothing."""
    from flowmap.build.data import build_data
    from flowmap.nets import DiT
    from flowmap.plan.plan import resolve
    from flowmap.samplers import Deterministic
    from flowmap.student.config import StudentConfig
    from flowmap.student.folder import save_student
    from flowmap.train.fit import Run

    recipe = read_recipe("digits", ["metrics=[{kind: frechet, features: pixels, images: 100}]"])
    config = StudentConfig(
        net=DiT(preset="nano"),
        sampler=Deterministic(),
        shape=build_data(resolve(recipe)).shape,
        num_classes=10,
        guidance=(1.0, 3.0, 1.5),
    )
    torch.manual_seed(0)
    save_student(desk / "runs/digits/student", config, config.build().state_dict(), recipe=recipe.to_yaml(), card="")
    asked = []

    def fit(recipe, out=None, **options) -> Run:
        asked.append(recipe)
        return Run(desk / "runs/digits", {})

    monkeypatch.setattr(flowmap, "fit", fit, raising=False)
    return asked


def test_the_readme_runs(digits_run):
    names = run_blocks(ROOT / "README.md")
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].abs().max() <= 1
    assert names["x_s"].shape == (16, 1, 8, 8)
    assert digits_run[0].objective.warmup_steps == 500


@pytest.fixture
def tables():
    """The dicts that the examples add to, put back afterwards."""
    from flowmap.data import DATA
    from flowmap.flow.tangent.rules import RULES
    from flowmap.metrics import METRICS
    from flowmap.objectives import OBJECTIVES

    kept = [(table, dict(table)) for table in (OBJECTIVES, METRICS, DATA, RULES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def test_the_tutorials_python_runs(digits_run):
    assert run_blocks(ROOT / "docs/guide/tutorial.md")["images"].shape == (16, 1, 8, 8)


def test_extending_runs(desk, tables):
    run_blocks(ROOT / "docs/guide/extending.md")
    assert (desk / "runs/solver-points/metrics.json").is_file()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_parse_and_their_recipes_read(page, desk):
    for words in shell_lines(page):
        if words[0] != "flowmap":
            continue
        arguments = parse(words[1:])
        if arguments.verb == "sweep":
            sweep_of(arguments.recipe, arguments.overrides, metric=arguments.metric, steps=arguments.steps)
        elif getattr(arguments, "recipe", None):
            read_recipe(arguments.recipe, arguments.overrides)


@pages
def test_every_make_target_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {m for m in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8"))}
    named |= {words[1] for words in shell_lines(page) if words[0] == "make"}
    assert named <= targets


@pages
def test_lines_have_at_most_120_characters(page):
    """Tables, images and the lines that say where figures come from excepted."""
    exempt = re.compile(r"\||!\[|`benchmarks/results/")
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 120 or exempt.match(line) or page.parent.name == "reference", f"{number}: {line}"


@pages
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(
        r"`((?:flowmap|benchmarks|tests|examples|docs)/[\w/.*]+\.(?:py|json|md|png))`", page.read_text(encoding="utf-8")
    )
    for name in named:
        assert next(ROOT.glob(name), None) is not None, name


@pages
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize(("page", "maker"), [("recipes.md", "reference"), ("api.md", "api")])
def test_the_reference_is_that_of_the_code(page, maker, monkeypatch):
    made = module_of(ROOT / "docs/reference.py", monkeypatch)
    text = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    start, end = made.MARKERS
    committed = text.split(start)[1].split(end)[0].strip()
    assert committed == getattr(made, maker)(), "run `.venv/bin/python docs/reference.py --write`"


@pages
def test_figures_are_those_of_the_results(page, monkeypatch):
    fill = module_of(ROOT / "benchmarks/fill_docs.py", monkeypatch)
    text = page.read_text(encoding="utf-8")
    assert fill.filled(text, fill.results()) == text, "run `.venv/bin/python benchmarks/fill_docs.py`"


def test_a_block_is_filled_from_its_results_and_from_nothing_else(monkeypatch):
    fill = module_of(ROOT / "benchmarks/fill_docs.py", monkeypatch)
    text = "before\n<!-- figures:exactness -->\n| a |\n| --- |\n| ? |\n<!-- /figures -->\nafter\n"
    assert fill.filled(text, {}) == fill.filled(text, {"exactness": {"tables": {"another": {}}}}) == text
    once = fill.filled(text, {"exactness": {"columns": ["a", "b"], "rows": [["x", 1.23456]]}})
    assert "| x | 1.235 |" in once and "?" not in once and once.startswith("before\n") and once.endswith("after\n")
    assert fill.filled(once, {"exactness": {"columns": ["a", "b"], "rows": [["x", 1.23456]]}}) == once


def test_a_result_of_several_tables_fills_each_in_its_place(monkeypatch):
    fill = module_of(ROOT / "benchmarks/fill_docs.py", monkeypatch)
    made = {
        "tables": {
            "parity_teachers": {"columns": ["a"], "rows": [["x"]]},
            "parity_exports": {"columns": ["b"], "rows": [["y"]]},
        }
    }
    text = "".join(f"<!-- figures:{name} -->\n<!-- /figures -->\n" for name in made["tables"])
    first, second = fill.filled(text, dict.fromkeys(made["tables"], made)).split("<!-- /figures -->")[:2]
    assert (
        "| x |" in first and "| y |" not in first and "| y |" in second and "`benchmarks/results/parity.json`" in second
    )


def test_the_adversarial_stage_is_compared_within_each_seed(monkeypatch):
    """Two seeds in which the stage divides the distance by two and adds .1 of recall, and training on does nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/tables/adversarial.py", monkeypatch)
    row = lambda distance, recall: {
        "1": {"frechet_pixels": distance, "recall_pixels": recall, "frechet_pixels_train": distance / 10}
    }
    arms = lambda d: {"before": row(d, 0.5), "control": row(d, 0.5), "after": row(d / 2, 0.6)}
    runs = [{"student": arms(d), "floor": {"frechet_pixels": 0.1}} for d in (2.0, 4.0)]
    runs[0]["seconds a step"] = {"control": 0.1, "after": 0.25}
    found = made.tables(runs)
    assert found["few"]["rows"][2] == ["1", made.NAMES["after"], "1.5 (1 to 2)", "0.6"]
    assert (
        found["few"]["columns"] == ["steps", "", "frechet_pixels", "recall_pixels"]
        and len(found["ratios"]["rows"]) == 2
    )
    assert (
        found["train"]["columns"] == ["steps", "", "frechet_pixels_train"]
        and found["train"]["rows"][0][2] == "0.3 (0.2 to 0.4)"
    )
    half, same = ["times 0.5", "2 of 2"], ["times 1", "0 of 2"]
    assert found["ratios"]["rows"][0] == ["1", "frechet_pixels", *half, *same, *half]
    assert found["ratios"]["rows"][1][2:4] == ["+0.100 (+0.100 to +0.100)", "2 of 2"]
    assert found["cost"]["rows"] == [[made.NAMES["control"], "0.1", "", ""], [made.NAMES["after"], "0.25", "", ""]]
    fill = module_of(ROOT / "benchmarks/fill_docs.py", monkeypatch)
    text = "<!-- figures:adversarial_ratios -->\n<!-- /figures -->\n"
    assert "times 0.5" in fill.filled(text, {"adversarial_ratios": {"tables": found}})


def test_the_main_job_shows_held_out_figures_and_those_of_training(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/main_job.py", monkeypatch)
    row = lambda value: {"frechet_pixels": value, "frechet_pixels_train": value / 4}
    spread = {"frechet_pixels_std": 0.02, "frechet_pixels_train_std": 0.01}
    figures = lambda value: {
        "student": {"1": row(value)},
        "teacher": {"steps": 64, **row(0.5)},
        "floor": row(0.4) | spread,
    }
    runs = [
        {f"frechet{suffix}": made.rows_of(figures(v), f"frechet_pixels{suffix}") for suffix in made.SUFFIXES}
        for v in (1.0, 2.0, 3.0)
    ]
    assert made.over_seeds(runs, "frechet", "sizes") == [
        ["sizes", "student 1", 2.0, 1.0, 3.0, 4.0, 0.5],
        ["sizes", "teacher 64", 0.5, 0.5, 0.5, 1.0, 0.125],
        ["sizes", "floor", 0.4, 0.4, 0.4, 0.8, 0.1],
        ["sizes", "floor, standard deviation", 0.02, 0.02, 0.02, 0.04, 0.01],
    ]


def test_sentences_stand_beside_each_other_and_rows_that_a_seed_lacks_are_left_out(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/tables/language.py", monkeypatch)
    row = lambda perplexity, *first: {"calls": 20, "perplexity": perplexity} | ({"first": list(first)} if first else {})
    one = {
        "few": {"flow 20": row(10.0, "a|b", ""), "ayf 4": row(20.0, "c", "d")},
        "diffusion": {"diffusion 1000": row(9.0, "e", "f")},
    }
    found = made.tables([one, {"few": {"flow 20": row(30.0)}, "infill": {"flow 1": {"infilled_bleu": 1.0}}}])
    assert found["few"]["columns"] == ["", "calls", "perplexity"]
    assert found["few"]["rows"][0] == ["flow 20", "20", "20 (10 to 30)"] and found["few"]["rows"][2] == [
        "diffusion 1000",
        "20",
        "9",
    ]
    assert found["samples"] == {
        "columns": ["flow 20", "ayf 4", "diffusion 1000"],
        "rows": [["a/b", "c", "e"], ["(empty)", "d", "f"]],
    }
    assert found["infill"]["rows"] == [["flow 1", "1"]] and "edited" not in found
    tokens = {"tokens 4": {"calls": 4, "infilled_bleu": 2.0, "first": ["a"]}, "tokens, the flow": {"loss": 0.5}}
    found = made.tables([{"infill_tokens": tokens, "tags": {"tags 4": {"tag_hit": 0.25}}}])
    assert found["tokens"]["rows"] == [["tokens 4", "4", "2", ""], ["tokens, the flow", "", "", "0.5"]]
    assert found["tags"]["rows"] == [["tags 4", "0.25"]] and found["filled"]["rows"] == [["a"]]
    assert set(found) <= set(made.TOKEN_TABLES)


def test_networks_stand_beside_formats_and_refusals_by_their_reason(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/tables/parity.py", monkeypatch)
    readers = {"torch": "torch.export.load", "onnx": "onnxruntime", "lora": "diffusers"}
    found = {
        "Flux": {"torch": 0.0, "onnx": 1.26e-7, "lora": 2e-6},
        "dit": {"torch": 1e-7, "onnx": "no form", "lora": "no stock pipeline"},
        "edm2": {"torch": 0.0, "onnx": 0.0, "lora": "no stock pipeline"},
    }
    tables = made.format_tables(found, ["edm2", "dit", "later", "Flux"], readers)
    assert tables["parity_formats"]["rows"] == [
        ["loads in", *readers.values()],
        ["EDM2", "0", "0", "no"],
        ["our DiT", "1.0e-07", "no", "no"],
        ["Flux", "0", "1.3e-07", "2.0e-06"],
    ]
    assert tables["parity_refused"]["rows"] == [
        ["lora", "EDM2, our DiT", "no stock pipeline"],
        ["onnx", "our DiT", "no form"],
    ]


def test_what_quantising_costs_has_a_row_for_each_format_and_number_of_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/quantised.py", monkeypatch)
    keys = " ".join(made.METRICS["digits"]).split()
    row = lambda value: dict.fromkeys(keys, value)
    one = lambda value: {"student": {str(k): row(value) for k in made.STEPS}, "floor": row(0.5)}
    cost = {"weight_bytes": 2**20, "milliseconds": 3.0, "differences": dict.fromkeys("124", 0.25)}
    measured = {
        "float32": {"0": one(1.0) | {"teacher": {"steps": 64, **row(2.0)}}, "1": one(3.0)},
        "int8": {"0": one(1.5)},
        "nf4": {},  # not measured yet
    }
    columns, rows = made.rows_of(
        {"measured": measured, "costs": dict.fromkeys(("float32", "int8", "nf4"), cost)}, "digits"
    )
    assert columns[:3] == ["weights", "steps", keys[0]] and [line[:3] for line in rows] == [
        *(["float32", k, "2 (1 to 3)"] for k in made.STEPS),
        *(["int8", k, "1.5"] for k in made.STEPS),
        ["teacher", 64, "2"],
        ["real against real", "", "0.5"],
    ]
    assert rows[3][-3:] == [0.25, 1.0, 3.0]


def test_figures_by_steps_stand_side_by_side(monkeypatch):
    fill = module_of(ROOT / "benchmarks/fill_docs.py", monkeypatch)
    rows = [["ring", "flow map", k, 0.1 * k, 0.0, 1.0] for k in (1, 2)] + [
        ["ring", "real against real", 0, 0.05, 0.0, 1.0]
    ]
    lines, columns = fill.by_steps(rows)
    assert columns == ["data", "model", "1 step", "2 steps"]
    assert lines == [["ring", "flow map", 0.1, 0.2], ["ring", "real against real", 0.05, 0.05]]
    run = {"wall_seconds": 61.4, "peak_gib": 0.75}
    made = fill.block("main_job", {"rows": [["student 1", 1.0, 0.5, 2.0, 1.1]], "runs": [run, run]})
    assert "median ratio to teacher 64" in made and "2 seeds; wall time 61 to 61 s each" in made


def test_the_league_says_by_how_much_the_default_is_behind_seed_by_seed(monkeypatch):
    """Two seeds: b is the best at one step in both, at two steps in one; c, which has one seed, is not ranked."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/tables/league.py", monkeypatch)
    figures = {"a": [(2.0, 1.0), (2.2, 1.2)], "b": [(1.0, 0.8), (1.1, 1.25)], "c": [(0.1, 0.1)]}
    row = lambda one, two: {"1": {"d": one}, "2": {"d": two}}
    results = [
        {"recipe": name, "seed": i, "figures": row(*pair)}
        for name, pairs in figures.items()
        for i, pair in enumerate(pairs)
    ]
    said = {"median": 0.1, "least": 0.1, "most": 0.1, "count": 1}
    one = lambda name: {
        "figures": row(said, said),
        "cost": {},
        "diverged": 2 - len(figures[name]),
        "runs": 2,
        "no_time": 0,
    }
    found = {
        "metrics": ["d"],
        "terms": {"steps": [1, 2], "seeds": 2},
        "recipes": {name: one(name) for name in figures},
        "results": results,
    }
    assert "train" not in made.tables(found | {"beside": {}}, "a")
    rows = made.tables(found | {"beside": {"real against real": {"d": said}}}, "a")["best"]["rows"]
    assert rows[0] == [1, "b", "1.05 (1 to 1.1)", "2.1 (2 to 2.2)", "100", "no", "b"]
    assert rows[1] == [2, "b", "1.02 (0.8 to 1.25)", "1.1 (1 to 1.2)", "10.5 (-4 to 25)", "yes", ""]
    quality = made.tables(found | {"beside": {"real against real": {"d": said}}}, "a")["quality"]["rows"]
    assert quality[-1][:3] == ["real against real", "0.1", "0.1"] and quality[2][-1] == "1 of 2"


def test_every_mutation_still_finds_its_text(monkeypatch):
    """`make mutants` is run by hand; what it would refuse is found here."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = module_of(ROOT / "benchmarks/mutants.py", monkeypatch)
    changed = [made.mutated(mutant, (ROOT / "flowmap" / mutant.file).read_text()) for mutant in made.MUTANTS]
    assert len(changed) > 100 and all(changed)
    ours = (
        "import sys; sys.path.insert(0, 'benchmarks'); import mutants; "
        "print([name for name in sys.modules if name.startswith('flowmap')])"
    )
    told = subprocess.run([sys.executable, "-c", ours], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert told.strip() == "[]", "its processes would test the package as it is, not the mutated copy"

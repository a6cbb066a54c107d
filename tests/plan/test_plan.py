"""The dependencies of a recipe, in order: its trained autoencoder, the latents, the teacher on those latents."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.data import Digits, Encoded
from flowmap.data.outline import outline_of
from flowmap.estimate import dry_run
from flowmap.plan import resolved
from flowmap.plan.plan import Encoding, plan, resolve
from flowmap.prepare.encode import encode
from flowmap.recipe import read_recipe
from flowmap.recipe import recipe as reading

AUTOENCODER = """
data: {{kind: folder, root: {pictures}, size: 8}}
student: {{kind: autoencoder_kl, channels: [8, 8], latent_channels: 2, groups: 4}}
objective: {{kind: reconstruction}}
trainer: {{steps: 2, accelerator: cpu}}
log: {{wandb: false}}
"""
TEACHER = """
data: {{kind: encoded, images: {{kind: folder, root: {pictures}, size: 8}}, autoencoder: {{recipe: {folder}/ae.yaml}},
  batch_size: 4, held_out: 3}}
student: {{kind: dit, preset: nano, patch: 2}}
objective: {{kind: flow_matching}}
trainer: {{steps: 2, accelerator: cpu}}
metrics: [{{kind: frechet, features: pixels, images: 8}}]
evaluation: {{batch_size: 8}}
log: {{wandb: false, grid_images: 4}}
"""
STUDENT = """
base: teacher
teacher: {{card: {folder}/card.yaml}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd, warmup_steps: 1}}
data: {{batch_size: 2}}
evaluation: {{teacher_steps: 2}}
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 0, 255 - 25 * i)).save(pictures / f"{i}.png")
    for name, text in (("ae", AUTOENCODER), ("teacher", TEACHER), ("student", STUDENT)):
        (tmp_path / f"{name}.yaml").write_text(text.format(pictures=pictures, folder=tmp_path))
    (tmp_path / "card.yaml").write_text(f"kind: recipe\nrecipe: {tmp_path / 'teacher.yaml'}\nshape: [2, 4, 4]\n")
    return tmp_path


def test_autoencoder_then_latents_then_teacher_each_once(recipes):
    stages = plan(read_recipe(recipes / "student.yaml"), recipes / "run")
    assert [(type(stage).__name__, stage.recipe.name.split("-")[-1]) for stage in stages] == [
        ("ResolvedRun", "ae"), ("Encoding", "student"), ("ResolvedRun", "teacher"), ("ResolvedRun", "student"),
    ]  # fmt: skip
    of_teacher = plan(read_recipe(recipes / "teacher.yaml"), recipes / "run")
    assert (
        next(s for s in of_teacher if isinstance(s, Encoding)).folder == stages[1].folder
    )  # other batch sizes, the same latents
    other = resolve(read_recipe(recipes / "student.yaml", ["data.images.size=16"])).data
    assert other.root != str(stages[1].folder)


def test_fit_makes_all_of_it_once_and_the_student_carries_its_autoencoder(recipes, command):
    import flowmap

    code, out, err = command("fit", "--recipe", recipes / "student.yaml", "--out", recipes / "run")
    assert code == 0 and "[2/4]" in err and "teacher 2" in out, err
    student = flowmap.load_student(recipes / "run")
    assert student.config.autoencoder.source == "autoencoder" and student.sample(2).shape == (2, 3, 8, 8)
    assert student.sample(2, latents=True).shape == (2, 2, 4, 4)
    code, out, err = command("fit", "--recipe", recipes / "student.yaml", "--out", recipes / "run")
    assert code == 0 and err.count("complete in") == 4, err
    code, out, err = command("fit", "--recipe", recipes / "student.yaml", "--dry-run")
    assert code == 0 and out.count("complete") == 3 and "nothing is missing" in out, err
    assert command("evaluate", "--student", recipes / "run", "--steps", 1)[0] == 0


@pytest.mark.slow
def test_what_is_built_on_a_recipe_that_has_changed_is_made_anew(recipes, command):
    """The student's own recipe says the same, its teacher's teacher's does not."""
    fitted = ("fit", "--recipe", recipes / "student.yaml", "--out", recipes / "run")
    assert command(*fitted)[0] == 0
    before = (recipes / "ae.yaml").read_text()
    (recipes / "ae.yaml").write_text(before + "seed: 1\n")
    assert not any(stage.complete for stage in plan(read_recipe(recipes / "student.yaml"), recipes / "run"))
    code, _, err = command(*fitted)
    assert (
        code == 2
        and "holds a run of another recipe (first difference: the runs that it is built on, built_on.json" in err
    )
    code, _, err = command(*fitted, "--overwrite")
    assert code == 0 and "complete" not in err, err
    (recipes / "ae.yaml").write_text(before)  # what was made of it is still there
    assert [stage.complete for stage in plan(read_recipe(recipes / "student.yaml"), recipes / "run")] == [
        True,
        True,
        True,
        False,
    ]
    (recipes / "run/built_on.json").write_text("{")  # torn
    assert command(*fitted)[0] == 2
    (recipes / "run/built_on.json").unlink()  # of a version that did not write it
    code, _, err = command(*fitted)
    assert code == 0 and err.count("complete in") == 4


def test_before_anything_is_made(recipes, command):
    code, out, err = command("encode", "--recipe", recipes / "student.yaml")
    says = "student: data.autoencoder.recipe: 'ae' is not trained yet; `flowmap fit --recipe student` trains it first"
    assert code == 2 and says in err.replace(f"{recipes.name}-", "") and len(err.splitlines()) == 1
    code, out, err = command("fit", "--recipe", recipes / "student.yaml", "--dry-run")
    assert code == 0 and "nothing is missing" in out  # the pictures are there: fit makes the rest


def test_recipes_that_need_each_other_are_refused(recipes):
    (recipes / "ae.yaml").write_text((recipes / "student.yaml").read_text())
    with pytest.raises(RecipeError, match="in a loop"):
        plan(read_recipe(recipes / "student.yaml"), recipes / "run")


def test_a_run_is_found_by_what_it_holds_though_its_name_has_an_older_hash(tiny, tmp_path):
    import flowmap
    from flowmap.plan.run_folders import dependency_folder

    recipe, runs = read_recipe(tiny), tmp_path / "runs"
    flowmap.fit(recipe, runs / "tiny-01234567", log=lambda message: None)
    assert dependency_folder(recipe) == runs / "tiny-01234567"
    other = read_recipe(tiny, ["seed=1"])
    assert dependency_folder(other) == runs / f"tiny-{other.training_hash()}"


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "lediflow/emoji-ayf",
        "instaflow/digits",
        pytest.param("language/wordnet-edit-reflow", marks=pytest.mark.slow),
    ],
)
def test_each_distinct_recipe_is_read_once(name, monkeypatch, tmp_path):
    """By the plan, the checks and the dry run together."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    read, original = [], reading.read_recipe
    monkeypatch.setattr(
        reading, "read_recipe", lambda name, overrides=(): read.append((name, overrides)) or original(name, overrides)
    )
    recipe = original(name)
    monkeypatch.setattr(
        dry_run, "look", lambda *args, look=dry_run.look, **kwargs: look(*args, **kwargs | {"whole": False})
    )
    assert resolve(recipe, tmp_path / "run").stages
    dry_run.dry_run(recipe, None)
    assert read and len(read) == len(set(read)), [one for one in read if read.count(one) > 1]


@pytest.fixture
def counted(monkeypatch):
    """The recipes that are read by name, and the recipes for which a folder is looked up, with repetitions."""
    read, looked_up, original, found = [], [], reading.read_recipe, resolved.dependency_folder
    monkeypatch.setattr(
        reading, "read_recipe", lambda name, overrides=(): read.append((name, overrides)) or original(name, overrides)
    )
    monkeypatch.setattr(resolved, "dependency_folder", lambda one: looked_up.append(one.name) or found(one))
    return read, looked_up


def test_fit_reads_each_recipe_once_and_looks_up_each_folder_once(recipes, counted):
    """From the plan through the checks, encoding and building to the figures; the stages are built from one tree."""
    import flowmap

    read, looked_up = counted
    recipe = read_recipe(recipes / "student.yaml")
    flowmap.fit(recipe, recipes / "run", log=lambda message: None)
    assert sorted(name.rsplit("/")[-1] for name, _ in read) == ["ae.yaml", "teacher.yaml"]
    assert sorted(one.rsplit("-")[-1] for one in looked_up) == ["ae", "teacher"]


def test_building_reads_each_recipe_once(recipes, counted):
    import flowmap

    flowmap.fit(read_recipe(recipes / "student.yaml"), recipes / "run", log=lambda message: None)
    read, looked_up = counted
    read.clear(), looked_up.clear()
    run = resolve(read_recipe(recipes / "student.yaml"), recipes / "run")
    assert all(stage.complete for stage in run.stages)
    data = build_data(run)
    teacher = build_teacher(run, data)
    build_student(run, student_config(run, data, teacher), teacher)
    assert len(read) == len(looked_up) == 2


@pytest.mark.parametrize("name", ["instaflow/digits", "lediflow/digits-ayf"])
def test_the_dry_run_reads_each_data_set_once(name, monkeypatch, tmp_path):
    """Its stages differ in the settings of training alone, and some are named by several others."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    built, original = [], Digits.build
    monkeypatch.setattr(Digits, "build", lambda self: built.append(self) or original(self))
    recipe = read_recipe(name)
    stages = [stage for stage in resolve(recipe).stages if isinstance(stage.recipe.data, Digits)]
    assert len(stages) >= 3
    dry_run.dry_run(recipe, None)
    assert len(built) == 1


def test_the_dry_run_looks_once_for_an_encoding_that_is_not_there(recipes, monkeypatch):
    opened, original = [], Encoded.build
    monkeypatch.setattr(Encoded, "build", lambda self: opened.append(self.root) or original(self))
    lines = dry_run.dry_run(read_recipe(recipes / "student.yaml"), None)
    assert len(opened) == 1 and "nothing is missing" in lines[-1]


def test_the_outline_of_a_finished_encoding_is_that_of_its_index(recipes):
    recipe = read_recipe(recipes / "teacher.yaml", ["data.autoencoder=null", "metrics=[]"])
    for i in range(10):
        (recipes / "pictures" / f"kind-{i % 2}").mkdir(exist_ok=True)
        (recipes / "pictures" / f"{i}.png").rename(recipes / "pictures" / f"kind-{i % 2}" / f"{i}.png")
    before = resolve(recipe)
    assert before.outline is None
    encode(before.data, Path(before.data.root))
    found, read = resolve(recipe).outline, outline_of(build_data(resolve(recipe)))
    assert (found.shape, found.num_classes, found.class_names) == ((3, 8, 8), 2, ("kind-0", "kind-1"))
    assert (read.shape, read.num_classes, read.class_names) == (found.shape, found.num_classes, found.class_names)


def test_a_needed_run_is_one_object_also_for_a_run_with_changed_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    run = resolve(read_recipe("lediflow/digits-ayf"), tmp_path / "out")
    other = run.changed(seed=5)
    assert other.recipe.seed == 5 and run.recipe.seed == 0 and other.folder == run.folder == tmp_path / "out"
    assert other.teachers[0] is run.teachers[0] is run.stages[-2]
    assert run.teachers[0].priors[0] is run.priors[0] is run.of(run.priors[0].recipe)


def test_a_run_determines_each_member_once_and_is_its_own_last_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    run = resolve(read_recipe("lediflow/digits-ayf"))
    assert run.folder == tmp_path / "lediflow-digits-ayf" and run.stages[-1] is run and run.stages is run.stages
    assert [card.kind for card in run.cards] == ["recipe"] and run.cards is run.cards
    assert [one.name for one in run.teachers] == ["lediflow-digits"] and run.starts == run.pairs_cards == []
    assert run.prior.recipe == run.priors[0].name == "lediflow-digits-prior" and run.prior is run.prior
    assert run.net is not None and run.teacher_nets == [run.net] and not run.complete

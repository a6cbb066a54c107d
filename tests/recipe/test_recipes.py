"""Every shipped recipe is read, written and read back as the same recipe; mistakes are named with their full key."""

import pytest

from flowmap.base.schema import RecipeError
from flowmap.plan.cards import find_card, list_cards
from flowmap.plan.plan import plan
from flowmap.recipe.recipe import list_recipes, read_recipe, read_resolved


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_survives_its_own_text(name, tmp_path):
    recipe = read_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert read_resolved(path) == recipe
    assert read_resolved(path).hash() == recipe.hash()


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_has_a_plan(name, tmp_path):
    assert plan(read_recipe(name), tmp_path)[-1].recipe.name == name.replace("/", "-")


@pytest.mark.parametrize("name", list_cards())
def test_a_card_is_read(name):
    assert find_card(name).name == name.split("/")[-1]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objektive.kind=ayf_emd", "objektive: no such setting, did you mean 'objective'?"),
        ("objective.warmup_step=3", "objective.warmup_step: no such setting, did you mean 'warmup_steps'?"),
        ("objective.kind=ayf_emb", "objective.kind: no 'ayf_emb', did you mean 'ayf_emd'?"),
        ("objective.warmup_steps=many", "objective.warmup_steps: 'many' is not a whole number"),
        ("objective.warmup_steps=1.5", "objective.warmup_steps: 1.5 is not a whole number"),
        ("objective.r_max=2", "objective.r_max: 2.0 must lie in [0, 1]"),
        ("trainer.precision=fp8", "trainer.precision: 'fp8' is not one of 32, bf16"),
        ("teacher.card=digit", "teacher.card: no card 'digit', did you mean 'digits'?"),
        ("times.base.kind=intervall", "times.base.kind: no 'intervall', did you mean 'interval'?"),
        ("sampler.steps=[0]", "sampler.steps"),
        ("objective", "'objective' is not of the form key=value"),
        ("objective.norm=${nothing}", "nothing"),
    ],
)
def test_a_mistake_is_named(override, says, tmp_path):
    with pytest.raises(RecipeError, match=".") as caught:
        plan(read_recipe("digits", [override]), tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kind_that_changes_starts_afresh():
    recipe = read_recipe("digits", ["times.kind=uniform"])
    assert type(recipe.times).__name__ == "Uniform"


def test_recipes_in_a_loop_are_refused(tmp_path):
    card = tmp_path / "card.yaml"
    path = tmp_path / "looped.yaml"
    card.write_text(f"kind: recipe\nrecipe: {path}\n")
    path.write_text(
        "data: {kind: digits}\nstudent: {kind: from_teacher}\nobjective: {kind: ayf_emd}\n"
        f"teacher: {{card: {card}}}\n"
    )
    with pytest.raises(RecipeError, match="loop"):
        plan(read_recipe(path), tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00\x01", "data: 3"])
def test_a_file_that_is_no_recipe(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="bad.yaml"):
        read_recipe(path)


def test_a_file_of_settings_is_laid_over_a_recipe_before_single_ones(tmp_path):
    (tmp_path / "tiny.yaml").write_text("objective: {warmup_steps: 3}\ntrainer: {steps: 7}\ntimes: {kind: uniform}\n")
    recipe = read_recipe("digits", ["trainer.steps=9", f"+{tmp_path / 'tiny.yaml'}"])
    assert (recipe.objective.warmup_steps, recipe.trainer.steps, type(recipe.times).__name__) == (3, 9, "Uniform")
    assert recipe.objective.r_max == read_recipe("digits").objective.r_max and recipe.name == "digits"
    with pytest.raises(RecipeError, match="no file and no shipped recipe 'nowhere'"):
        read_recipe("digits", ["+nowhere"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=[1", "'seed=[1': while parsing a flow sequence"),
        ("seed={a", "while parsing a flow mapping"),
        ('name="', "while scanning a quoted scalar"),
        ("name=*a", "found undefined alias"),
        ("name=%", "while scanning a directive"),
        ("sampler.steps=" + "[" * 2000, "nesting depth"),
        ("metrics.x=2", "invalid literal"),
    ],
)
def test_an_override_that_is_no_yaml_is_one_line(override, says):
    with pytest.raises(RecipeError, match="command line: ") as caught:
        read_recipe("digits", [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3: x\n", "holds no setting of a recipe"),
        ("base: digits\ntrue: 1\n", "True: no such setting"),
        ("base: digits\nnull: 1\n", "cannot be read: KeyValidationError"),
        ("base: digits\ntrainer: {1.5: 1}\n", "trainer.1.5: no such setting"),
        ("base: digits\n? [1, 2]\n: 3\n", "is not YAML (line 2, column 3)"),
        ("base: [1]\n", "base: [1] is not the name or the path of a recipe"),
        ("base: {a: 1}\n", "base: {'a': 1} is not the name"),
        ("base:\n", "base: None is not the name"),
        ("base: digits\nseed: 1\nseed: 2\n", "is not YAML (line 3, column 1)"),
        ("base: digits\nseed: &a [*a]\n", "is not YAML (line 2, column 7)"),
    ],
)
def test_keys_that_are_no_text_and_a_base_that_is_no_name_are_one_line(text, says, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match="bad.yaml: ") as caught:
        read_recipe(tmp_path / "bad.yaml")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("objective.derivative=dual", "objective.derivative=ride"),
        ("prior.conditioning=false", "prior.told=false"),
    ],
)
def test_a_setting_under_its_old_name_is_the_same_recipe(new, old):
    """The names of version 0.1 are still read; a new name changes no hash."""
    base = "digits" if "objective" in new else "lediflow/digits"
    assert read_recipe(base, [new]) == read_recipe(base, [old])
    assert read_recipe(base, [new]).hash() == read_recipe(base, [old]).hash()


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(RecipeError, match="prior.conditioning: is given twice, also by its old name 'told'"):
        read_recipe("lediflow/digits", ["prior.told=true", "prior.conditioning=true"])

"""`base:` names one file or several, at any depth: a later one wins, the file last, and each mistake is one line."""

import pytest

from flowmap.base.outside import read_yaml
from flowmap.base.schema import RecipeError
from flowmap.recipe.composing import (
    MOST_DEEP,
    PARTS,
    TABLE,
    composed,
    find_recipe,
    header,
    list_parts,
    load,
    merge,
    shipped,
)
from flowmap.recipe.recipe import KEYS, list_recipes, read_recipe


@pytest.fixture
def write(tmp_path):
    """Writes recipes into one folder: write(mine="base: digits") gives the path of the last."""

    def files(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.yaml"

    return files


def refused(path, *says):
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in says), str(caught.value)


def test_a_later_base_wins_and_the_file_last(write):
    left, right = "seed: 1\ntrainer: {steps: 1, accumulate: 2}\n", "trainer: {steps: 3, devices: 4}\n"
    mine = write(left=left, right=right, mine="base: [left, right]\ntrainer: {devices: 5}\n")
    assert composed(mine, KEYS) == {"seed": 1, "trainer": {"steps": 3, "accumulate": 2, "devices": 5}}
    mine = write(left=left, right=right, mine="base: [right, left]\n")
    assert composed(mine, KEYS)["trainer"] == {"steps": 1, "accumulate": 2, "devices": 4}


def test_a_slot_of_another_kind_keeps_nothing_of_an_earlier_one(write):
    one, other = "objective: {kind: ayf_emd, warmup_steps: 7}\n", "objective: {kind: meanflow}\n"
    mine = write(one=one, other=other, mine="base: [one, other]\nobjective: {kind: ayf_emd, r_max: 1.0}\n")
    assert composed(mine, KEYS) == {"objective": {"kind": "ayf_emd", "r_max": 1.0}}
    mine = write(again="objective: {r_max: 0.5}\n", mine="base: [one, again]\n")
    assert composed(mine, KEYS) == {"objective": {"kind": "ayf_emd", "warmup_steps": 7, "r_max": 0.5}}


@pytest.mark.parametrize("depth", [1, 4, 50])
def test_any_depth(depth, write):
    texts = {f"level{i}": f"base: level{i - 1}\ntrainer: {{steps: {i}}}\n" for i in range(1, depth + 1)}
    assert read_recipe(write(level0="base: digits\nseed: 5\n", **texts)).trainer.steps == depth
    assert read_recipe(write(top=f"base: level{depth}\n")).seed == 5


def test_what_is_too_deep_and_what_branches_at_every_level_takes_no_time(write):
    texts = {f"deep{i}": f"base: deep{i + 1}\n" for i in range(2000)}
    refused(write(**texts).with_name("deep0.yaml"), f"deep0.yaml: base: has more than {MOST_DEEP} files")
    texts = {f"{side}{i}": f"base: [left{i + 1}, right{i + 1}]\n" for i in range(30) for side in ("left", "right")}
    top = write(
        left30="base: digits\n", right30="seed: 2\n", **texts, top="base: [left0, right0]\n"
    )  # a thousand million ways down
    assert read_recipe(top).seed == 2


def test_merging_is_associative_where_no_kind_changes():
    parts = [{"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": {"z": 1}}, {"a": {"x": 4}, "b": {"w": 5}}]
    assert (
        merge(merge(parts[0], parts[1]), parts[2]) == merge(parts[0], merge(parts[1], parts[2]))
        and merge({}, parts[0]) == parts[0]
    )


def test_the_name_is_the_files_and_not_a_bases(write):
    path = write(below="base: digits\nname: below\n", mine="base: below\n")
    assert read_recipe(path).name == f"{path.parent.name}-mine"
    assert read_recipe(write(mine="base: below\nname: my-own\n")).name == "my-own"


def test_shipped_parts_compose_and_are_no_recipes(write):
    assert list_parts() and not set(list_parts()) & set(list_recipes())
    assert all(name.split("/")[0] in PARTS for name in list_parts())
    mine = write(mine="base: [data/fashion14, method/scm.yaml]\nname: fashion14-scm\n")
    assert (read_recipe(mine).data.size, type(read_recipe(mine).objective).__name__) == (14, "SCM")
    assert read_recipe("digits", ["+method/scm"]) == read_recipe("digits-scm", ["name=digits"])


@pytest.mark.parametrize("name", list_parts())
def test_a_part_alone_is_refused(name):
    refused(name, f"{name}: is a part of recipes and none by itself", f"+{name}")
    assert header(find_recipe(name))


def test_a_file_of_settings_that_is_laid_over_has_its_bases(write, tmp_path):
    write(over="base: longer\nseed: 3\n", longer="trainer: {steps: 7}\n")
    recipe = read_recipe("digits", [f"+{tmp_path / 'over.yaml'}", "seed=4"])
    assert (recipe.trainer.steps, recipe.seed, recipe.name) == (7, 4, "digits")


def test_circles_are_refused_with_their_chain(write):
    path = write(alone="base: alone\n")
    refused(path, f"alone.yaml: base: {path} > {path} is a circle")
    refused(write(one="base: [digits, other]\n", other="base: one\n"), "one.yaml > ", "other.yaml is a circle")
    refused(write(top="base: one\n"), "top.yaml: base: ", "top.yaml > ", "one.yaml > ", "other.yaml > ")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("[]", "base: [] is not the name or the path of a recipe"),
        ("[[digits]]", "base: [['digits']] is not the name"),
        ("[digits, null]", "is not the name"),
        ("[digits, digits.yaml]", "base: 'digits.yaml' is there twice"),
        ("[digits, digitts]", "base: no file and no shipped recipe 'digitts', did you mean 'digits'?"),
        ("[data/digits, method/meanflo]", "did you mean 'method/meanflow'?"),
        ("???", "base: no file and no shipped recipe '???'"),
        ('""', "base: no file and no shipped recipe ''"),
        ('"a\\nb"', "base: no file and no shipped recipe 'a\\nb'"),
        (f'"{"a" * 5000}"', "base: no file and no shipped recipe"),
        ('"a\\0b"', "base: no file and no shipped recipe"),
        ("/", "base: no file and no shipped recipe '/'"),
    ],
)
def test_a_base_that_is_none(base, says, write):
    refused(write(mine=f"base: {base}\nseed: 1\n"), "mine.yaml: ", says)


def test_a_slip_within_a_base_names_its_file(write):
    refused(write(slip="trainer: {steps: [\n", mine="base: [digits, slip]\n"), "slip.yaml: is not YAML (line 2")
    refused(write(slip="nothing: 1\n", mine="base: [digits, slip]\n"), "slip.yaml: holds no setting of a recipe")


# ---------------------------------------------------------------- rows of the shipped tables


def shipped_tables():
    return sorted(shipped("recipes").rglob(TABLE))


@pytest.mark.parametrize("path", shipped_tables(), ids=lambda path: path.parent.name)
def test_a_row_is_found_and_read_as_a_file_of_its_name_would_be(path):
    names = set(list_recipes()) | set(list_parts())
    for row, settings in read_yaml(path).items():
        as_file = path.with_name(f"{row}.yaml")
        assert not as_file.exists(), "there is a file of that name as well"
        assert str(as_file.relative_to(shipped("recipes")).with_suffix("")) in names
        assert find_recipe(as_file) == as_file and load(as_file, KEYS) == settings and set(settings) <= {"base", *KEYS}


def test_a_row_has_the_name_and_the_header_of_a_file(monkeypatch):
    assert read_recipe("rfpp/a").name == "rfpp-a" == read_recipe("rfpp/a.yaml").name
    assert (
        header(find_recipe("rfpp/a"))[1].endswith("Run: flowmap fit --recipe rfpp/a")
        and len(header(find_recipe("rfpp/a"))) == 2
    )
    assert header(find_recipe("digits"))[0].startswith("Digits (8x8, real)")
    monkeypatch.chdir(shipped("recipes"))
    assert read_recipe("rfpp/a.yaml") == read_recipe("rfpp/a") and read_recipe("./digits-scm.yaml") == read_recipe(
        "digits-scm"
    )


@pytest.mark.parametrize("name", [*list_recipes(), *list_parts()])
def test_everything_shipped_has_a_header(name):
    assert header(find_recipe(name))[0]


def test_what_was_read_of_a_table_may_be_changed():
    load(find_recipe("digits-warm"), KEYS)["student"]["recipe"] = "another"
    assert load(find_recipe("digits-warm"), KEYS)["student"]["recipe"] == "digits-cmt"


def test_a_table_is_no_recipe_and_only_the_shipped_ones_have_rows(write, tmp_path):
    for name in ("table", "rfpp/table", shipped("recipes") / TABLE):
        refused(name, "table.yaml: ", "data, student, objective")
    write(table="mine: {base: digits}\n", theirs="base: mine\n")
    refused(tmp_path / "theirs.yaml", "base: no file and no shipped recipe 'mine'")
    refused(tmp_path / "mine.yaml", "no file and no shipped recipe")
    refused(shipped("recipes") / ".." / ".." / "a.yaml", "no file and no shipped recipe")

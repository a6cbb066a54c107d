"""No command overwrites a file that flowmap did not write.

If --out names such a file or folder, it is refused in one line and left unchanged.
"""

from __future__ import annotations

import shutil

import pytest
from conftest import bytes_of

from flowmap.convert.weights import import_weights


def mine(folder, *names):
    """A folder of the user's; each file holds its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} is mine")
    return folder


def assert_refused(command, folder, *arguments, says: str) -> None:
    before = bytes_of(folder)
    code, _, err = command(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("flowmap: warning")]
    assert code == 2 and len(lines) == 1 and says in lines[0], err
    assert bytes_of(folder) == before


@pytest.mark.parametrize(
    "names", [("README.md",), ("config.json", "README.md"), ("recipe.yaml", "main.py"), (".git/config",)]
)
def test_average_and_import_write_over_a_student_alone(finished, tmp_path, command, names):
    folder = mine(tmp_path / "mine", *names)
    assert_refused(command, folder, "average", "--run", finished, "--std", 0.07, "--out", folder, says="--out: ")
    with pytest.raises(ValueError, match="--out: "):
        import_weights(["nowhere.pkl"], folder)
    assert_refused(
        command,
        finished,
        "average",
        "--run",
        finished,
        "--std",
        0.07,
        "--out",
        finished / "student",
        says="the run's own student",
    )
    for _ in range(2):  # the second over the first
        assert command("average", "--run", finished, "--std", 0.07, "--out", tmp_path / "student")[0] == 0
    folder = mine(tmp_path / "student", "notes.md")
    assert_refused(
        command,
        folder,
        "average",
        "--run",
        finished,
        "--std",
        0.07,
        "--out",
        folder,
        says="notes.md, which is no part of a student",
    )


@pytest.mark.parametrize("text", ["a diary", "[1]", '{"mine": 1}', "3"])
def test_evaluate_writes_over_figures_alone(finished, tmp_path, command, text):
    path = tmp_path / "figures" / "figures.json"
    path.parent.mkdir()
    path.write_text(text)
    options = ("evaluate", "--student", finished, "--steps", 1, "--out", path)
    assert_refused(command, path.parent, *options, says="has no figures of a student")
    path.unlink()
    assert command(*options)[0] == 0 and command(*options)[0] == 0


def test_an_export_is_replaced_only_where_all_in_its_folder_is_its_own(finished, tmp_path, command):
    pytest.importorskip("diffusers")
    out = tmp_path / "out"
    options = ("export", "--student", finished, "--to", "torch", "--steps", 1, "--out", out)
    assert command(*options)[0] == 0 and command(*options, "--overwrite")[0] == 0
    for name in (".git/config", "notes.md"):
        mine(out, name)
        assert_refused(command, out, *options, "--overwrite", says=f"holds {name}, which no export wrote")
        shutil.rmtree(out / ".git", ignore_errors=True)


@pytest.mark.parametrize("name", ["index.json", "shard-00000.arrow", "shard-00003.json", "reference.safetensors"])
def test_data_on_disk_is_made_only_where_it_was_begun(tmp_path, command, name):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    recipe = tmp_path / "recipe.yaml"
    images = f"{{kind: folder, root: {tmp_path / 'pictures'}, size: 8}}"
    data = f"{{kind: encoded, images: {images}, held_out: 1, batch_size: 2}}"
    recipe.write_text(f"data: {data}\nstudent: {{kind: dit, preset: nano}}\nobjective: {{kind: flow_matching}}\n")
    folder = mine(tmp_path / "mine", name)
    assert_refused(
        command, folder, "encode", "--recipe", recipe, "--out", folder, says=f"holds {name} without a plan.json"
    )
    assert command("encode", "--recipe", recipe, "--out", tmp_path / "new")[0] == 0


@pytest.mark.parametrize("name", ["table.md", "quality.png"])
def test_a_comparison_writes_over_a_comparison_alone(tiny, tmp_path, command, name):
    folder = mine(tmp_path / "mine", name)
    options = ("compare", "--recipes", tiny, "--budget", 1, "--seeds", 1, "--steps", 1, "--out", folder)
    assert_refused(command, folder, *options, says=f"holds {name} and no compare.json")

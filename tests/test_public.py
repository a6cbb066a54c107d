"""The public names are functions, light to import, and stay what they are after everything is imported."""

import subprocess
import sys


def test_public_names_survive_the_import_of_the_modules_of_the_same_name():
    import flowmap
    import flowmap.evaluation.measure  # noqa: F401
    import flowmap.evaluation.samples  # noqa: F401
    import flowmap.train.fit  # noqa: F401

    for name in flowmap.__all__:
        assert callable(getattr(flowmap, name)) or name == "__version__", name
    from flowmap import evaluate, sample

    assert (
        evaluate is sys.modules["flowmap.evaluation.measure"].evaluate
        and sample is sys.modules["flowmap.evaluation.samples"].sample
    )


def test_import_flowmap_is_light(tmp_path):
    text = (
        "import sys, flowmap; "
        "print([n for n in ('torch', 'lightning', 'wandb', 'omegaconf', 'torchvision') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_version_is_the_distributions():
    import tomllib
    from pathlib import Path

    import flowmap

    assert (
        tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
        == flowmap.__version__
    )


def test_no_extra_has_the_name_of_a_dependency_and_those_of_w_and_b_are_tested():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not {line.split(">")[0] for line in project["dependencies"]} & set(extras)
    assert "panels" in extras["dev"][0] and "wandb-workspaces>=0.4" in extras["panels"]


def test_dir_shows_the_public_names():
    import flowmap

    assert dir(flowmap) == sorted(flowmap.__all__)

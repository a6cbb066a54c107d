"""The words around the verbs: help in groups, a mistyped verb, shell completion."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from flowmap.cli.parser import GROUPS, VERBS


def test_help_lists_each_verb_in_its_group_on_one_line(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    blocks = {part.splitlines()[0]: part.splitlines()[1:] for part in out.split("\n\n")}
    for group, verbs in GROUPS.items():
        assert [line.split()[0] for line in blocks[f"{group}:"]] == list(verbs)
    assert [line.split()[0] for line in blocks["options:"] if line[2] == "-"] == ["-h,", "--version", "--completion"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_describes_itself(command, verb):
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: flowmap {verb} ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fitt"], "no verb 'fitt', did you mean 'fit'?"),
        (["evalute", "--student", "x"], "no verb 'evalute', did you mean 'evaluate'?"),
        (["qqq"], "no verb 'qqq'; see `flowmap --help`"),
        ([], "the following arguments are required: VERB; see `flowmap --help`"),
        (["fit"], "the following arguments are required: --recipe; see `flowmap fit --help`"),
        (
            ["sample", "--student", "x", "--num", "two", "--out", "y"],
            "argument --num: invalid int value: 'two'; see `flowmap sample --help`",
        ),
        (["cite", "seed=3"], "unrecognized arguments: seed=3"),
        (["--completion", "fish"], "argument --completion: invalid choice: 'fish'"),
    ],
)
def test_a_mistake_in_the_words_is_one_line(command, arguments, says):
    code, out, err = command(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and err.startswith("flowmap: ") and says in err


# ---------------------------------------------------------------- completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="wants bash")
def test_bash_completes_verbs_options_and_recipes(command, tmp_path):
    pytest.importorskip("shtab")
    code, out, err = command("--completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "completion.bash").write_text(out)
    (tmp_path / "runs-of-mine").mkdir()
    for words, completed in (
        (["fi"], ["fit"]),
        (["fit", "--dry"], ["--dry-run"]),
        (["fit", "--recipe", "digits-meanf"], ["digits-meanflow"]),
        (["compare", "--recipes", "digits", "digits-meanf"], ["digits-meanflow"]),
        (["export", "--to", "di"], ["diffusers"]),
        (["sample", "--student", "runs-of"], ["runs-of-mine"]),
    ):
        script = "source completion.bash; COMPREPLY=()\n"
        script += f"COMP_WORDS=(flowmap {' '.join(words)}); COMP_CWORD={len(words)}\n"
        script += f"_shtab_flowmap flowmap {words[-1]}; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == completed, (words, done.stderr)


def test_zsh_completes_recipes_by_their_names(command):
    pytest.importorskip("shtab")
    code, out, _ = command("--completion", "zsh")
    assert code == 0 and out.startswith("#compdef flowmap") and "compadd -- " in out and " digits-meanflow " in out


def test_without_shtab_it_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = command("--completion", "bash")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "pip install 'flowmap-distillation[completion]'" in err

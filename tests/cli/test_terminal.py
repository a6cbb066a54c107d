"""Warnings as the command line shows them."""

from __future__ import annotations

import warnings

from flowmap.cli.terminal import plain_warnings, summary
from flowmap.train.card import figures_table


def test_a_warning_is_one_line_said_once(capsys, monkeypatch):
    with plain_warnings():
        warnings.simplefilter("always")
        for text in ("of two\n  lines", "of two lines", "another"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["flowmap: warning: of two lines", "flowmap: warning: another"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with plain_warnings():
        warnings.warn("of a child", stacklevel=1)
    assert not capsys.readouterr().err


def test_other_warnings_and_what_comes_after_are_as_python_has_them(capsys):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with plain_warnings():
            warnings.warn("of Python's", RuntimeWarning, stacklevel=1)
        warnings.warn("after", stacklevel=1)
    assert [str(one.message) for one in told] == ["of Python's", "after"] and not capsys.readouterr().err


def test_figures_stand_by_held_out_and_training_samples_with_the_spread_of_the_floor():
    row = lambda value: {"frechet_pixels": value, "frechet_pixels_train": value / 2}
    baseline = {
        "frechet_pixels": 0.5,
        "frechet_pixels_std": 0.01,
        "frechet_pixels_train": 0.25,
        "frechet_pixels_train_std": 0.02,
    }
    metrics = {"student": {"1": row(1.0)}, "teacher": {"steps": 64, "nfe": 64, **row(0.8)}, "floor": baseline}
    lines = [line.split() for line in summary(metrics).splitlines()]
    assert lines[0] == ["steps", "frechet_pixels", "frechet_pixels_train"]
    assert lines[1:] == [
        ["student", "1", "1", "0.5"],
        ["teacher", "64", "0.8", "0.4"],
        ["floor", "0.5", "0.25"],
        ["floor's", "spread", "0.01", "0.02"],
    ]
    card = "\n".join(figures_table(metrics))
    assert (
        "| floor, standard deviation | 0.01 | 0.02 |" in card
        and "those that end in `_train` are to training samples" in card
    )
    old = {"student": {"1": {"frechet_pixels": 1.0}}, "floor": {"frechet_pixels": 0.5}}
    assert "spread" not in summary(old) and "_train" not in "\n".join(figures_table(old))

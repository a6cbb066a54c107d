"""Warnings as the command line shows them."""

from __future__ import annotations

import warnings

from flowmap.terminal import plain_warnings


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

"""One file from many: only what is needed, in dependency order; what cannot be in one file is refused by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from flowmap.export.amalgamate import amalgamate


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, text): a module of that text that can be imported as flowmap.<name> for the time of the test."""
    import importlib.util

    def make(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"flowmap.{name}", path)
        made: ModuleType = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        return spec.name

    return make


LOW = '''"""Low."""
import math
import sys

#  a table
ROWS = {"a": 1}
LEFT_OUT = sys.path

def double(x):
    return 2 * x * ROWS["a"]

def unused():
    return math.pi
'''
HIGH = '''"""High."""
from __future__ import annotations

import math as m
from flowmap.low_part import double

class Thing:
    """A thing."""

    @staticmethod
    def value() -> float:
        from flowmap.low_part import ROWS as ROWS
        return double(m.floor(2.5)) + len(ROWS)
'''


def test_what_is_reached_stands_alone_and_runs(module):
    module("low_part", LOW)
    text = amalgamate([(module("high_part", HIGH), "Thing")], header="Made.", tail="RESULT = Thing.value()")
    made: dict = {}
    exec(compile(text, "made", "exec"), made)
    assert made["RESULT"] == 5
    assert "flowmap" not in text and "unused" not in text and "LEFT_OUT" not in text and "import sys" not in text
    assert (
        "#  a table\nROWS" in text
        and text.index("def double") < text.index("class Thing")
        and text.count("from __future__") == 1
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("from flowmap.low_part import double\nROWS = 3\ndef thing():\n    return double(ROWS)\n", "ROWS"),
        ("from flowmap.low_part import double as twice\ndef thing():\n    return twice(1)\n", "from ... import name"),
        ("print\ndef thing():\n    return 1\n", "top level"),
        (
            "import cmath as math\nfrom flowmap.low_part import unused\ndef thing():\n    return unused() + math.pi\n",
            "cannot stand in one file",
        ),
    ],
)
def test_what_cannot_stand_in_one_file_is_refused(module, text, words):
    module("low_part", LOW)
    with pytest.raises(ValueError, match=words):
        amalgamate([(module("high_part", text), "thing")], header="Made.")


def test_every_network_of_ours_has_a_source():
    pytest.importorskip("diffusers")
    from flowmap.export.custom import network_source, pipeline_source
    from flowmap.nets import NETS

    ours = [spec for name, spec in NETS.items() if name != "module"]  # a user's: its source is not flowmap's
    for text in [network_source(spec) for spec in ours] + [pipeline_source()]:
        compile(text, "made", "exec")
        assert "from flowmap" not in text and "def load_pretrained" not in text

"""A student's sampler, exported as an ONNX graph and run by onnxruntime, gives the student's samples for any batch."""

from __future__ import annotations

import builtins
from importlib.util import find_spec

import pytest
import torch

from flowmap.export import export
from flowmap.nets import MLP
from flowmap.samplers import Deterministic, Gamma
from flowmap.student.config import Pixels, StudentConfig
from tests.export.alone import shaken, snippet
from tests.export.test_program import FAMILIES, STUDENTS, rows, with_sentences
from tests.support import parity

TOLERANCE = 1e-4  # onnxruntime's kernels sum in another order than torch's, in float32


MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
installed = pytest.mark.skipif(bool(MISSING), reason=f"without {MISSING}: pip install 'flowmap-distillation[onnx]'")


CONVERTED = [name for name in STUDENTS if name != "table_unet"]  # of whose schedule torch.onnx lacks operations


def ran(session, noise, cond):
    given = {"noise": noise.numpy(), **{key: value.numpy() for key, value in cond.items()}}
    return torch.from_numpy(session.run(None, given)[0])


def worst(folder, student, steps, examples):
    """The graph's samples against the student's own, the largest over the examples: see parity.relative."""
    import onnxruntime

    session, found = onnxruntime.InferenceSession(folder / "program.onnx"), 0.0
    for noise, cond in examples:
        wanted = student.config.sampler(student.flow_map, noise, cond, steps=steps)
        wanted = wanted.clamp(-1, 1) if student.config.clamp else wanted
        found = max(found, parity.relative(ran(session, noise, cond), wanted))
    return found


def from_the_student(name, at):
    """The largest difference of that row of test_program.STUDENTS, exported to `at`."""
    steps, make = STUDENTS[name]
    student = make()
    folder = export(student, at / name, to="onnx", steps=steps)
    return worst(folder, student, steps, [rows(student, num) for num in (1, 2, 70)])


@installed
def test_a_graph_gives_the_students_samples_and_names_its_inputs(tmp_path):
    import onnx

    student = shaken(
        StudentConfig(
            MLP(width=16, depth=1), Deterministic(), (2,), num_classes=3, guidance=(1.0, 3.0, 1.5),
            samples=Pixels(clamp=False),
        )
    )  # fmt: skip
    folder = export(student, tmp_path / "out", to="onnx", steps=2)
    examples = [(torch.randn(num, 2), student.conditions(num, guidance=2.5)) for num in (1, 2, 70)]
    assert worst(folder, student, 2, examples) < TOLERANCE
    graph = onnx.load(folder / "program.onnx").graph
    sizes = {
        one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in graph.input
    }
    assert sizes == {"noise": ["batch", 2], "class": ["batch"], "guidance": ["batch"]}
    assert [one.name for one in graph.output] == ["samples"]
    card = (folder / "README.md").read_text()
    assert "# batch size: any\n" in card and "library_name: onnx\n" in card
    exec(snippet(folder), names := {})
    assert names["images"].shape == (3, 2), "the card's own lines run"


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_the_graph_of_every_kind_of_network_does(tmp_path, name):
    assert from_the_student(name, tmp_path) < TOLERANCE


@installed
@pytest.mark.slow
def test_a_graph_takes_what_the_students_own_text_encoder_gives(tmp_path):
    student = with_sentences("sd3", tmp_path / "bert", 16)
    folder = export(student, tmp_path / "out", to="onnx", steps=1)
    assert f"# batch size: {FAMILIES['sd3']}\n" in (folder / "README.md").read_text()
    exec(snippet(folder), names := {})
    assert names["images"].shape == (3, 4, 8, 8), "the card's own lines run"
    prompts = ["a blue cat", "a dog", "cat", "", "two cats"]
    examples = [(torch.randn(num, 4, 8, 8), student.conditions(num, {"prompt": prompts[:num]})) for num in (1, 3, 5)]
    assert worst(folder, student, 1, examples) < TOLERANCE


@installed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["pixart", "sd", "qwen"])
def test_tables_of_times_and_complex_numbers_have_no_onnx_form(tmp_path, family):
    what = "complex" if family == "qwen" else "(hypot|searchsorted)"
    with pytest.raises(ValueError, match=f"no ONNX form: .*{what}"):
        export(with_sentences(family, tmp_path / "bert", 16), tmp_path / "out", to="onnx", steps=1)
    assert not (tmp_path / "out").exists()


@installed
@pytest.mark.slow
def test_weights_that_do_not_fit_in_one_file_are_next_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.export.onnx.IN_ONE_FILE", 0)
    folder = export(student := mlp(Deterministic()), tmp_path / "out", to="onnx", steps=1)
    assert (folder / "program.onnx.data").is_file()
    assert worst(folder, student, 1, [(torch.randn(5, 2), {})]) < TOLERANCE


@installed
def test_an_operation_without_an_onnx_form_is_named(tmp_path):
    from flowmap.export.onnx import converted
    from flowmap.export.program import Traced, export_program

    class Odd(torch.nn.Module):
        def forward(self, noise, cond):
            return torch.special.bessel_j0(noise)

    program = export_program(Odd(), torch.randn(3, 2), {})
    with pytest.raises(ValueError, match="^--to onnx: this network has no ONNX form: .*bessel_j0") as found:
        converted(Traced(program, {}))
    assert "\n" not in str(found.value)


def mlp(sampler):
    return shaken(StudentConfig(MLP(width=16), sampler, (2,), samples=Pixels(clamp=False)))


@installed
def test_noise_between_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--steps 1"):
        export(mlp(Gamma()), tmp_path / "out", to="onnx", steps=2)
    assert not list(tmp_path.iterdir())


def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"^--to onnx: No module named 'onnxscript': pip install .*\[onnx\]'$"):
        export(mlp(Deterministic()), tmp_path / "out", to="onnx")
    assert not list(tmp_path.iterdir())

"""The compiled sampler draws what the ordinary one draws, compiles once, and says in one line where it cannot."""

from functools import partial

import pytest
import torch

from tests.student.test_student import built

OPTIONS = dict(steps=2, cond={"class": 2}, seed=3)


def with_backend(monkeypatch, backend):
    """Compile by a backend that needs no compiler."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def test_it_draws_the_same_and_compiles_once(monkeypatch):
    graphs = []
    with_backend(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph.forward)
    student = built()
    whole = student.sample(5, **OPTIONS)
    torch.testing.assert_close(student.sample(5, compile=True, **OPTIONS), whole)
    assert graphs
    graphs.clear()
    longer = OPTIONS | {"steps": 4}
    torch.testing.assert_close(student.sample(5, compile=True, **longer), student.sample(5, **longer))
    assert not graphs
    velocity = student.sample(5, compile=True, solver="heun", **OPTIONS)
    torch.testing.assert_close(velocity, student.sample(5, solver="heun", **OPTIONS))


def test_weights_that_change_are_sampled(monkeypatch):
    with_backend(monkeypatch, "eager")
    student = built()
    before = student.sample(5, compile=True, **OPTIONS)
    for parameter in student.parameters():
        parameter.data.mul_(0.5)
    after = student.sample(5, compile=True, **OPTIONS)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, student.sample(5, **OPTIONS))


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found\nand more lines")

    with_backend(monkeypatch, broken)
    with pytest.raises(ValueError, match="^compile: .*no C.. compiler was found.*$") as raised:
        built().sample(5, compile=True, **OPTIONS)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_inductor_draws_the_same_to_rounding():
    torch.compiler.reset()
    student = built()
    compiled = student.sample(5, compile=True, **OPTIONS)
    torch.testing.assert_close(compiled, student.sample(5, **OPTIONS), rtol=1e-4, atol=1e-5)

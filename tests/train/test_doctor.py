"""`flowmap doctor`: one step on the real network, what works and what does not, said in lines."""

import pytest
import torch
from torch import nn

from flowmap.nets.mlp import MLP


def test_it_says_what_each_derivative_costs(command, tiny):
    code, out, err = command("doctor", "--recipe", tiny, "--batch", 4)
    assert code == 0, err
    lines = out.splitlines()
    assert (
        "M parameters" in lines[0]
        and lines[1].startswith("teacher: 32 samples at 4 steps: mean ")
        and "(data " in lines[1]
    )
    assert lines[2].startswith("plain flow-matching step")
    assert [line.split(":")[0] for line in lines[3:6]] == [
        "derivative dual",
        "derivative difference",
        "derivative forward",
    ]
    assert "(1.00 of plain)" in lines[3] and lines[-1] == "choose objective.derivative=dual"


class Unridable(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, s, cond=None):
        out = self.net(x, t, s, cond)
        return out + Straight.apply(out)


class Straight(torch.autograd.Function):
    """No forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 0 * x

    @staticmethod
    def backward(ctx, g):
        return 0 * g


def test_it_names_the_operation_that_cannot_be_ridden(command, tiny, monkeypatch):
    built = MLP.build
    monkeypatch.setattr(MLP, "build", lambda *a, **k: Unridable(built(*a, **k)))
    code, out, err = command("doctor", "--recipe", tiny)
    assert code == 0, err
    ride = next(line for line in out.splitlines() if line.startswith("derivative dual"))
    assert "not here" in ride and "Straight" in ride
    assert out.splitlines()[-1] == "choose objective.derivative=difference"


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--batch", 0], "--batch: 0"), (["teacher.card=edm2-s-imagenet64"], "flowmap import")]
)
def test_mistakes_are_one_line(command, tiny, arguments, says):
    code, _, err = command("doctor", "--recipe", tiny, *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and says in err

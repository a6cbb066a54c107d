"""The residual perceptron: any sample shape, flattened, and enough to fit a map."""

import torch

from flowmap.flow.path import Linear
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.objectives import FlowMatching
from flowmap.teachers.exact import GaussianTeacher
from tests.support.oracle import draw, draw_times


def test_any_shape_is_taken_and_given_back_flattened():
    t, s = draw_times()
    torch.manual_seed(0)
    flat = MLP(width=16, depth=1).build((72,)).double()
    for shape in ((3, 4, 6), (72,), (8, 9)):
        torch.manual_seed(0)
        net = MLP(width=16, depth=1).build(shape).double()
        x = draw(5, *shape)
        assert net(x, t, s).shape == x.shape
        torch.testing.assert_close(net(x, t, s).flatten(1), flat(x.flatten(1), t, s))


def test_its_size_is_what_width_and_depth_say():
    net = MLP(width=16, depth=3).build((2,), arrival=False)
    count = sum(p.numel() for p in net.parameters())
    block = (16 * 32 + 32) + (32 * 16 + 16) + (16 * 32 + 32)
    assert count == 3 * block + (2 * 16 + 16) + (16 * 2 + 2) + (64 * 16 + 16) + (16 * 16 + 16)
    assert net.conditioning.arrival is net.conditioning.guidance is net.conditioning.label is None


def test_it_learns_a_velocity():
    """200 steps bring the error against the exact velocity of a Gaussian below a tenth of what it was."""
    teacher, (t, s) = GaussianTeacher(mean=(1.0, -0.5), std=0.5), draw_times(256)
    torch.manual_seed(0)
    student = FlowMapNet(MLP(width=32, depth=1).build((2,)).double())
    sample = Linear().sample(teacher.sample(256).double(), draw(256, 2), t, s)
    optimizer, first = torch.optim.Adam(student.parameters(), lr=1e-2), None
    for _ in range(200):
        optimizer.zero_grad()
        value = FlowMatching()(student, teacher, sample, 0).value
        first = first or float(value.detach())
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.1 * first

"""What only a CUDA device shows: fused attention in the dual forward, bf16, compile, a whole fit.

Skipped without one.
"""

import pytest
import torch

import flowmap
from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets import DiT
from flowmap.nets.flow_map import FlowMapNet
from flowmap.teachers.guidance import Autoguidance
from flowmap.teachers.network import NetworkTeacher
from flowmap.teachers.streams import may_overlap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def parts(seed: int = 0):
    torch.manual_seed(seed)
    student = FlowMapNet(DiT("tiny").build((4, 16, 16), num_classes=10)).cuda()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.05)
    x, v = torch.randn(5, 4, 16, 16, device="cuda"), torch.randn(5, 4, 16, 16, device="cuda")
    t = torch.rand(5, device="cuda")
    return student, (x, t, t * 0.3, v, {"class": torch.arange(5, device="cuda")})


def test_dual_equals_forward_mode():
    student, arguments = parts()
    value, rate = eulerian_derivative(student, *arguments, mode="dual")
    reference = eulerian_derivative(student, *arguments, mode="forward")
    torch.testing.assert_close(value, reference[0], rtol=1e-4, atol=1e-5)
    assert float((rate - reference[1]).norm() / reference[1].norm()) < 1e-3  # float32, two attention kernels


def test_dual_in_bf16_is_near_float32():
    student, arguments = parts()
    exact = eulerian_derivative(student, *arguments)[1]
    with torch.autocast("cuda", torch.bfloat16):
        value, rate = eulerian_derivative(student, *arguments)
    assert float((rate.float() - exact).norm() / exact.norm()) < 3e-2
    value.sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in student.parameters())


@pytest.mark.slow
def test_a_compiled_network_gives_what_it_gave():
    student, (x, t, s, _, cond) = parts()
    with torch.no_grad():
        before = student.mean_velocity(x, t, s, cond)
        student.net.compile()
        torch.testing.assert_close(student.mean_velocity(x, t, s, cond), before, rtol=1e-3, atol=1e-4)


def test_autoguidance_on_two_streams_is_that_in_turn():
    (strong, (x, t, _, _, cond)), (weak, _) = parts(), parts(seed=1)
    teacher = Autoguidance(NetworkTeacher(strong), NetworkTeacher(weak), default=2.0)
    assert may_overlap(x) and teacher._independent
    w_strong, w_weak = 2.0, 1 - 2.0
    for _ in range(20):  # a race would show in some of them
        in_turn = w_strong * teacher.strong.velocity(x, t, cond) + w_weak * teacher.weak.velocity(x, t, cond)
        assert torch.equal(teacher.velocity(x, t, cond), in_turn)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_fit_on_the_device(tiny, tmp_path, precision):
    recipe = flowmap.read_recipe(tiny, ["trainer.accelerator=gpu", f"trainer.precision={precision}"])
    run = flowmap.fit(recipe, tmp_path / "run")
    assert run.student.sample(4, steps=2).isfinite().all()

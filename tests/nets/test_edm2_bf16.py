"""EDM2 in bf16, with each of its time embeddings: values, tangent and gradients, near those in float32."""

import pytest
import torch

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.edm2 import EDM2
from flowmap.nets.flow_map import FlowMapNet


@pytest.mark.parametrize("embeds_t", [False, True])
def test_a_step_in_bf16_is_near_one_in_float32(embeds_t):
    torch.manual_seed(0)
    spec = EDM2(channels=8, multipliers=(1, 2), num_blocks=1, attention_at=(4,))
    spec = spec.embedding_t() if embeds_t else spec
    student = FlowMapNet(spec.build((4, 8, 8), num_classes=10, arrival=True, guidance=True))
    with torch.no_grad():
        for parameter in (p for p in student.parameters() if p.ndim == 0):
            parameter.fill_(0.5)
    x, v = torch.randn(2, 3, 4, 8, 8).unbind()
    t = torch.tensor([0.9, 0.5, 0.2])
    cond = {"class": torch.arange(3), "guidance": torch.ones(3)}
    value, rate = eulerian_derivative(student, x, t, t / 3, v, cond)
    with torch.autocast("cpu", torch.bfloat16):
        near, near_rate = eulerian_derivative(student, x, t, t / 3, v, cond)
    near.square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())
    for one, other in ((near, value), (near_rate, rate)):
        assert float((one - other).detach().norm() / other.detach().norm()) < 0.03

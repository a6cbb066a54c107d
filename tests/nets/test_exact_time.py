"""Networks that round time in bf16 embed the exact one: FLUX, FLUX.2, QwenImage and HunyuanImage."""

import copy

import pytest
import torch

from flowmap.flow.clock import FlowClock
from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.diffusers_model import DiffusersNet
from flowmap.nets.flow_map import FlowMapNet
from tests.support.tiny_nets import flux, flux2, hunyuan_image, qwen, with_random_weights

TIMES = torch.tensor([0.7003, 0.3337])
COND = {"text": torch.ones(2, 5, 32), "pooled": torch.ones(2, 24), "guidance": torch.tensor([3.507, 1.003])}
NETWORKS = {
    "flux": flux, "flux with guidance": lambda: flux(guidance_embeds=True), "qwen": qwen,
    "hunyuan_image": hunyuan_image, "flux2": flux2, "flux2 with guidance": lambda: flux2(guidance_embeds=True),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def net(request):
    torch.manual_seed(0)
    model = with_random_weights(NETWORKS[request.param]())
    return FlowMapNet(DiffusersNet(model, FlowClock(), "linear_velocity", arrival=True, guidance=False))


def projection_of(net: FlowMapNet):
    return next(module for name, module in net.named_modules() if name.endswith(".time_proj"))


def embedded(net: FlowMapNet) -> list[torch.Tensor]:
    """The numbers of which the model takes sinusoids in a call under bf16."""
    seen: list[torch.Tensor] = []
    projection = projection_of(net)
    handle = projection.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net.velocity(torch.zeros(2, 4, 8, 8), TIMES, COND)
    handle.remove()
    return seen


def test_no_number_is_rounded_in_bf16(net):
    scale = getattr(projection_of(net), "scale", 1)  # QwenImage multiplies by 1,000 there
    found = embedded(net)
    torch.testing.assert_close(found[0] * (scale / 1), 1000 * TIMES, rtol=1e-6, atol=0)
    for guidance in found[1:]:
        torch.testing.assert_close(guidance, 1000 * COND["guidance"], rtol=1e-6, atol=0)


def test_a_copy_embeds_its_own_time(net):
    embedded(net)
    other = copy.deepcopy(net)
    assert torch.equal(embedded(other)[0], embedded(net)[0])


def test_the_tangent_in_bf16_is_near_that_in_float32(net):
    torch.manual_seed(1)
    points = (torch.randn(2, 4, 8, 8), TIMES, TIMES / 3, torch.randn(2, 4, 8, 8), COND)
    exact = eulerian_derivative(net, *points)[1]
    with torch.autocast("cpu", torch.bfloat16):
        near = eulerian_derivative(net, *points)[1]
    assert float((near - exact).norm() / exact.norm()) < 0.05

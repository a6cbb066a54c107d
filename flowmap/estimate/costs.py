"""Cost of a network without its weights: parameters, FLOPs of its passes, bytes kept for the backward pass.

One forward and one backward pass run on the meta device, where tensors have shapes but no values. FLOPs are those of
matrix products, convolutions and attention, two for each multiply-add. Attention counts as in the fused kernels: no
matrix of tokens by tokens is kept, and the scores that the backward pass recomputes do not count.
"""

from __future__ import annotations

import weakref
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowmap.estimate.attention import fused_attention
from flowmap.estimate.flops import Flops
from flowmap.estimate.networks import nameless, shared_outline
from flowmap.estimate.remembered import tensors_in
from flowmap.flow.prior import FlowCodes, Learned, MixtureCodes
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.text_joint import TextJoint
from flowmap.objectives.adversarial import Adversarial, discriminator_loss, generator_loss
from flowmap.plan.plan import ResolvedRun
from flowmap.student.config import StudentConfig
from flowmap.student.examples import conditions_of
from flowmap.student.prior import auxiliary


@dataclass(frozen=True)
class Cost:
    """FLOPs, memory and parameters of a network.

    flops, backward_flops: of one sample; those that checkpointing recomputes are among the latter. kept_bytes,
    shared_bytes: kept between the passes in float32, for each sample and for a batch of any size. trained, frozen:
    numbers of parameters.
    """

    flops: float
    backward_flops: float
    kept_bytes: float
    shared_bytes: float
    trained: int
    frozen: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def cost_of(
    config: StudentConfig, *, graded: bool = True, checkpointing: bool = False, built: FlowMapNet | None = None
) -> Cost:
    """Return the cost of a student's network, counted on the meta device.

    graded: count the backward pass too. built: the network, if its builder has made it. Raises ValueError if the
    network cannot be built.
    """
    if isinstance(joint := config.net, TextJoint):
        coder = replace(joint.autoencoder, vocab=joint.vocab, special=joint.special)
        each = (
            StudentConfig(coder, config.sampler, config.shape, arrival=False),
            replace(config, net=joint.flow, shape=joint.latent_shape),
        )
        parts = [astuple(cost_of(one, graded=graded, checkpointing=checkpointing)) for one in each]
        return Cost(*map(sum, zip(*parts, strict=True)))
    key = (nameless(config), graded, checkpointing)
    if key not in _COUNTED:
        _COUNTED[key] = _counted(shared_outline(config) if built is None else built, *key)
    return _COUNTED[key]


_COUNTED: dict[tuple[StudentConfig, bool, bool], Cost] = {}  # what was counted in this process


def _counted(flow_map: FlowMapNet, config: StudentConfig, graded: bool, checkpointing: bool) -> Cost:
    trained = sum(p.numel() for p in flow_map.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in flow_map.parameters()) - trained
    net = flow_map.net
    if not graded:
        with torch.no_grad():
            return Cost(_forward(net, config, 1)[1].count, 0, 0, 0, trained, frozen)
    flow_map.checkpoint_activations(checkpointing)
    (first, one), (second, two) = (_forward(net, config, rows) for rows in (1, 2))
    kept_by_one, kept_by_two = (sum(found.sizes.values()) for found in (one, two))
    forward, kept = two.count - one.count, kept_by_two - kept_by_one
    backward = _backward(net, second)
    # Where every product of the forward pass is of samples, so is every product of the backward pass.
    backward = backward // 2 if forward == one.count else backward - _backward(net, first)
    flow_map.checkpoint_activations(False)
    return Cost(forward, backward, kept, max(kept_by_one - kept, 0), trained, frozen)


def start_flops(run: ResolvedRun, shape: tuple[int, ...]) -> float:
    """Return the FLOPs of one starting point of sampling: decoder of the auxiliary model and sampler of codes.

    It is 0 for the Gaussian prior.
    """
    prior = run.recipe.prior
    if not isinstance(prior, Learned):
        return 0.0
    trained, *flow = (one.recipe for one in run.priors)
    spec, codes = auxiliary(trained.student), prior.z
    size = spec.size
    with torch.device("meta"):
        net: Any = spec.build(shape)
        z = torch.zeros(1, size)
        with torch.no_grad(), fused_attention(), Flops() as counter:
            net.decode(z)
    flops = counter.count + (2.0 * size**2 if isinstance(codes, MixtureCodes) else 0.0)
    for one in flow:  # Heun takes two calls a step.
        assert isinstance(codes, FlowCodes)
        config = StudentConfig(one.student, one.sampler, (size,), arrival=False)
        flops += 2 * codes.steps * cost_of(config, graded=False).flops
    return flops


def discriminator_cost(net: nn.Module, config: StudentConfig, objective: Adversarial) -> Cost:
    """Return a discriminator's share of a step, counted on the meta device.

    Its flops are of both losses with their penalties and backward passes.
    """
    one, two = (_judged(net, config, objective, rows) for rows in (1, 2))
    flops, kept = (b - a for a, b in zip(one, two, strict=True))
    return Cost(flops, 0, kept, max(one[1] - kept, 0), sum(p.numel() for p in net.parameters()), 0)


def _judged(net: nn.Module, config: StudentConfig, objective: Adversarial, rows: int) -> tuple[int, int]:
    """Return FLOPs of a batch, and bytes kept for the backward pass of the discriminator's loss."""
    with torch.device("meta"):
        real, fake, noise = (torch.zeros(rows, *config.shape) for _ in range(3))
        cond = {"class": torch.zeros(rows, dtype=torch.int64)} if config.num_classes else {}
    there = [real, fake, noise, *cond.values(), *net.parameters()]
    with torch.device("meta"):
        with Flops() as generator:
            generator_loss(net, real, fake.requires_grad_(), cond, noise).backward()
            net.zero_grad(set_to_none=True)
        with _Kept(there) as forward:
            loss = discriminator_loss(net, real, fake.detach(), cond, noise, r1=objective.r1, r2=objective.r2)
        bytes_kept = sum(forward.sizes.values())
        with Flops() as backward:
            loss.value.backward()
    return generator.count + forward.count + backward.count, bytes_kept


def _forward(net: nn.Module, config: StudentConfig, rows: int) -> tuple[Tensor, _Kept]:
    """Return the network's output for a batch, and what its forward pass took."""
    with torch.device("meta"):
        x, t, cond = torch.zeros(rows, *config.shape), torch.zeros(rows), conditions_of(config, rows)
        with fused_attention(), _Kept([x, t, *cond.values(), *net.parameters(), *net.buffers()]) as kept:
            out = net(x, t, t, cond)
    return out, kept


def _backward(net: nn.Module, out: Tensor) -> int:
    """Return the FLOPs of the backward pass."""
    with torch.device("meta"), fused_attention(), Flops() as counter:
        out.sum().backward()
    net.zero_grad(set_to_none=True)
    return counter.count


class _Kept(Flops):
    """Also track the storages that are allocated: `sizes` are the bytes of those alive, except tensors of before."""

    def __init__(self, there: list[Tensor]):
        super().__init__()
        self.there = {tensor.untyped_storage()._cdata for tensor in there}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.there and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        return out

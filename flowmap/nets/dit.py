"""A diffusion transformer for pixels or latents: adaLN-zero, RMS norms, query-key norm, SwiGLU.

Source: Peebles and Xie 2022, arXiv:2212.09748 (block, sizes S to XL); all layers pass forward-mode AD, compile,
autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowmap.base.ranges import Cycles, Depth, Heads, Range, Ratio, Width, check_ranges
from flowmap.base.schema import added
from flowmap.flow.policy import mean_velocity
from flowmap.nets.embed import Conditioning, ExtraCondition, TokenEmbeddings, split_by_kind
from flowmap.nets.policy import Points, repeated
from flowmap.nets.prediction import as_velocity, check_prediction

#          width depth heads
PRESETS = {
    "nano": (64, 3, 2),
    "tiny": (96, 4, 3),
    "mini": (192, 6, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclass(frozen=True)
class DiT:
    """Settings of a diffusion transformer; width, depth and heads come from the preset unless given.

    arrival_blocks: the number of last blocks that see the arrival time; null for all. The first blocks then see a
    velocity's conditions, and a derivative in the arrival time alone begins after them. After Decoupled MeanFlow, known
    from reviews only; there the last blocks see the arrival in place of the departure, here both.
    prediction: what its output is, the mean "velocity" or the "data" (prediction.py). points: the number of outputs;
    two or more are a policy (flow/policy.py), for objective pi_flow.
    """

    preset: str = "tiny"
    patch: Annotated[int, Range(1, 1024)] = 2
    width: Width | None = None
    depth: Depth | None = None
    heads: Heads | None = None
    mlp_ratio: Ratio = 8 / 3
    cycles: Cycles = 4.0
    arrival_blocks: Depth | None = added(None)
    prediction: str = added("velocity")
    points: Points = added(1)
    takes_extra_conditions: ClassVar[bool] = True
    attends_to_tokens: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        check_prediction(self.prediction)
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        width, depth, heads = self.sizes
        if width % (4 * heads):
            raise ValueError(f"width: {width} is not a multiple of 4 x heads ({heads})")
        if (self.arrival_blocks or 1) > depth:
            raise ValueError(f"arrival_blocks: {self.arrival_blocks} must be at most the depth, {depth}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        width, depth, heads = PRESETS[self.preset]
        return self.width or width, self.depth or depth, self.heads or heads

    def build(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        arrival: bool = True,
        guidance: bool = False,
        extra_conditions: Sequence[ExtraCondition] = (),
    ) -> nn.Module:
        if len(shape) != 3 or shape[1] % self.patch or shape[2] % self.patch:
            what = f"a sample of shape {tuple(shape)} (channels, height, width)"
            raise ValueError(f"patch: {self.patch} does not divide {what}")
        return DiTNet(self, shape, num_classes, arrival, guidance, extra_conditions)


class DiTNet(nn.Module):
    """F(x, t, s, cond) for x (B, C, H, W).

    Conditions of kind "tokens" go before the patches, through the same blocks; padding is masked in attention.
    """

    def __init__(
        self,
        spec: DiT,
        shape: tuple[int, int, int],
        num_classes: int | None,
        arrival: bool,
        guidance: bool,
        extra_conditions: Sequence[ExtraCondition] = (),
    ):
        super().__init__()
        width, depth, heads = spec.sizes
        self.shape, self.patch, self.arrival_blocks = shape, spec.patch, spec.arrival_blocks
        self.prediction, self.points = spec.prediction, spec.points
        self.grid = (shape[1] // spec.patch, shape[2] // spec.patch)
        size = shape[0] * spec.patch**2
        self.enter = nn.Linear(size, width)
        self.position = nn.Parameter(sine_positions(*self.grid, width))
        options: dict[str, Any] = dict(num_classes=num_classes, arrival=arrival, guidance=guidance)
        summed, tokens = split_by_kind(extra_conditions)
        self.conditioning = Conditioning(width, cycles=spec.cycles, extra_conditions=summed, **options)
        self.tokens = TokenEmbeddings(tokens, width) if tokens else None
        self.blocks = nn.ModuleList(Block(width, heads, spec.mlp_ratio) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, self.points * size)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.activation_checkpointing = False

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        if self.points > 1:
            return mean_velocity(self.policy(x, t, s, cond), t, s)
        return as_velocity(self.prediction, self._output(x, t, s, cond), x, t)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond=None) -> Tensor:
        """The velocities (B, points, C, H, W) of the policy."""
        out = self._output(x, t, s, cond).unflatten(1, (self.points, self.shape[0]))
        return as_velocity(self.prediction, out, x.unsqueeze(1), t)

    def with_points(self, points: int) -> DiTNet:
        """The same network with that many equal outputs."""
        return repeated(self, points)

    def _output(self, x: Tensor, t: Tensor, s: Tensor, cond) -> Tensor:
        c = early = F.silu(self.conditioning(t, s, cond)).to(x.dtype)
        first = 0 if self.arrival_blocks is None else max(0, len(self.blocks) - self.arrival_blocks)
        if first:
            early = F.silu(self.conditioning(t, s, cond, with_arrival=False)).to(x.dtype)
        h, mask = self._with_tokens(self.enter(self._patches(x)) + self.position, cond)
        for index, block in enumerate(self.blocks):
            seen = early if index < first else c
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, seen, mask, use_reentrant=False)
            else:
                h = block(h, seen, mask)
        h = h if mask is None else h[:, -self.position.shape[1] :]
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, -1)
        return self._image(self.leave(torch.addcmul(shift, _norm(h), 1 + scale)))

    def _with_tokens(self, h: Tensor, cond) -> tuple[Tensor, Tensor | None]:
        """The patches h (B, N, width) after the conditions' tokens, and attention's mask (B, 1, 1, L + N), if any."""
        found = None if self.tokens is None else self.tokens(cond, len(h))
        if found is None:
            return h, None
        tokens, real = found
        patches = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return torch.cat([tokens.to(h.dtype), h], 1), torch.cat([real, patches], 1)[:, None, None]

    def without_blocks(self, skip: tuple[int, ...]) -> DiTNet:
        """The same network without some blocks, with shared weights: a weak model for autoguidance."""
        if any(not 0 <= i < len(self.blocks) for i in skip):
            raise ValueError(f"skip_blocks: {tuple(skip)} must lie in 0..{len(self.blocks) - 1}")
        weak = copy.copy(self)
        weak._modules = dict(self._modules)
        weak.blocks = nn.ModuleList(block for i, block in enumerate(self.blocks) if i not in skip)
        return weak

    def _patches(self, x: Tensor) -> Tensor:
        (rows, columns), p = self.grid, self.patch
        x = x.reshape(x.shape[0], self.shape[0], rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], rows * columns, -1)

    def _image(self, h: Tensor) -> Tensor:
        (rows, columns), p, channels = self.grid, self.patch, self.points * self.shape[0]
        h = h.reshape(h.shape[0], rows, columns, channels, p, p)
        return h.permute(0, 3, 1, 4, 2, 5).reshape(h.shape[0], channels, *self.shape[1:])


class Block(nn.Module):
    """Attention and SwiGLU, each scaled, shifted and gated by the conditioning; initially the identity.

    mask: which tokens are attended to, (B, 1, 1, N) bool; None for all.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        hidden = 8 * round(width * mlp_ratio / 8)  # tensor cores need multiples of 8
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).unsqueeze(1).chunk(6, -1)
        h = torch.addcmul(h, gate_a, self._attend(torch.addcmul(shift_a, _norm(h), 1 + scale_a), mask))
        value, gate = self.up(torch.addcmul(shift_m, _norm(h), 1 + scale_m)).chunk(2, -1)
        return torch.addcmul(h, gate_m, self.down(value * F.silu(gate)))

    def _attend(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = h.shape
        qkv = self.qkv(h).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(_norm(q).to(v.dtype), _norm(k).to(v.dtype), v, attn_mask=mask)
        return self.merge(h.transpose(1, 2).reshape(batch, tokens, width))


def _norm(h: Tensor) -> Tensor:
    return F.rms_norm(h, (h.shape[-1],), eps=1e-6)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """(1, rows * columns, width): half of the channels encode the row, half the column."""
    # explicit, since torch.device("meta") does not reach linspace and arange after transformers 5 has patched them
    here = torch.get_default_device()
    octaves = torch.exp2(-torch.linspace(0, 6, width // 4, device=here))
    y, x = torch.meshgrid(torch.arange(rows, device=here), torch.arange(columns, device=here), indexing="ij")
    angle = torch.cat([y.reshape(-1, 1) * octaves, x.reshape(-1, 1) * octaves], -1)
    return torch.cat([angle.sin(), angle.cos()], -1).unsqueeze(0)

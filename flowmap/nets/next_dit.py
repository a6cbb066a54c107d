"""The forward of Z-Image and of Lumina 2 on a whole batch: the layers of diffusers' networks, without its lists.

diffusers' forward of these networks takes the length of each caption from the device, makes a sequence for each
sample, and turns queries and keys as complex numbers. Here lengths are positions and masks, and numbers are real: one
shape for all captions, which torch.compile and ONNX can capture. (len() of a tensor would be a constant to them.)
Tests compare the two. Both networks attend to the tokens of the picture and of the caption together, after a few
blocks of their own; the position of a token has three axes, (place in the caption, row, column).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 32  # Z-Image pads a caption and a picture to a multiple of so many tokens, and attends to the padding


class RealRotary:
    """diffusers' attention of these networks for rotations (cos, sin), each (B, tokens, 1, head width / 2)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotation = freqs_cis if image_rotary_emb is None else image_rotary_emb
        width = attn.inner_dim // attn.heads
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, width)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = turned(query if attn.norm_q is None else attn.norm_q(query), rotation)
        key = turned(key if attn.norm_k is None else attn.norm_k(key), rotation)
        if (repeats := attn.heads // key.shape[2]) > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def turned(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Each pair of neighbouring numbers of x (B, tokens, heads, width), turned by its angle, in float32."""
    if rotation is None:
        return x
    (cos, sin), (a, b) = rotation, x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


def rotation_of(places: Tensor, widths: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, tokens, 1, sum of widths / 2), of tokens at the places (B, tokens, axes)."""
    angles = []
    for axis, width in enumerate(widths):
        power = torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width
        angles.append(places[..., axis, None].float() * theta**-power)
    angle = torch.cat(angles, -1).unsqueeze(2)
    return angle.cos(), angle.sin()


def patches(x: Tensor, size: int) -> Tensor:
    """(B, C, size rows, size columns) -> (B, rows columns, size size C)."""
    x = x.unflatten(-2, (-1, size)).unflatten(-1, (-1, size))  # B, C, rows, size, columns, size
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def picture(tokens: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """The inverse of patches."""
    x = tokens.unflatten(1, (rows, columns)).unflatten(-1, (size, size, -1))  # B, rows, columns, size, size, C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def lengths(text: Tensor, mask: Tensor | None) -> Tensor:
    """The number of real tokens (B, 1); masked ones are after them."""
    if mask is None:
        return torch.full((text.shape[0], 1), text.shape[1], device=text.device)
    return mask.sum(1, keepdim=True)


def places_of_picture(start: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows columns, 3): the places of a picture that follows captions which end at start (B, 1)."""
    grid = torch.cartesian_prod(*(torch.arange(n, device=start.device) for n in (rows, columns)))
    grid = grid.expand(start.shape[0], -1, -1)
    return torch.cat([start.unsqueeze(-1).expand(-1, grid.shape[1], 1), grid], -1)


def places_of_caption(index: Tensor, batch: int) -> Tensor:
    """(B, tokens, 3): the place of each token on the first axis."""
    return F.pad(index.view(1, -1, 1), (0, 2)).expand(batch, -1, -1)


def through(net: Any, layers: Any, x: Tensor, *conditions: Any) -> Tensor:
    """x after these blocks, checkpointed where the network's own forward would."""
    for layer in layers:
        if torch.is_grad_enabled() and net.gradient_checkpointing:
            x = net._gradient_checkpointing_func(layer, x, *conditions)
        else:
            x = layer(x, *conditions)
    return x


def z_image(net: Any, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """The output (B, C, H, W) of a ZImageTransformer2DModel at its own time (B,), from 0 at noise to 1 at data."""
    emb = net.t_embedder(time * net.t_scale).type_as(x)
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    count, size = lengths(text, mask), rows * columns
    padded = count + -count % MULTIPLE
    caption = F.pad(net.cap_embedder(text), (0, 0, 0, -text.shape[1] % MULTIPLE))
    index = torch.arange(caption.shape[1], device=x.device)
    caption = torch.where((index < count).unsqueeze(-1), caption, net.cap_pad_token.type_as(caption))
    seen = None if mask is None else index < padded
    turn = lambda places: rotation_of(places, tuple(net.axes_dims), net.rope_theta)
    of_caption, of_picture = places_of_caption(index + 1, x.shape[0]), places_of_picture(padded + 1, rows, columns)
    extra = -size % MULTIPLE
    of_picture = F.pad(of_picture, (0, 0, 0, extra))
    tokens = net.all_x_embedder["2-1"](patches(x, 2))
    tokens = torch.cat([tokens, net.x_pad_token.type_as(tokens).expand(x.shape[0], extra, -1)], 1)
    tokens = through(net, net.noise_refiner, tokens, None, turn(of_picture), emb)
    caption = through(net, net.context_refiner, caption, seen, turn(of_caption))
    everywhere = torch.cat([of_picture, of_caption], 1)
    both = None if seen is None else F.pad(seen, (tokens.shape[1], 0), value=True)
    tokens = through(net, net.layers, torch.cat([tokens, caption], 1), both, turn(everywhere), emb)
    return picture(net.all_final_layer["2-1"](tokens[:, :size], c=emb), rows, columns, 2)


def lumina2(net: Any, x: Tensor, time: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """The output (B, C, H, W) of a Lumina2Transformer2DModel at its own time (B,), from 0 at noise to 1 at data."""
    size, rope = net.config.patch_size, net.rope_embedder
    emb, caption = net.time_caption_embed(x, time, text)
    rows, columns = x.shape[-2] // size, x.shape[-1] // size
    index, count = torch.arange(text.shape[1], device=x.device), lengths(text, mask)
    of_caption, of_picture = places_of_caption(index, x.shape[0]), places_of_picture(count, rows, columns)
    seen = None if mask is None else mask.bool()
    turn = lambda places: rotation_of(places, tuple(rope.axes_dim), rope.theta)
    caption = through(net, net.context_refiner, caption, seen, turn(of_caption))
    tokens = through(net, net.noise_refiner, net.x_embedder(patches(x, size)), None, turn(of_picture), emb)
    both = None if seen is None else F.pad(seen, (0, tokens.shape[1]), value=True)
    everywhere = torch.cat([of_caption, of_picture], 1)
    tokens = through(net, net.layers, torch.cat([caption, tokens], 1), both, turn(everywhere), emb)
    return picture(net.norm_out(tokens[:, text.shape[1] :], emb), rows, columns, size)

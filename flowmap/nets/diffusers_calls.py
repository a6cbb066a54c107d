"""How the forward of each family of diffusers networks is called: CALLS, by class name.

A call takes the network, the state x (B, C, H, W), the time (B,) on the network's schedule, and the conditions by key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmap.nets.next_dit import RealRotary, lumina2, z_image


def _dit(net, x, time, cond):
    label, nothing = cond["class"], net.config.num_embeds_ada_norm
    return net(x, timestep=time, class_labels=torch.where(label < 0, nothing, label)).sample


def _unet(net, x, time, cond):
    labelled = net.config.num_class_embeds is not None or net.config.class_embed_type is not None
    return net(x, time, class_labels=cond["class"] if labelled else None).sample


def _unet_condition(net, x, time, cond):
    added = (
        {"text_embeds": cond["pooled"], "time_ids": cond["size"]}
        if net.config.addition_embed_type == "text_time"
        else None
    )
    return net(x, time, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample


def _sd3(net, x, time, cond):
    return net(
        hidden_states=x, timestep=time, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"]
    ).sample


def _sana(net, x, time, cond):
    scale = net.config.timestep_scale
    return net(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond.get("text_mask"), timestep=time * scale
    ).sample


def _pixart(net, x, time, cond):
    added = {"resolution": None, "aspect_ratio": None}
    mask = cond.get("text_mask")
    return net(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=mask, timestep=time, added_cond_kwargs=added
    ).sample


def _flux(net, x, time, cond):
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    places = torch.cartesian_prod(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in (1, rows, columns)))
    words = torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype)
    guidance = cond["guidance"].to(time.dtype) if net.config.guidance_embeds else None
    exact = (value * 1000 for value in (time / 1000, guidance) if value is not None)
    state_exactly(net.time_text_embed, tuple(exact))
    out = net(
        hidden_states=pack(x),
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["text"],
        txt_ids=words,
        img_ids=places,
    ).sample
    return unpack(out, rows, columns)


def _qwen(net, x, time, cond):
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    if not net.zero_cond_t:  # such a network embeds a second time
        state_exactly(net.time_text_embed, (time / 1000,))
    out = net(
        hidden_states=pack(x),
        timestep=time / 1000,
        encoder_hidden_states=cond["text"],
        encoder_hidden_states_mask=cond.get("text_mask"),
        img_shapes=[[(1, rows, columns)]],  # one entry for all samples keeps the batch dimension dynamic in tracing
    ).sample
    return unpack(out, rows, columns)


def _z_image(net, x, time, cond):
    """Its time runs from noise to data, and its prediction is x0 - x1."""
    return -z_image(net, x, 1 - time / 1000, cond["text"], cond.get("text_mask"))


def _flux2(net, x, time, cond):
    rows, columns = x.shape[-2:]
    grid = lambda *sizes: torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in sizes))
    guidance = cond["guidance"].to(time.dtype) if net.config.guidance_embeds else None
    exact = [time] if guidance is None else [time, 1000 * guidance]
    state_exactly(net.time_guidance_embed.time_proj, *((value,) for value in exact))
    out = net(
        hidden_states=x.flatten(2).transpose(1, 2),
        timestep=time / 1000,
        guidance=guidance,
        encoder_hidden_states=cond["text"],
        txt_ids=grid(1, 1, 1, cond["text"].shape[1]),
        img_ids=grid(1, rows, columns, 1),
    ).sample
    return out.transpose(1, 2).unflatten(2, (rows, columns))


def _hunyuan_image(net, x, time, cond):
    """Its prompts have no second text: its pipeline gives one to prompts with words in quotation marks alone."""
    text, mask = cond["text"], cond.get("text_mask")
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    for embedding in _hunyuan_embeddings(net):
        state_exactly(embedding, (time,))
    rounded = time.to(x.dtype)  # what its embedding is computed in
    return net(x, timestep=rounded, encoder_hidden_states=text, encoder_attention_mask=mask).sample


def _hunyuan_embeddings(net: Any) -> tuple[Any, Any]:
    return net.time_guidance_embed.time_proj, net.context_embedder.time_text_embed.time_proj


def _lumina2(net, x, time, cond):
    """Its time runs from noise to data, and its prediction is x0 - x1."""
    return -lumina2(net, x, 1 - time / 1000, cond["text"], cond.get("text_mask"))


def _aura_flow(net, x, time, cond):
    return net(x, encoder_hidden_states=cond["text"], timestep=time / 1000).sample


class _Exact:
    """The first arguments of the next calls of a module, in place of those that it is given."""

    calls: tuple[tuple[Tensor, ...], ...] = ()


def state_exactly(embedding: Any, *calls: tuple[Tensor, ...]) -> None:
    """Give these first arguments to the embedding in its next calls, whatever the model passes to it.

    FLUX and QwenImage round time and guidance to the dtype of their tokens: in bf16, 1,000 t to a multiple of 4.
    """
    if "exact" not in embedding.__dict__:
        embedding.exact = _Exact()
        embedding.register_forward_pre_hook(_replaced)
    embedding.exact.calls = calls


def prepare(net: Any) -> None:
    """Make a network ready for its calls, before the first one, which a compiler could not capture otherwise.

    That is the hook of state_exactly, and attention that rotates real numbers (next_dit.py).
    """
    name = type(net).__name__
    if name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        state_exactly(net.time_text_embed)
    if name == "HunyuanImageTransformer2DModel":
        for embedding in _hunyuan_embeddings(net):
            state_exactly(embedding)
    if name == "Flux2Transformer2DModel":
        state_exactly(net.time_guidance_embed.time_proj)
    if name in ("ZImageTransformer2DModel", "Lumina2Transformer2DModel"):
        from diffusers.models.attention_processor import Attention

        for module in net.modules():
            if isinstance(module, Attention):
                module.set_processor(RealRotary())


def _replaced(embedding: Any, given: tuple) -> tuple:
    calls = embedding.exact.calls
    if not calls:
        return given
    embedding.exact.calls = calls[1:]
    return (*calls[0], *given[len(calls[0]) :])


def pack(x: Tensor) -> Tensor:
    """(B, C, 2 rows, 2 columns) -> (B, rows columns, 4 C): the tokens of FLUX and QwenImage."""
    x = x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of pack."""
    x = tokens.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # B, rows, columns, C, 2, 2
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


CALLS: dict[str, Callable] = {
    "DiTTransformer2DModel": _dit,
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "Flux2Transformer2DModel": _flux2,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "Lumina2Transformer2DModel": _lumina2,
    "AuraFlowTransformer2DModel": _aura_flow,
}

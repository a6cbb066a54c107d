"""Models that only benchmarks/language.py uses: a language model, a classifier of latents, a diffusion's sampler."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch


def language_model(folder: Path, texts, *, steps: int, batch: int = 32) -> Path:
    """A small GPT-2 trained on the texts, kept in the folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from flowmap.data.text.tokens import BPE

    tokens = BPE(vocab=4096, max_tokens=40).fit(list(texts))
    rows, _ = tokens.encode(list(texts))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokens.vocab, n_positions=64, n_embd=128, n_layer=3, n_head=4, bos_token_id=2, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=min(0.5, 100 / steps))
    for _ in range(steps):
        ids = torch.cat([torch.full((batch, 1), tokens.end), rows[torch.randint(len(rows), (batch,))]], 1)
        model(input_ids=ids, labels=ids.masked_fill(ids == tokens.pad, -100)).loss.backward()
        optimiser.step(), schedule.step(), optimiser.zero_grad()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens.fast, eos_token="<end>", bos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def ancestral(student, steps: int, cond, num: int, seed: int):
    """DDPM's sampler on the diffusion's own path.

    x_s = a_s x0 + sqrt(b_s^2 - h^2) eps + h noise, h^2 = b_s^2 / b_t^2 (1 - a_t^2 / a_s^2).
    """
    from flowmap.flow.path import Trig

    path, generator = Trig(), torch.Generator().manual_seed(seed)
    x = torch.randn(num, *student.config.shape, generator=generator)
    for i in range(steps, 0, -1):
        t, s = torch.full((num,), i / steps), torch.full((num,), (i - 1) / steps)
        v = student.flow_map.velocity(x, t, cond)
        x0, noise = (path.convert(v, x, t, source="velocity", target=target) for target in ("x0", "epsilon"))
        at, to = path.coefficients(t[0]), path.coefficients(s[0])
        put_back = (to.b**2 / at.b**2 * (1 - at.a**2 / to.a**2)).clamp_min(0)
        x = (
            to.a * x0
            + (to.b**2 - put_back).clamp_min(0).sqrt() * noise
            + put_back.sqrt() * torch.randn(x.shape, generator=generator)
        )
        x = x.float()
    return x


@lru_cache(maxsize=1)
def classifier_of_latents(data, *, steps: int, seed: int) -> torch.nn.Module:
    """log p(part of speech | noisy latents, t) on the linear path, by a small perceptron."""
    torch.manual_seed(seed)
    classes = len(next(one for one in data.attributes if one.name == "part_of_speech").values)
    net = torch.nn.Sequential(
        torch.nn.Linear(data.train[0].numel() + 1, 256), torch.nn.SiLU(), torch.nn.Linear(256, classes)
    )
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data.train), (256,))
        t, x0 = torch.rand(256, 1), data.train[rows].flatten(1)
        loss = torch.nn.functional.cross_entropy(
            net(torch.cat([(1 - t) * x0 + t * torch.randn_like(x0), t], 1)), data.codes["part_of_speech"][rows]
        )
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return net.requires_grad_(False)


class Unconditional:
    """The unconditional velocity."""

    def __init__(self, teacher):
        self.teacher = teacher

    def velocity(self, x, t, cond=None):
        return self.teacher.velocity(x, t, None)

"""A trainable text autoencoder: a transformer encoder to a latent, and an autoregressive transformer decoder.

Sources: Bowman et al. 2015, arXiv:1511.06349 (text VAE); Li et al. 2020, arXiv:2004.04092 (transformers; the latent as
memory and embedding). Rows of tokens are (B, L), as in data/tokens.py: tokens, the end token, padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import CountFromZero, Depth, Heads, Vocab, Width, check_ranges

# initial log variance of the posterior: with more noise the decoder would learn to ignore the latent
SHARP = -4.0
LOUD = 0.3  # std of token embeddings, with `direct`
IGNORED = -100  # torch's cross-entropy ignores this target


@dataclass(frozen=True)
class TextVAE:
    """A latent with `slots` vectors of `dims` numbers.

    Samples of the flow are (dims,) for one slot, otherwise (dims, 1, slots).
    direct: add linear paths parallel to the transformers, from the embedded row to the posterior's mean and from the
    latent to each position of the decoder, through which a short training learns to copy. vocab and special (the pad,
    start, end and mask tokens) are the tokenizer's, by default taken from the data.
    """

    slots: Width = 4
    dims: Width = 32
    width: Width = 192
    depth: Depth = 3
    heads: Heads = 4
    direct: bool = False
    vocab: Vocab | None = None
    special: tuple[CountFromZero, CountFromZero, CountFromZero, CountFromZero] | None = None
    artifact: ClassVar[str] = "text_autoencoder"

    def __post_init__(self):
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads ({self.heads})")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.dims,) if self.slots == 1 else (self.dims, 1, self.slots)

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = False, guidance: bool = False
    ) -> nn.Module:
        if len(shape) != 1:
            needs = "use data of kind text without an autoencoder"
            raise ValueError(f"text_vae: samples are rows of tokens (L,), not {tuple(shape)}; {needs}")
        if self.vocab is None or self.special is None:
            raise ValueError("vocab: and special: are the tokenizer's; data of kind text provides them")
        return TextVAENet(self, shape[0])

    def alone(self, net: TextVAENet) -> TextVAE:
        """These settings, which describe the network `net` completely."""
        return self


class TextVAENet(nn.Module):
    """moments: (mean, log variance) of the posterior, (B, *latent_shape) each; logits: the decoder's output."""

    def __init__(self, spec: TextVAE, max_tokens: int):
        super().__init__()
        self.spec, self.max_tokens = spec, max_tokens
        assert spec.vocab is not None and spec.special is not None  # build has checked
        self.pad, self.start, self.end, self.mask = spec.special
        width, small = spec.width, 0.02
        self.embed = nn.Embedding(spec.vocab, width)
        self.encoder_places = nn.Parameter(small * torch.randn(spec.slots + max_tokens, width))
        self.decoder_places = nn.Parameter(small * torch.randn(spec.slots + max_tokens, width))
        self.queries = nn.Parameter(small * torch.randn(spec.slots, width))
        self.encoder = nn.ModuleList(Block(width, spec.heads) for _ in range(spec.depth))
        self.posterior = nn.Linear(width, 2 * spec.dims)
        self.memory = nn.Linear(spec.dims, width)
        self.everywhere = nn.Linear(spec.dims * spec.slots, width)
        self.decoder = nn.ModuleList(Block(width, spec.heads) for _ in range(spec.depth))
        self.leave = nn.Linear(width, spec.vocab)
        nn.init.normal_(self.embed.weight, std=small)
        nn.init.zeros_(self.posterior.bias)
        nn.init.constant_(self.posterior.bias[spec.dims :], SHARP)
        if spec.direct:
            entries, row = spec.slots * spec.dims, max_tokens * width
            self.into, self.out = nn.Linear(row, entries, bias=False), nn.Linear(entries, row)
            self._start_copying()

    @torch.no_grad()
    def _start_copying(self) -> None:
        """Initialise the direct paths so that they copy tokens.

        Each position owns a share of the latent's entries: a random projection of its token's embedding, with std 1.
        The path back is the transpose of that projection in a rotated space, in which the output layer reads tokens.
        The rotation makes the embedding of the previous token, which the decoder also gets, uninformative there.
        """
        entries, width = len(self.into.weight), self.spec.width
        nn.init.normal_(self.embed.weight, std=LOUD)
        place = torch.arange(entries) * self.max_tokens // entries
        mine = F.one_hot(place, self.max_tokens).repeat_interleave(width, 1)
        nn.init.normal_(self.into.weight, std=1 / (LOUD * width**0.5)).mul_(mine)
        turn = torch.linalg.qr(torch.randn(width, width))[0]
        back = self.into.weight.unflatten(1, (self.max_tokens, width)) @ turn
        scale = 2 * LOUD**2 * (width * self.max_tokens / entries) ** 0.5  # twice the std of an embedding
        self.out.weight.copy_(scale * back.flatten(1).T)
        self.out.bias.zero_()
        self.leave.weight.copy_(self.embed.weight @ turn / 2)
        self.leave.bias.zero_()

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.long()
        real = torch.cat([torch.ones_like(rows[:, :1]).expand(-1, self.spec.slots), self._real(rows)], 1).bool()
        h = torch.cat([self.queries.expand(len(rows), -1, -1), self.embed(rows)], 1)
        h = h + self.encoder_places[: self.spec.slots + rows.shape[1]]
        for block in self.encoder:
            h, _ = block(h, mask=real[:, None, None, :])
        mean, logvar = self.posterior(_norm(h[:, : self.spec.slots])).chunk(2, -1)
        if self.spec.direct:
            embedded = (self.embed(rows) * self._real(rows).unsqueeze(-1)).flatten(1)
            mean = mean + self.into(F.pad(embedded, (0, self.into.in_features - embedded.shape[1]))).reshape(mean.shape)
        return self._latent(mean), self._latent(logvar.clamp(-12, 6))

    def logits(self, z: Tensor, rows: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logits (B, L, vocab), targets (B, L) with -100 at padding): the next token from the previous ones and z.

        dropped (B, L), bool: inputs to replace by the mask token (word dropout).
        """
        rows = rows.long()
        before = F.pad(rows[:, :-1], (1, 0), value=self.start)
        if dropped is not None:
            before = torch.where(dropped & (before != self.start), self.mask, before)
        h, _ = self._decode(self._prefix(z), before, z, 0, None)
        return self.leave(_norm(h)), rows.masked_fill(self._real(rows) == 0, IGNORED)

    @torch.no_grad()
    def generate(self, z: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Rows (B, max_tokens), int64, decoded from z: the most likely tokens, or samples if temperature > 0."""
        rows = torch.full((len(z), self.max_tokens), self.pad, device=z.device)
        token, kept = rows.new_full((len(z), 1), self.start), None
        done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for i in range(self.max_tokens):
            h, kept = self._decode(self._prefix(z) if i == 0 else None, token, z, i, kept)
            scores = self.leave(_norm(h[:, -1])).float()
            if temperature > 0:
                token = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
            else:
                token = scores.argmax(-1, keepdim=True)
            rows[:, i] = torch.where(done, self.pad, token[:, 0])
            done |= token[:, 0] == self.end
            if bool(done.all()):
                break
        return rows

    def forward(self, x: Tensor, t: Tensor | None = None, s: Tensor | None = None, cond=None) -> Tensor:
        """The logits of the rows x with teacher forcing, given the posterior's mean."""
        return self.logits(self.moments(x)[0], x)[0]

    def _real(self, rows: Tensor) -> Tensor:
        """A 0/1 mask (B, L) of tokens up to the first end token, which may equal the padding token."""
        ended = (rows == self.end).long()
        return (ended.cumsum(1) - ended == 0).long() * ((rows != self.pad) | (rows == self.end)).long()

    def _latent(self, h: Tensor) -> Tensor:
        return h[:, 0] if self.spec.slots == 1 else h.transpose(1, 2).unsqueeze(2)

    def _slots(self, z: Tensor) -> Tensor:
        """(B, slots, dims) of z (B, *latent_shape)."""
        return z.unsqueeze(1) if self.spec.slots == 1 else z.squeeze(2).transpose(1, 2)

    def _prefix(self, z: Tensor) -> Tensor:
        return self.memory(self._slots(z)) + self.decoder_places[: self.spec.slots]

    def _decode(
        self, prefix: Tensor | None, tokens: Tensor, z: Tensor, start: int, kept: list | None
    ) -> tuple[Tensor, list]:
        """(hidden states, keys and values) of tokens at positions start, ...; kept: the previous keys and values."""
        places = self.decoder_places[self.spec.slots + start : self.spec.slots + start + tokens.shape[1]]
        h = self.embed(tokens) + places + self.everywhere(z.flatten(1)).unsqueeze(1)
        if self.spec.direct:
            direct = self.out(self._slots(z).flatten(1)).unflatten(1, (self.max_tokens, -1))
            h = h + direct[:, start : start + tokens.shape[1]]
        if prefix is not None:
            h = torch.cat([prefix, h], 1)
        mask = None
        if kept is None:
            mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
            mask[:, : self.spec.slots] = True  # every position attends to the latent
        after = []
        for i, block in enumerate(self.decoder):
            h, pair = block(h, mask=mask, kept=None if kept is None else kept[i])
            after.append(pair)
        return h[:, -tokens.shape[1] :], after


class Block(nn.Module):
    """Pre-norm attention and a perceptron; also returns the keys and values, for the following tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, h: Tensor, *, mask: Tensor | None = None, kept: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple]:
        batch, tokens, width = h.shape
        qkv = self.qkv(_norm(h)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if kept is not None:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.merge(seen.transpose(1, 2).reshape(batch, tokens, width))
        return h + self.down(F.gelu(self.up(_norm(h)))), (k, v)


def _norm(h: Tensor) -> Tensor:
    return F.rms_norm(h, (h.shape[-1],), eps=1e-6)

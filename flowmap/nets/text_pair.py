"""A text autoencoder from two pretrained transformers: an encoder (BERT, MiniLM) and a decoder (GPT-2).

Source: Li et al. 2020, arXiv:2004.04092 (Optimus): the latent enters the decoder as a memory before the tokens and is
added to every token embedding; LatentOps, arXiv:2208.00638, trains small adapters around them. Rows contain the
encoder's tokens, then the decoder's (data/tokens.py, `pair`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowmap.base.ranges import CountFromZero, Width, check_ranges
from flowmap.nets.text_vae import IGNORED, SHARP


@dataclass(frozen=True)
class TextPair:
    """Settings of the pair. encoder and decoder are folders or hub ids of transformers models with safetensors.

    The latent has `slots` vectors of `dims` numbers, as in TextVAE. train_encoder, train_decoder: whether each is
    trained or frozen. special: the decoder's (pad, start, end, mask) tokens; encoder_pad: the encoder's padding
    token; encoder_tokens: the number of encoder tokens per row; encoder_vocab: the size of the encoder's vocabulary.
    These four come from the data's tokenizer. configs: the configurations of both models as JSON, in student folders,
    which contain their weights and so do not need the original models.
    """

    encoder: str = "???"
    decoder: str = "???"
    slots: Width = 1
    dims: Width = 64
    train_encoder: bool = False
    train_decoder: bool = True
    vocab: CountFromZero | None = None
    special: tuple[CountFromZero, CountFromZero, CountFromZero, CountFromZero] | None = None
    encoder_pad: CountFromZero = 0
    encoder_tokens: CountFromZero = 0
    encoder_vocab: CountFromZero = 0
    configs: tuple[str, str] | None = None
    artifact: ClassVar[str] = "text_autoencoder"

    def __post_init__(self):
        check_ranges(self)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.dims,) if self.slots == 1 else (self.dims, 1, self.slots)

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = False, guidance: bool = False
    ) -> nn.Module:
        if len(shape) != 1 or not 0 < self.encoder_tokens < shape[0] or self.special is None:
            needs = "data of kind text with tokenizer {kind: pair, ...}"
            raise ValueError(f"text_pair: wants rows of tokens of both models: {needs}")
        configs = self.configs or (None, None)
        encoder = _loaded("encoder", self.encoder, configs[0])
        return TextPairNet(self, shape[0], encoder, _loaded("decoder", self.decoder, configs[1]))

    def alone(self, net: TextPairNet) -> TextPair:
        """These settings with the configurations of both models, independent of the original models."""
        encoder, decoder = (part.config.to_json_string(use_diff=False) for part in (net.encoder, net.decoder))
        return replace(self, configs=(encoder, decoder))


def _loaded(name: str, source: str, config: str | None) -> nn.Module:
    """The pretrained model, or with a config a model of that shape, for weights that are loaded later."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    cls = AutoModel if name == "encoder" else AutoModelForCausalLM
    try:
        if config is None and torch.empty(0).is_meta:  # dry runs build on the meta device, without weights
            return cls.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False), trust_remote_code=False)
        if config is not None:
            return cls.from_config(AutoConfig.for_model(**json.loads(config)), trust_remote_code=False)
        return cls.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    except Exception as error:  # transformers raises various types for invalid folders
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: {source!r}: {line}") from error


def _check_fit(name: str, model: Any, vocab: int, tokens: int, slots: int) -> None:
    """Raise a ValueError if a model has fewer tokens than its tokenizer, or fewer positions than tokens + slots."""
    known, places = model.get_input_embeddings().num_embeddings, _positions(model)
    if vocab > known:
        has = f"has {known} tokens, its tokenizer (data.tokenizer.{name}) {vocab}"
        raise ValueError(f"{name}: {has}; give it the tokenizer of the same model")
    if places is not None and tokens + slots > places:
        has = f"has {places} positions" + (f", {slots} of them the latent's" if slots else "")
        raise ValueError(f"{name}: {has}: data.tokenizer.max_tokens: {tokens} must be {places - slots} or less")


def _positions(model: nn.Module) -> int | None:
    """The maximum number of tokens of the model; None if it has no limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
    padding = table.padding_idx if isinstance(table, nn.Embedding) else None
    return found if padding is None else found - padding - 1  # RoBERTa's positions start after its padding index


class TextPairNet(nn.Module):
    """moments, logits and generate, as in TextVAENet; rows are (B, encoder tokens + decoder tokens)."""

    encoder: Any  # transformers models
    decoder: Any

    def __init__(self, spec: TextPair, max_tokens: int, encoder: Any, decoder: Any):
        super().__init__()
        self.spec, self.max_tokens = spec, max_tokens
        assert spec.special is not None  # build has checked
        self.pad, self.start, self.end, self.mask = spec.special
        self.encoder = encoder.requires_grad_(spec.train_encoder)
        self.decoder = decoder.requires_grad_(spec.train_decoder)
        _check_fit("encoder", encoder, spec.encoder_vocab, spec.encoder_tokens, 0)
        _check_fit("decoder", decoder, spec.vocab or 0, max_tokens - spec.encoder_tokens, spec.slots)
        width, seen = decoder.get_input_embeddings().embedding_dim, encoder.config.hidden_size
        self.posterior = nn.Linear(seen, 2 * spec.slots * spec.dims)
        self.memory, self.everywhere = nn.Linear(spec.dims, width), nn.Linear(spec.slots * spec.dims, width)
        nn.init.zeros_(self.posterior.bias)
        nn.init.constant_(self.posterior.bias[spec.slots * spec.dims :], SHARP)

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        ids = rows.long()[:, : self.spec.encoder_tokens]
        real = (ids != self.spec.encoder_pad).long()
        real[:, 0] = 1
        mask = None if ids.is_meta else real
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        mean, logvar = self.posterior(pooled).chunk(2, -1)
        return self._latent(mean), self._latent(logvar.clamp(-12, 6))

    def logits(self, z: Tensor, rows: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logits (B, L, vocab), targets (B, L) with -100 at padding) for the decoder's L tokens.

        dropped (B, all tokens) is as in TextVAENet.
        """
        rows = rows.long()[:, self.spec.encoder_tokens :]
        before = F.pad(rows[:, :-1], (1, 0), value=self.start)
        if dropped is not None:
            before = torch.where(dropped[:, self.spec.encoder_tokens :] & (before != self.start), self.mask, before)
        given = torch.cat([self._prefix(z), self._embedded(before, z)], 1)
        # on the meta device: without a mask transformers would read values to make one
        mask = given.new_zeros(len(given), 1, given.shape[1], given.shape[1]) if given.is_meta else None
        out = self.decoder(inputs_embeds=given, attention_mask=mask, use_cache=False)
        ended = (rows == self.end).long()
        return out.logits[:, self.spec.slots :], rows.masked_fill(ended.cumsum(1) - ended > 0, IGNORED)

    @torch.no_grad()
    def generate(self, z: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """The decoder's rows (B, L), int64: the most likely token at each position, or a sample if temperature > 0."""
        length = self.max_tokens - self.spec.encoder_tokens
        rows = torch.full((len(z), length), self.pad, device=z.device)
        given = torch.cat([self._prefix(z), self._embedded(rows.new_full((len(z), 1), self.start), z)], 1)
        kept, done = None, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for i in range(length):
            out = self.decoder(inputs_embeds=given, past_key_values=kept, use_cache=True)
            kept, scores = out.past_key_values, out.logits[:, -1].float()
            if temperature > 0:
                token = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
            else:
                token = scores.argmax(-1, keepdim=True)
            rows[:, i] = torch.where(done, self.pad, token[:, 0])
            done |= token[:, 0] == self.end
            if bool(done.all()):
                break
            given = self._embedded(token, z)
        return rows

    def forward(self, x: Tensor, t: Tensor | None = None, s: Tensor | None = None, cond: Any = None) -> Tensor:
        return self.logits(self.moments(x)[0], x)[0]

    def train(self, mode: bool = True) -> TextPairNet:
        """Keep the pretrained parts in evaluation mode: masks of their dropout would not be a function of the step."""
        super().train(mode)
        self.encoder.eval(), self.decoder.eval()
        return self

    def _latent(self, flat: Tensor) -> Tensor:
        if self.spec.slots == 1:
            return flat
        return flat.unflatten(1, (self.spec.slots, self.spec.dims)).transpose(1, 2).unsqueeze(2)

    def _prefix(self, z: Tensor) -> Tensor:
        slots = z.unsqueeze(1) if self.spec.slots == 1 else z.squeeze(2).transpose(1, 2)
        return self.memory(slots)

    def _embedded(self, tokens: Tensor, z: Tensor) -> Tensor:
        return self.decoder.get_input_embeddings()(tokens) + self.everywhere(z.flatten(1)).unsqueeze(1)

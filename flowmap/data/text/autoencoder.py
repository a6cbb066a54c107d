"""A frozen text autoencoder with its tokenizer: sentences become normalised latents, and latents sentences again.

A run of objective `text_elbo` writes its folder: config.json, model.safetensors, tokenizer.json,
tokenizer_settings.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmap.base.files import read_json, read_tensors, weights_hash, write_json, write_tensors, write_text
from flowmap.base.schema import construct, to_plain
from flowmap.data.text.tokens import FILE, SETTINGS, Tokens, load_tokens
from flowmap.nets.text_pair import TextPair
from flowmap.nets.text_vae import TextVAE

FORMAT = "flowmap-text-autoencoder-1"


class TextNet(Protocol):
    """The settings of a text autoencoder's network."""

    @property
    def vocab(self) -> int | None: ...

    def alone(self, net: Any) -> Any:
        """These settings with all that is needed to build `net`, one of their networks, again."""
        ...

    @property
    def build(self) -> Callable[..., nn.Module]: ...


TEXT_NETS = {"text_vae": TextVAE, "text_pair": TextPair}
TABLES: Mapping[type, Mapping[str, type]] = {TextNet: TEXT_NETS}


@dataclass(frozen=True)
class _Config:
    """The contents of config.json: latents are (z - shift) * scale, with one number of shift for each entry."""

    net: TextNet
    max_tokens: int
    shift: tuple[float, ...]
    scale: float
    tokenizer: str


@dataclass(frozen=True)
class TextAutoencoder:
    """A text autoencoder from a folder (`source`), or the one that a recipe trains.

    overrides: key=value for the recipe.
    """

    source: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.source is None) == (self.recipe is None):
            which = "source (a folder) and recipe (one of ours that trains it)"
            raise ValueError(f"source: a text autoencoder wants exactly one of {which}")

    def load(self) -> FrozenTextAutoencoder:
        """The autoencoder on the CPU, from safetensors. Raises ValueError, in one line, where that fails."""
        folder = self._folder()
        config, tokens, state = self._config(), load_tokens(folder), read_tensors(folder / "model.safetensors")
        if tokens.digest() != config.tokenizer or config.net.vocab is None or tokens.vocab > config.net.vocab:
            raise ValueError(f"{folder / FILE}: is not the tokenizer that this decoder was trained with")
        net = config.net.build((config.max_tokens,))
        wanted = net.state_dict()
        odd = next(
            (k for k in {**wanted, **state} if k not in state or k not in wanted or wanted[k].shape != state[k].shape),
            None,
        )
        if odd is not None:
            raise ValueError(
                f"{folder / 'model.safetensors'}: {odd}: does not fit the network that config.json describes"
            )
        net.load_state_dict(state)
        return FrozenTextAutoencoder(net, tokens, torch.tensor(config.shift), config.scale)

    def load_tokens(self) -> Tokens:
        """Its tokenizer alone. Raises ValueError as `load` does."""
        self._config()
        return load_tokens(self._folder())

    def identity(self) -> dict[str, Any]:
        """Plain values that identify its latents, found without loading it."""
        config = self._config()
        weights = weights_hash(self._folder() / "model.safetensors")
        return {
            "net": to_plain(config.net, TABLES),
            "weights": weights,
            "tokenizer": config.tokenizer,
            "scale": config.scale,
        }

    def _folder(self) -> Path:
        if self.source is None:
            raise ValueError(
                f"autoencoder.recipe: {self.recipe!r} is trained first: `flowmap fit` of a recipe that uses it does"
            )
        folder = Path(self.source)
        return folder / "student" if (folder / "student").is_dir() else folder

    def _config(self) -> _Config:
        path = self._folder() / "config.json"
        if not path.is_file():
            what = f"{self._folder()} has no text autoencoder yet"
            raise ValueError(f"autoencoder: {what}; `flowmap fit` of a recipe that uses it trains it first")
        plain = read_json(path)
        if plain.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: is not the config of a text autoencoder")
        return construct(_Config, plain, TABLES, file=str(path))


class FrozenTextAutoencoder:
    """encode: list[str] -> latents (N, *shape), the posterior's mean. decode: the likeliest token at every place."""

    net: Any  # a TextVAENet, or another with its moments, generate and spec

    def __init__(self, net: nn.Module, tokens: Tokens, shift: Tensor, scale: float):
        self.net, self.tokens, self.scale = net.eval().requires_grad_(False), tokens, scale
        self.shape: tuple[int, ...] = self.net.spec.latent_shape
        self.shift = shift.view(1, *self.shape)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256, *, count_cut: bool = False) -> Any:
        """Latents (N, *shape) on the CPU; with count_cut, also how many sentences were too long and cut."""
        rows, cut = self.tokens.encode(list(texts))
        parts = [self.net.moments(part.to(self.device))[0].float().cpu() for part in rows.split(batch_size)]
        z = (torch.cat(parts) - self.shift) * self.scale if parts else torch.zeros(0, *self.shape)
        return (z, cut) if count_cut else z

    @torch.no_grad()
    def decode(self, z: Tensor, batch_size: int = 512) -> list[str]:
        z = z.float().cpu() / self.scale + self.shift
        return [
            text for part in z.split(batch_size) for text in self.tokens.decode(self.net.generate(part.to(self.device)))
        ]

    def to(self, device: torch.device | str) -> FrozenTextAutoencoder:
        self.net.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device


def save_text_autoencoder(
    folder: Path, net: Any, state: Mapping[str, Tensor], tokens: Tokens, rows: Tensor, *, recipe: str, card: str
) -> None:
    """Write the folder. shift and scale normalise the latents of the token rows (N, L) to mean 0 and spread 1."""
    with torch.no_grad():
        device = next(net.parameters()).device
        z = torch.cat([net.moments(part.to(device))[0].float().cpu() for part in rows.split(256)])
    config = _Config(
        net.spec.alone(net),
        net.max_tokens,
        tuple(z.mean(0).flatten().tolist()),
        float(1 / (z - z.mean(0)).std().clamp_min(1e-6)),
        tokens.digest(),
    )
    write_tensors(
        folder / "model.safetensors", {name: tensor.clone() for name, tensor in state.items()}
    )  # tied weights share memory
    write_text(folder / FILE, tokens.model)
    write_json(folder / SETTINGS, tokens.settings())
    write_json(folder / "config.json", {"format": FORMAT, **to_plain(config, TABLES)})
    write_text(folder / "recipe.yaml", recipe)
    write_text(folder / "README.md", card)

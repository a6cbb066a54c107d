"""A text autoencoder and a flow in its latent space as one network, for joint training.

Source: Language Rectified Flow, arXiv:2403.16995; the architecture is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from flowmap.base.ranges import CountFromZero, Vocab, check_ranges
from flowmap.flow.types import Cond
from flowmap.nets.stacked import NetSpec, attends_to_tokens, takes_extra_conditions
from flowmap.nets.text_vae import TextVAE


class TextCoderSpec(Protocol):
    """The settings of a text autoencoder for joint training: a dataclass with the fields vocab and special."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def build(self) -> Callable[..., nn.Module]: ...


@dataclass(frozen=True)
class TextJoint:
    """The settings of both; vocab and special come from the tokenizer, as for the autoencoder."""

    flow: NetSpec
    autoencoder: TextCoderSpec = TextVAE()
    vocab: Vocab | None = None
    special: tuple[CountFromZero, CountFromZero, CountFromZero, CountFromZero] | None = None
    artifact: ClassVar[str] = "text_joint"

    def __post_init__(self):
        check_ranges(self)
        if not isinstance(self.flow, NetSpec):
            raise ValueError("flow: wants the settings of a network; starting from other weights is not supported here")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.autoencoder.latent_shape

    @property
    def takes_extra_conditions(self) -> bool:
        return takes_extra_conditions(self.flow)

    @property
    def attends_to_tokens(self) -> bool:
        return attends_to_tokens(self.flow)

    def build(
        self,
        shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        arrival: bool = False,
        guidance: bool = False,
        **options,
    ) -> nn.Module:
        options |= dict(num_classes=num_classes, arrival=arrival, guidance=guidance)
        coder = replace(self.autoencoder, vocab=self.vocab, special=self.special).build(shape)
        return TextJointNet(coder, self.flow.build(self.latent_shape, **options))


class TextJointNet(nn.Module):
    """F(x, t, s, cond) for latents x (B, *latent_shape), and the autoencoder's moments, logits and generate."""

    autoencoder: Any  # TextVAENet, or another module with these three methods

    def __init__(self, autoencoder: nn.Module, flow: nn.Module):
        super().__init__()
        self.autoencoder, self.flow = autoencoder, flow

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return self.flow(x, t, s, cond)

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.moments(rows)

    def logits(self, z: Tensor, rows: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.autoencoder.logits(z, rows, dropped)

    def generate(self, z: Tensor) -> Tensor:
        return self.autoencoder.generate(z)

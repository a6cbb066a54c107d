"""The network of an exported student as a diffusers model. The exported folder contains its source and dependencies."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.nets.flow_map import FlowMapNet

TEXT = ("text", "pooled", "size")


class FlowMapModel(ModelMixin, ConfigMixin):
    """The mean velocity F(x, t, s, cond) over [s, t], with t = 0 data and t = 1 noise: (s - t) F maps x from t to s.

    settings are those of the class `network`, which the exported file sets at its end.
    """

    network: ClassVar[Any] = None

    @register_to_config
    def __init__(
        self,
        settings: dict,
        shape: list[int],
        num_classes: int | None = None,
        arrival: bool = True,
        guidance: bool = False,
    ):
        super().__init__()
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        net = self.network(**plain).build(tuple(shape), num_classes=num_classes, arrival=arrival, guidance=guidance)
        self.flow_map = FlowMapNet(net)

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input, of our branch or of the published network."""
        model = dict(self.flow_map.net.named_children()).get("model")
        return bool(self.config.guidance or (isinstance(model, ConfigMixin) and model.config.get("guidance_embeds")))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """F for x (B, ...), t and s (B,), with x's shape and dtype, whatever the weights' dtype; times stay float32."""
        cond = {key: value.to(self.dtype) if key in TEXT else value for key, value in (cond or {}).items()}
        return self.flow_map.mean_velocity(x.to(self.dtype), t, s, cond).to(x.dtype)

"""The network of an exported student as a diffusers model. Its source, with all that it needs of ours, becomes a file of the exported folder."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.nets.flow_map import FlowMapNet

TEXT = ("text", "pooled", "size")


class FlowMapModel(ModelMixin, ConfigMixin):
    """The mean velocity F(x, t, s, cond) over [s, t], t = 0 data and t = 1 noise: x moves from t to s by (s - t) F.

    settings are those of the class `network`, which the exported file names at its end.
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
        """The guidance scale is an input, of our own branch or of the network as it was published."""
        model = getattr(self.flow_map.net, "model", None)
        return bool(self.config.guidance or (model is not None and model.config.get("guidance_embeds")))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """x (B, ...), t and s (B,); cond as the pipeline makes it. Shaped and typed like x, whatever the weights' type; times stay float32."""
        cond = {key: value.to(self.dtype) if key in TEXT else value for key, value in (cond or {}).items()}
        return self.flow_map.mean_velocity(x.to(self.dtype), t, s, cond).to(x.dtype)

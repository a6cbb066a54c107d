"""Memory of an evaluation in one process: what the metrics of a recipe hold, and what a batch of samples takes.

Networks of samples run on the meta device; what an autoencoder takes for a picture was measured there once, as were the
networks in frozen_networks.py. Weights of student and teacher are not counted: they are in memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch

from flowmap.data import EDM2Latents, Encoded
from flowmap.estimate.attention import fused_attention
from flowmap.estimate.frozen_networks import NETWORKS, encoder_bytes, picture_networks
from flowmap.estimate.live import LiveBytes
from flowmap.estimate.networks import nameless, shared_outline, teacher_configs
from flowmap.metrics import Spec
from flowmap.metrics.real import chunk_of
from flowmap.plan.plan import ResolvedRun
from flowmap.student.config import ImageLatents, StudentConfig
from flowmap.student.examples import conditions_of
from flowmap.student.student import DECODED

REAL = 1000  # real samples of each kind where the settings do not tell how many there are
LATENT = 8  # pixels of a latent's side, where no size of pictures is set
DECODER = 335_000_000  # bytes of the weights of an autoencoder of diffusers (Stable Diffusion's)
DECODING = 3072  # bytes of activations for a pixel that it decodes, in float32
PCA_WIDTH = 32


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes of an evaluation in one process.

    weights: of the autoencoder, of feature networks, and of the text encoders, which stay on the device once a caption
    was encoded. drawing: a batch of starts and samples, and the activations of one call of a network. decoding: a chunk
    of pictures, and the activations of the decoder. features: the activations of a feature network for a chunk. states:
    what the metrics hold, at the largest, when they compute. host: features of real samples and end points, on the CPU.
    Drawing, decoding and features follow one another.
    """

    weights: float
    drawing: float
    decoding: float
    features: float
    states: float
    host: float

    @property
    def device(self) -> float:
        """The bytes on the device."""
        return self.weights + self.states + max(self.drawing, self.decoding, self.features)

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def evaluation_bytes(run: ResolvedRun, config: StudentConfig) -> EvaluationMemory:
    """Return the memory of the evaluation of the run's student, in each of its processes."""
    recipe, picture = run.recipe, picture_shape(run, config)
    half = 0.5 if recipe.trainer.precision == "bf16" else 1.0
    chunk, pixels = chunk_of(picture), math.prod(picture)
    networks = [net for net, _ in picture_networks(recipe).values()]
    decodes = isinstance(config.samples, ImageLatents)
    at_once = min(DECODED, chunk, recipe.evaluation.batch_size)
    decoder = half * DECODING * at_once * math.prod(picture[1:]) if decodes else 0.0
    return EvaluationMemory(
        weights=(DECODER if decodes else 0) + sum(net.weights for net in networks) + _text(run, config),
        drawing=_drawing(run, config, half),
        decoding=3 * 4 * chunk * pixels + decoder,
        features=2 * 4 * chunk * pixels + chunk * max((net.activations for net in networks), default=2 * pixels * 8),
        states=sum(_states(spec, run, picture) for spec in recipe.metrics),
        host=_host(run, config),
    )


def picture_shape(run: ResolvedRun, config: StudentConfig) -> tuple[int, ...]:
    """The shape of what metrics compare: a sample, decoded where it is a latent of a picture."""
    if not isinstance(config.samples, ImageLatents):
        return tuple(config.shape)
    data = run.recipe.data
    if isinstance(data, Encoded):
        return (3, data.images.size, data.images.size)
    return (3, *(LATENT * side for side in config.shape[1:]))


def width_of(space: str | None, picture: tuple[int, ...]) -> int:
    """The number of features of that space; of an unknown one, that of Inception."""
    if space == "pixels":
        return math.prod(picture)
    if space == "pca":
        return min(PCA_WIDTH, math.prod(picture))
    return NETWORKS.get(space or "", NETWORKS["inception"]).features


def real_samples(run: ResolvedRun) -> tuple[int, int]:
    """The numbers of training samples and of held-out ones that metrics compare with."""
    data = run.recipe.data
    if not isinstance(data, (Encoded, EDM2Latents)):
        return REAL, REAL
    return data.reference_images, REAL if data.held_out is None else data.held_out


def _states(spec: Spec, run: ResolvedRun, picture: tuple[int, ...]) -> float:
    return spec.held_bytes(width_of(spec.feature_space, picture), *real_samples(run))


def _text(run: ResolvedRun, config: StudentConfig) -> float:
    """The weights of the text encoders, where prompts of a file are encoded; held-out text is encoded already."""
    return encoder_bytes(config) if run.recipe.evaluation.captions is not None else 0.0


def _host(run: ResolvedRun, config: StudentConfig) -> float:
    """The features of real samples by each network, in float32, and the samples that end points are kept of."""
    spaces = {spec.feature_space for spec in run.recipe.metrics}
    each = sum(net.features for name, net in NETWORKS.items() if name in spaces)
    kept = sum(spec.images for spec in run.recipe.metrics if spec.of_endpoints)
    return 4.0 * each * sum(real_samples(run)) + 4.0 * kept * math.prod(config.shape)


def _drawing(run: ResolvedRun, config: StudentConfig, half: float) -> float:
    """The bytes of a batch: start, state, velocity and sample in float32, conditions, and the largest call's own."""
    batch, samples = run.recipe.evaluation.batch_size, math.prod(config.shape)
    with torch.device("meta"):
        given = sum(one.numel() * one.element_size() for one in conditions_of(config, 1).values())
    calls = [_call(nameless(one), batch) for one in (config, *(one for _, one in teacher_configs(run, config)))]
    return batch * (4 * 4 * samples + given) + half * max(calls)


@cache
def _call(config: StudentConfig, batch: int) -> float:
    """The bytes alive at once in a call of the network without a graph, beyond its arguments, in float32."""
    net = shared_outline(config).net
    with torch.device("meta"), torch.no_grad(), fused_attention():
        x, t, cond = torch.zeros(batch, *config.shape), torch.zeros(batch), conditions_of(config, batch)
        with LiveBytes() as live:
            net(x, t, t, cond)
    return live.peak

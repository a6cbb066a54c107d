"""Editing pictures through the code z of a learned prior: part of one drawn anew, and what lies between two.

Source: LeDiFlow (arXiv:2505.20723) names both uses; the ways taken here are ours.  Clock: 0 data, 1 noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.images import from_bytes
from flowmap.data.sources import load_upright
from flowmap.flow.prior import LearnedPrior, conditioning_rows, starts
from flowmap.samplers import asked_for
from flowmap.student.config import ImageLatents, TextLatents
from flowmap.student.student import Student

ROUNDS = 4  # how often the code of a masked picture is found anew, with the hole filled by its own decoding


@torch.no_grad()
def inpaint(
    student: Student,
    picture: Tensor,
    mask: Tensor,
    num: int,
    *,
    steps: int = 4,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """(num, C, H, W): the picture (C, H, W) in [-1, 1] with what lies under the mask (H, W), true where it is to be drawn, drawn anew.

    z is the code of the picture, its hole filled by what z itself decodes to; all samples keep it and differ in their noise. After every
    step what is known is put back where it belongs on its own path, (1 - s) x0 + s x1, and in the end exactly. A student of latents keeps
    a latent where none of its pixels is masked. ValueError for a student without a learned prior, or a mask or picture of another size.
    """
    prior = _prior_of(student, "--inpaint")
    x0, hole = _encoded(student, picture, "--inpaint"), _hole(student, picture, mask)
    z = code_of_part(prior, x0, hole)
    start = starts(prior, tuple(student.config.shape), num, torch.Generator().manual_seed(seed), z=z.expand(num, -1))
    drawn = []
    for i in range(0, num, batch_size):
        at = slice(i, i + batch_size)
        cond = conditioning_rows(start, at, student.device)
        drawn.append(_resolved(student, start.x1[at].to(student.device), cond, x0, hole, steps, solver))
    pictures = student.pictures(torch.cat(drawn))
    return torch.where(mask.to(pictures.device), pictures, picture.to(pictures.device))


def code_of_part(prior: LearnedPrior, x0: Tensor, hole: Tensor) -> Tensor:
    """The code (1, Z) of the known part of x0 (1, ...); hole (1, 1, ...) is true where it is not known."""
    z = torch.zeros(1, prior.size, device=x0.device)
    for _ in range(ROUNDS):
        z = prior.encode(torch.where(hole, prior.model.decode(z)[0], x0))
    return z


def _resolved(student: Student, x1: Tensor, cond, x0: Tensor, hole: Tensor, steps: int, solver: str | None) -> Tensor:
    """x1 carried to t = 0 by the student's sampler, one step at a time, with the known part put back on its path after each."""
    sampler = asked_for(student.config.sampler, solver=solver)
    times, x = sampler.times(steps), sampler.start(x1)
    for t, s in zip(times, times[1:], strict=False):
        x = torch.where(hole, sampler.step(student.flow_map, x, t, s, cond), (1 - s) * x0 + s * x1)
    return x


@torch.no_grad()
def interpolate(
    student: Student,
    first: Tensor,
    second: Tensor,
    num: int,
    *,
    steps: int = 4,
    solver: str | None = None,
    seed: int = 0,
) -> Tensor:
    """(num, C, H, W): samples of codes on the great arc from the first picture's code to the second's, all from the same noise."""
    prior = _prior_of(student, "--interpolate")
    a, b = (prior.encode(_encoded(student, one, "--interpolate")) for one in (first, second))
    z = slerp(a, b, torch.linspace(0, 1, num, device=a.device))
    noise = torch.randn(1, *student.config.shape, generator=torch.Generator().manual_seed(seed)).to(student.device)
    start = prior.place(z, noise.expand(num, *student.config.shape))
    sampler = asked_for(student.config.sampler, solver=solver)
    return student.pictures(sampler(student.flow_map, start.x1, dict(start.conditioning), steps=steps))


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(N, Z): from a (1, Z) at share 0 to b at 1, the direction along the great arc, the length linearly; straight where they are parallel."""
    lengths = a.norm(), b.norm()
    u, v = a / lengths[0].clamp_min(1e-12), b / lengths[1].clamp_min(1e-12)
    angle = torch.acos((u * v).sum().clamp(-1, 1))
    share = share.unsqueeze(1)
    if float(angle.sin()) < 1e-4:
        return torch.lerp(a, b, share)
    direction = (torch.sin((1 - share) * angle) * u + torch.sin(share * angle) * v) / angle.sin()
    return direction * torch.lerp(lengths[0], lengths[1], share)


def read_picture(path: str | Path, channels: int, key: str) -> Tensor:
    """(C, H, W) in [-1, 1] of an image file, upright and on white, grey for one channel and colour for three; ValueError names `key`."""
    import numpy as np

    try:
        image, _ = load_upright(str(path))
    except ValueError as error:
        raise ValueError(f"{key}: {path}: is no picture that can be read: {error}") from error
    pixels = np.array(image.convert({1: "L", 3: "RGB"}[channels]), dtype=np.float32)
    return from_bytes(torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1))


def read_mask(path: str | Path) -> Tensor:
    """(H, W) bool of an image file: true where it is light, that is, to be drawn anew."""
    return read_picture(path, 1, "--mask")[0] > 0


def picture_shape(student: Student) -> tuple[int, int, int]:
    """The shape (C, H, W) of the student's pictures; those of latents are as large as their decoder makes them."""
    shape = tuple(student.config.shape)
    if len(shape) != 3 or isinstance(student.config.samples, TextLatents):
        raise ValueError(f"this student's samples, of shape {shape}, are no pictures")
    if isinstance(student.config.samples, ImageLatents):
        shape = student.pictures(torch.zeros(1, *shape, device=student.device)).shape[1:]
    channels, height, width = shape
    return channels, height, width


def _prior_of(student: Student, key: str) -> LearnedPrior:
    if student.prior is None:
        raise ValueError(f"{key}: this student starts at N(0, I): editing goes through the code of a learned prior")
    return student.prior.to(student.device)


def _encoded(student: Student, picture: Tensor, key: str) -> Tensor:
    """A picture as one of the student's samples, (1, *shape)."""
    wanted = picture_shape(student)
    if tuple(picture.shape) != wanted:
        raise ValueError(f"{key}: the picture is {_size(picture.shape)}, this student's are {_size(wanted)}")
    x = picture.unsqueeze(0).to(student.device)
    return x if student.autoencoder is None else student.autoencoder.to(student.device).encode(x)


def _hole(student: Student, picture: Tensor, mask: Tensor) -> Tensor:
    """The mask over samples, (1, 1, h, w)."""
    if tuple(mask.shape) != tuple(picture.shape[1:]):
        raise ValueError(f"--mask: is {_size(mask.shape)}, the picture is {_size(picture.shape)}")
    if not bool(mask.any()):
        raise ValueError("--mask: masks nothing; what is light in it is drawn anew")
    hole = mask.float()[None, None].to(student.device)
    return F.adaptive_max_pool2d(hole, tuple(student.config.shape[1:])) > 0


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"

"""Editing pictures through the code z of a learned prior: inpainting, and interpolation between two pictures.

Source: LeDiFlow (arXiv:2505.20723) names both uses; the methods are our own. Clock: 0 data, 1 noise.
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

ROUNDS = 4  # of finding the code of a masked picture, each with the hole filled by the last code's decoding


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
    """(num, C, H, W): copies of the picture (C, H, W) in [-1, 1], with new content where the mask (H, W) is true.

    z is the code of the picture, with the hole filled by what z itself decodes to. All samples share z and differ in
    their noise. After each step the known part is reset to its own path, (1 - s) x0 + s x1, and at the end to the
    picture exactly. A student of latents keeps a latent if none of its pixels is masked. Raises ValueError for a
    student without a learned prior, or a mask or picture of another size.
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
    """The code (1, Z) of the known part of x0 (1, ...); hole (1, 1, ...) is true where x0 is unknown."""
    z = torch.zeros(1, prior.size, device=x0.device)
    for _ in range(ROUNDS):
        z = prior.encode(torch.where(hole, prior.model.decode(z)[0], x0))
    return z


def _resolved(student: Student, x1: Tensor, cond, x0: Tensor, hole: Tensor, steps: int, solver: str | None) -> Tensor:
    """x1 carried to t = 0 by the student's sampler; after each step the known part is reset to its path."""
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
    """(num, C, H, W): samples of codes on the great arc between the codes of two pictures, all with the same noise."""
    prior = _prior_of(student, "--interpolate")
    a, b = (prior.encode(_encoded(student, one, "--interpolate")) for one in (first, second))
    z = slerp(a, b, torch.linspace(0, 1, num, device=a.device))
    noise = torch.randn(1, *student.config.shape, generator=torch.Generator().manual_seed(seed)).to(student.device)
    start = prior.place(z, noise.expand(num, *student.config.shape))
    sampler = asked_for(student.config.sampler, solver=solver)
    return student.pictures(sampler(student.flow_map, start.x1, dict(start.conditioning), steps=steps))


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(N, Z): codes from a (1, Z) at share 0 to b at share 1, straight where the two are parallel.

    The direction follows the great arc, the length is linear.
    """
    lengths = a.norm(), b.norm()
    u, v = a / lengths[0].clamp_min(1e-12), b / lengths[1].clamp_min(1e-12)
    angle = torch.acos((u * v).sum().clamp(-1, 1))
    share = share.unsqueeze(1)
    if float(angle.sin()) < 1e-4:
        return torch.lerp(a, b, share)
    direction = (torch.sin((1 - share) * angle) * u + torch.sin(share * angle) * v) / angle.sin()
    return direction * torch.lerp(lengths[0], lengths[1], share)


def read_picture(path: str | Path, channels: int, key: str) -> Tensor:
    """(C, H, W) in [-1, 1] of an image file, upright and on white; grey for 1 channel, RGB for 3. Raises ValueError
    with `key`.
    """
    import numpy as np

    try:
        image, _ = load_upright(str(path))
    except ValueError as error:
        raise ValueError(f"{key}: {path}: is no picture that can be read: {error}") from error
    pixels = np.array(image.convert({1: "L", 3: "RGB"}[channels]), dtype=np.float32)
    return from_bytes(torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1))


def read_mask(path: str | Path) -> Tensor:
    """(H, W) bool of an image file, true where it is light: the part to replace."""
    return read_picture(path, 1, "--mask")[0] > 0


def picture_shape(student: Student) -> tuple[int, int, int]:
    """The shape (C, H, W) of the student's pictures. For latents it is that of the decoded picture."""
    shape = tuple(student.config.shape)
    if len(shape) != 3 or isinstance(student.config.samples, TextLatents):
        raise ValueError(f"this student's samples, of shape {shape}, are no pictures")
    if isinstance(student.config.samples, ImageLatents):
        shape = student.pictures(torch.zeros(1, *shape, device=student.device)).shape[1:]
    channels, height, width = shape
    return channels, height, width


def _prior_of(student: Student, key: str) -> LearnedPrior:
    if student.prior is None:
        raise ValueError(f"{key}: this student starts from N(0, I); editing needs the code of a learned prior")
    return student.prior.to(student.device)


def _encoded(student: Student, picture: Tensor, key: str) -> Tensor:
    """The picture as one sample of the student, (1, *shape)."""
    wanted = picture_shape(student)
    if tuple(picture.shape) != wanted:
        raise ValueError(f"{key}: the picture is {_size(picture.shape)}, this student's are {_size(wanted)}")
    x = picture.unsqueeze(0).to(student.device)
    return x if student.autoencoder is None else student.autoencoder.to(student.device).encode(x)


def _hole(student: Student, picture: Tensor, mask: Tensor) -> Tensor:
    """The mask of samples, (1, 1, h, w)."""
    if tuple(mask.shape) != tuple(picture.shape[1:]):
        raise ValueError(f"--mask: is {_size(mask.shape)}, the picture is {_size(picture.shape)}")
    if not bool(mask.any()):
        raise ValueError("--mask: masks nothing; light pixels are replaced")
    hole = mask.float()[None, None].to(student.device)
    return F.adaptive_max_pool2d(hole, tuple(student.config.shape[1:])) > 0


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"

"""Editing through the code of a learned prior: known parts are unchanged, interpolation stays between its ends.

Inputs that do not fit are refused in one line.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowmap.flow.codes import NormalDraws
from flowmap.flow.prior import LearnedPrior
from flowmap.nets.auxiliary import ConvPrior
from flowmap.nets.mlp import MLP
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.edit import code_of_part, inpaint, interpolate, read_mask, read_picture, slerp
from flowmap.student.folder import load_student, save_student
from flowmap.student.prior import PRIOR, PriorConfig, Shipped, save_prior
from flowmap.student.student import Student

SHAPE = (1, 8, 12)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    net = ConvPrior(size=4, channels=(8,), groups=4)
    shipped = Shipped(4, 1.0, True, "prior", "0" * 8)
    config = StudentConfig(
        net=MLP(width=16, depth=1), sampler=Deterministic(), shape=SHAPE, arrival=False, prior=shipped
    )
    save_student(tmp_path / "student", config, config.build().state_dict(), recipe="", card="")
    save_prior(tmp_path / "student" / PRIOR, PriorConfig(net, SHAPE), net.build(SHAPE).state_dict(), {})
    return tmp_path


def picture(path, seed, size=(12, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels.astype(np.float32)).unsqueeze(0) / 127.5 - 1


def half(path, size=(12, 8)):
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels) > 0


@pytest.mark.parametrize("solver", [None, "heun"])
def test_what_is_known_is_kept_exactly_and_what_is_not_is_drawn(folder, solver):
    student = load_student(folder)
    known, mask = picture(folder / "a.png", 1), half(folder / "mask.png")
    drawn = inpaint(student, known, mask, 5, steps=3, solver=solver, seed=2)
    assert drawn.shape == (5, *SHAPE)
    assert torch.equal(drawn[:, :, ~mask], known.expand(5, *SHAPE)[:, :, ~mask])
    assert drawn[:, :, mask].std(0).mean() > 0.1 and torch.equal(
        drawn, inpaint(student, known, mask, 5, steps=3, solver=solver, seed=2)
    )


def test_the_code_of_a_part_does_not_depend_on_what_the_mask_hides(folder):
    prior = load_student(folder).prior
    x0, hole = torch.randn(1, *SHAPE), torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
    hole[..., :5] = True
    other = torch.where(hole, torch.randn(1, *SHAPE), x0)
    assert torch.equal(code_of_part(prior, x0, hole), code_of_part(prior, other, hole))
    assert torch.equal(code_of_part(prior, x0, ~hole & hole), prior.encode(x0))


def test_known_pixels_stay_on_their_own_path():
    """With F = x1 - x0 of the known picture everywhere, the whole picture is restored under any mask and step count."""
    x0 = torch.randn(1, *SHAPE)

    class Exact(torch.nn.Module):
        """x1 ~ N(0, I), and every path leads straight to x0."""

        def mean_velocity(self, x, t, s, cond=None):
            return (x - x0) / t.view(-1, 1, 1, 1)

        def forward(self, x, t, s, cond=None):
            return x + (s - t).view(-1, 1, 1, 1) * self.mean_velocity(x, t, s, cond)

    class Standard(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.zeros(1))

        def encode(self, x):
            return torch.zeros(len(x), 2), torch.zeros(len(x), 2)

        def decode(self, z):
            return (torch.zeros(len(z), *SHAPE),) * 2

    config = StudentConfig(
        net=MLP(),
        sampler=Deterministic(),
        shape=SHAPE,
        arrival=False,
        samples=Pixels(clamp=False),
        prior=Shipped(2, 1.0, False, "", ""),
    )
    flow_map = Exact()
    flow_map.nothing = torch.nn.Parameter(torch.zeros(1))
    student = Student(config, flow_map)
    student.prior = LearnedPrior(Standard(), NormalDraws(), 2, conditioning=False)
    mask = torch.zeros(SHAPE[1:], dtype=torch.bool)
    mask[2:5, 3:7] = True
    torch.testing.assert_close(inpaint(student, x0[0], mask, 3, steps=4), x0.expand(3, *SHAPE), rtol=0, atol=1e-5)


def test_interpolation_ends_at_both_codes_and_is_even_on_the_arc(folder):
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    share = torch.linspace(0, 1, 5)
    z = slerp(a, b, share)
    torch.testing.assert_close(z[[0, -1]], torch.cat([a, b]), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.atan2(z[:, 1], z[:, 0]), share * torch.pi / 2)
    torch.testing.assert_close(z.norm(dim=1), 2 + share)
    torch.testing.assert_close(slerp(a, 2 * a, share), a + share.unsqueeze(1) * a)
    student = load_student(folder)
    first, second = picture(folder / "a.png", 1), picture(folder / "b.png", 2)
    drawn = interpolate(student, first, second, 5, steps=2)
    back = interpolate(student, second, first, 5, steps=2)
    assert drawn.shape == (5, *SHAPE)
    torch.testing.assert_close(drawn, back.flip(0), rtol=0, atol=1e-5)


def test_by_the_command_line(folder, command):
    picture(folder / "a.png", 1), picture(folder / "b.png", 2), half(folder / "mask.png")
    arguments = ("sample", "--student", folder, "--num", 3, "--steps", 2, "--out", folder / "out")
    code, out, err = command(
        *arguments, "--inpaint", folder / "a.png", "--mask", folder / "mask.png", "--solver", "midpoint"
    )
    assert code == 0 and (folder / "out" / "steps-2" / "00002.png").is_file(), err
    kept, drawn = (
        np.array(Image.open(path))[:, 6:] for path in (folder / "a.png", folder / "out" / "steps-2" / "00001.png")
    )
    assert (kept == drawn).all()
    assert command(*arguments, "--interpolate", folder / "a.png", folder / "b.png")[0] == 0


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--inpaint", "a.png"], "--inpaint and --mask: go together"),
        (["--inpaint", "a.png", "--mask", "small.png"], "--mask: is 6x4, the picture is 12x8"),
        (["--inpaint", "small.png", "--mask", "small.png"], "--inpaint: the picture is 6x4, this student's are 12x8"),
        (["--inpaint", "a.png", "--mask", "black.png"], "--mask: masks nothing"),
        (["--inpaint", "no.png", "--mask", "mask.png"], "--inpaint: no.png: is no picture"),
        (["--interpolate", "a.png", "text.png"], "--interpolate: text.png: is no picture"),
        (["--interpolate", "a.png", "b.png", "--gamma", "0.5"], "exclude one another"),
        (["--interpolate", "a.png", "b.png", "--compile"], "exclude one another"),
        (["--solver", "heun", "--gamma", "0.5"], "gamma"),
        (["--interpolate", "a.png", "b.png", "--num", "0"], "num: 0 must be 1 or more"),
        (["--inpaint", "a.png", "--mask", "mask.png", "--num", "-1"], "num: -1 must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, command, monkeypatch, extra, says):
    monkeypatch.chdir(folder)
    picture("a.png", 1), picture("b.png", 2), half("mask.png"), picture("small.png", 3, (6, 4))
    Image.new("L", (12, 8), 0).save("black.png")
    (folder / "text.png").write_text("no picture")
    code, out, err = command("sample", "--student", folder, "--num", 2, "--steps", 1, "--out", folder / "out", *extra)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


def test_the_prior_of_another_student_is_refused(folder, command):
    other = ConvPrior(size=6, channels=(8,), groups=4)
    save_prior(folder / "student" / PRIOR, PriorConfig(other, SHAPE), other.build(SHAPE).state_dict(), {})
    code, out, err = command("sample", "--student", folder, "--num", 2, "--out", folder / "out")
    assert code == 2 and "its student was trained on codes of" in err and len(err.strip().splitlines()) == 1


def test_a_student_from_the_gaussian_prior_is_refused(finished, folder, command):
    picture(folder / "a.png", 1), half(folder / "mask.png")
    code, out, err = command(
        "sample",
        "--student",
        finished,
        "--out",
        folder / "out",
        "--inpaint",
        folder / "a.png",
        "--mask",
        folder / "mask.png",
    )
    assert code == 2 and "are no pictures" in err


def test_export_is_refused_in_one_line(folder, command):
    code, out, err = command("export", "--student", folder, "--to", "torch", "--out", folder / "exported")
    assert code == 2 and "starts at a learned prior" in err and len(err.strip().splitlines()) == 1


def test_a_picture_to_edit_stands_upright_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by a quarter, clockwise
    stored = np.zeros((2, 3), dtype=np.uint8)
    stored[0, 0] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png", 1, "--inpaint")[0].tolist() == [[-1, 1], [-1, -1], [-1, -1]]
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool(read_mask(tmp_path / "clear.png").all())
    with pytest.raises(
        ValueError, match="--mask: /dev/zero: is no picture that can be read: cannot be read: is not a regular file"
    ):
        read_mask("/dev/zero")

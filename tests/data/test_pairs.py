"""How samples of pairs are kept, and what the settings make of numbers."""

import pytest
import torch

from flowmap.base.files import write_tensors
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Latents, Pairs, Pictures
from flowmap.data.pairs import COUPLINGS, noises, pack, unpack
from flowmap.flow.solver import SOLVERS, Heun
from flowmap.plan.plan import resolve
from flowmap.prepare.make_pairs import Maker, verify
from flowmap.recipe import read_recipe
from tests.support.oracle import draw


def test_grey_levels_come_back_exactly_and_everything_else_to_half_a_level():
    levels = torch.arange(256, dtype=torch.uint8)
    pictures = levels.float() / 127.5 - 1
    assert torch.equal(pack(pictures, "uint8"), levels) and torch.equal(pack(unpack(levels), "uint8"), levels)
    x = draw(5, 3, 4, 6).float().clamp(-1, 1)
    assert (unpack(pack(x, "uint8")) - x).abs().max() <= 0.5 / 127.5 + 1e-6
    assert unpack(pack(torch.tensor([-3.0, 3.0]), "uint8")).tolist() == [-1, 1]  # cut off


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("float32", 0.0)])
def test_floats_keep_their_precision(dtype, error):
    x = draw(5, 3, 4, 6).float()
    kept = pack(x, dtype)
    assert str(kept.dtype) == f"torch.{dtype}" and ((unpack(kept) - x).abs() <= error * x.abs() + 1e-7).all()


def test_the_share_of_inverted_pairs_is_a_count():
    assert [
        Pairs(recipe="r", num=n, inverted=s).num_inverted for n, s in ((10, 0.0), (10, 0.25), (10, 1.0), (63, 0.4))
    ] == [0, 2, 10, 25]
    assert noises(0, [3, 4], (2,)).shape == (2, 2)
    assert set(COUPLINGS) == {"independent", "pairs", "styles"} and {"euler", "heun", "rk4"} <= set(SOLVERS)


class Halves:
    """v = x / 2: a guided velocity that needs no condition."""

    def velocity(self, x, t, cond=None):
        return x / 2


@pytest.mark.parametrize(("kind", "cls", "dtype"), [("pictures", Pictures, "uint8"), ("latents", Latents, "float16")])
def test_pictures_are_kept_in_bytes_and_latents_in_half_precision(tmp_path, monkeypatch, kind, cls, dtype):
    import flowmap.prepare.make_pairs as module

    write_tensors(tmp_path / "data" / "a.safetensors", {"x0": draw(20, 3, 4, 6).float().clamp(-1, 1)})
    data = f"data={{kind: {kind}, root: {tmp_path / 'data'}}}"
    recipe = read_recipe(
        "digits", [data, "objective={kind: rectified}", "teacher.guidance=null", "student={kind: mlp}", "metrics=[]",
                   f"coupling={{kind: pairs, recipe: digits, num: 12, inverted: 0.5, root: {tmp_path / 'p'}, "
                   "solver: {kind: heun, steps: 4}}"]
    )  # fmt: skip
    monkeypatch.setattr(module, "build_pairs_teacher", lambda run, data: BuiltTeacher(Halves(), None))
    run = resolve(recipe)
    index = module.make_pairs(run)
    maker = Maker.of(run, "cpu")
    assert (
        index["dtype"] == maker.dtype == dtype and type(recipe.data) is cls and index["contents"]["shape"] == [3, 4, 6]
    )
    assert verify(run, num=12)[0] == 0
    x0, cond, x1 = module.PairedDataset(tmp_path / "p", maker.data, maker.identity).__getitems__(range(12))
    assert cond == {}
    exact = Heun(steps=4)(lambda x, t: x / 2, x0[6:], start=0.0, end=1.0).x  # from the picture as it is kept
    assert torch.equal(x1[6:], exact.half().float())
    solved = Heun(steps=4)(lambda x, t: x / 2, noises(0, range(6), (3, 4, 6))).x
    assert torch.equal(x0[:6], unpack(pack(solved, dtype)))

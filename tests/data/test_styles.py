"""The coupling of two empirical sets: who starts where."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from flowmap.data.text.dataset import Attribute, TextDataset
from flowmap.data.text.styles import StyledDataset, Styles


def data(num=40):
    """Latent i of the training part is (i, i), its style i % 2; held-out ones are negative."""
    code = torch.arange(num)
    latents = code.float()[:, None].repeat(1, 2)
    return TextDataset(
        "text", latents, -latents, texts=[f"train {i}" for i in range(num)],
        held_out_texts=[f"out {i}" for i in range(num)],
        attributes=(Attribute("style", ("plain", "odd")),), codes={"style": code % 2},
        held_out_codes={"style": code % 2},
    )  # fmt: skip


STYLES = Styles(source=("style=plain",), target=("style=odd",))


def test_each_set_is_its_style():
    found = StyledDataset.of(data(), STYLES)
    assert (
        (found.train[:, 0] % 2 == 1).all()
        and (found.sources[:, 0] % 2 == 0).all()
        and len(found) == len(found.texts) == 20
    )
    x1, texts = found.starts(50)
    assert (x1 <= 0).all() and len(x1) == len(texts) == 50 and texts[:10] == texts[20:30]
    assert (
        sorted(texts[:20]) == sorted(found.held_out_source_texts) != texts[:20]
    )  # each once before any comes again, and not as they are sorted
    assert set(found.__getitems__([0, 1])[1]) == {"style"}


def test_no_sample_is_paired_by_its_index():
    """Every target is paired with every source: over many draws all are equally frequent, and two steps differ."""
    found = StyledDataset.of(data(), STYLES)
    draws = torch.stack([found.partners(found.train[:20], torch.Generator().manual_seed(i))[:, 0] for i in range(2000)])
    counts = torch.stack([torch.bincount((column / 2).long(), minlength=20) for column in draws.T])
    assert counts.min() > 50 and counts.max() < 150  # 100 expected, standard deviation 10


def test_partners_are_a_function_of_the_generator():
    found = StyledDataset.of(data(), STYLES)
    one, two, three = (found.partners(found.train[:16], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_optimal_partners_are_the_nearest_together():
    """Against every order of a small batch; the same sentences are drawn as for independent ones, in another order."""
    found, mixed = (
        StyledDataset.of(data(), Styles(STYLES.source, STYLES.target, match)) for match in ("optimal", "independent")
    )
    x0 = found.train[torch.tensor([7, 1, 12, 3, 18])]
    x1, drawn = (one.partners(x0, torch.Generator().manual_seed(4)) for one in (found, mixed))
    least = min((drawn[list(order)] - x0).square().sum() for order in permutations(range(5)))
    assert (x1 - x0).square().sum() == least < (drawn - x0).square().sum()
    assert torch.equal(x1[:, 0].sort().values, drawn[:, 0].sort().values)


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (("style=loud",), ("style=odd",), "coupling.source: style: 'loud' was never seen; allowed: plain, odd"),
        (("colour=red",), ("style=odd",), "coupling.source: colour: is no attribute"),
    ],
)
def test_styles_that_are_not_there(source, target, says):
    with pytest.raises(ValueError, match=says):
        StyledDataset.of(data(), Styles(source, target))


def test_what_is_no_coupling():
    for arguments in (
        (),
        (("style",), ("style=odd",)),
        (("style=odd",), ("style=odd",)),
        (("style=odd",), ("style=plain",), "near"),
    ):
        with pytest.raises(ValueError, match="source|target|match"):
            Styles(*arguments)
    with pytest.raises(ValueError, match="latents of sentences"):
        StyledDataset.of(SimpleNamespace(), STYLES)

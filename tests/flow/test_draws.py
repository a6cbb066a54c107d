"""Draws per sample: Philox's published numbers, the distributions, and rows independent of the batch."""

import pytest
import torch

from flowmap.flow.draws import RowGenerator, for_codes, normal_like, normal_rows, normals, of_samples, uniforms
from flowmap.flow.philox import WORD, philox
from tests.support.oracle import seeded

ROWS = torch.tensor([7, 0, 3, 2**40 + 1, 12])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox(tuple(torch.full((5, 3), word) for word in counter), key)
    assert (
        words.shape == (4, 5, 3)
        and words[:, 4, 2].tolist() == list(expected)
        and words[:, 0, 0].tolist() == list(expected)
    )


def every_draw(generator):
    """All kinds of draws, in an order in which single and whole ones alternate."""
    found = [generator.normal((3, 4, 6)), generator.uniform((7,)), generator.uniform(), generator.single_normal()]
    return [
        *found,
        generator.normal((5,)),
        generator.normal((5,)),
        *(generator.integers(10) for _ in range(6)),
        generator.uniform(),
    ]


def test_a_row_is_the_same_alone_in_another_order_and_narrowed_midway():
    whole = every_draw(RowGenerator("a", ROWS))
    order = torch.tensor([3, 1, 4])
    for found in (every_draw(RowGenerator("a", ROWS[order])), every_draw(RowGenerator("a", ROWS).at(order))):
        assert all(torch.equal(part, draw[order]) for part, draw in zip(found, whole, strict=True))
    midway = RowGenerator("a", ROWS)
    midway.normal((3, 4, 6)), midway.uniform((7,)), midway.uniform()
    part = midway.at(slice(1, 3))
    assert torch.equal(part.single_normal(), whole[3][1:3]) and torch.equal(part.normal((5,)), whole[4][1:3])
    assert torch.equal(midway.single_normal(), whole[3])  # what is narrowed draws nothing of the whole


def test_draws_names_and_rows_differ():
    one = every_draw(RowGenerator("a", ROWS))
    assert not torch.equal(one[4], one[5]) and not torch.equal(one[2], one[-1])
    for other in (
        RowGenerator("b", ROWS),
        RowGenerator("a", ROWS + 1),
        RowGenerator("a", ROWS + 2**32),
        RowGenerator("a", ROWS).for_codes("code"),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(one[:6], every_draw(other)[:6], strict=True))
    assert len({float(x) for x in one[0].flatten()}) == one[0].numel()


def test_one_draw_for_all_rows_is_a_function_of_name_and_step_alone():
    drawn = lambda name, rows, step: (lambda g: [g.together(1000) for _ in range(8)])(RowGenerator(name, rows, step))
    assert drawn("a", ROWS, 3) == drawn("a", ROWS[:1], 3) != drawn("a", ROWS, 4) and drawn("a", ROWS, 3) != drawn(
        "b", ROWS, 3
    )
    assert len(set(drawn("a", ROWS, 3))) > 4 and all(0 <= one < 1000 for one in drawn("a", ROWS, 3))


def test_the_laws():
    """100,000 numbers: standard errors of a normal's first four moments are 0.003, 0.0045, 0.012 and 0.031."""
    generator = RowGenerator("laws", torch.arange(20_000))
    for z in (generator.normal((5,)).double(), torch.stack([generator.single_normal() for _ in range(5)], 1).double()):
        moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
        assert (
            moments == pytest.approx([0, 1, 0, 3], abs=0.12) and abs(moments[0]) < 0.012 and abs(moments[1] - 1) < 0.018
        )
        assert float((torch.corrcoef(z.T) - torch.eye(5)).abs().max()) < 0.03  # 4 standard errors of 20,000 pairs
    for u in (generator.uniform((5,)), torch.stack([generator.uniform() for _ in range(5)], 1)):
        assert float(u.min()) >= 0 and float(u.max()) < 1
        counts = torch.histc(u, bins=10, min=0, max=1)
        assert float((counts - 10_000).abs().max()) < 4 * 9000**0.5
    assert generator.integers(7).unique().tolist() == list(range(7))


def test_noise_is_typed_and_placed_like_x_and_functions_take_either_generator():
    x = torch.zeros(5, 3, 4, 6, dtype=torch.float64)
    noise = normal_like(x, RowGenerator("a", ROWS))
    assert noise.dtype == torch.float64 and torch.equal(noise.float(), RowGenerator("a", ROWS).normal((3, 4, 6)))
    for generator in (RowGenerator("a", ROWS), seeded(1), None):
        assert uniforms(5, "cpu", generator).shape == normals(5, "cpu", generator).shape == (5,)
        assert for_codes(generator) is None or type(for_codes(generator)) is type(generator)


def test_first_rows_of_torchs_own_normal_numbers_do_not_depend_on_their_count():
    assert torch.equal(normal_rows((8, 6), seeded(3)), torch.randn(8, 6, generator=seeded(3)))
    for num in range(1, 20):
        assert torch.equal(normal_rows((num, 3), seeded(3)), normal_rows((40, 3), seeded(3))[:num])


def test_what_samples_draw_on_their_way_is_a_function_of_the_generators_state_and_of_their_place():
    places, generator = torch.arange(10), seeded(3)
    whole = of_samples(generator, places).normal((4,))
    assert torch.equal(generator.get_state(), seeded(3).get_state())
    assert torch.equal(of_samples(seeded(3), places[1::3]).normal((4,)), whole[1::3])
    assert torch.equal(
        of_samples(RowGenerator("a", places), places[1::3]).normal((4,)), RowGenerator("a", places[1::3]).normal((4,))
    )
    torch.rand(7, generator=generator)  # a second call with one generator
    assert not any(torch.equal(of_samples(other, places).normal((4,)), whole) for other in (generator, seeded(4)))

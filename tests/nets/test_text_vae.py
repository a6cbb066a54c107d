"""The text autoencoder: a causal decoder, whose remembered keys and values change nothing."""

import pytest
import torch

from flowmap.nets.text_vae import IGNORED, TextVAE

SPECIAL = (0, 1, 2, 3)


@pytest.fixture(
    params=[(1, False), (3, False), (1, True), (3, True)],
    ids=["vector", "sequence", "vector-direct", "sequence-direct"],
)
def net(request):
    torch.manual_seed(0)
    slots, direct = request.param
    return (
        TextVAE(slots=slots, direct=direct, dims=4, width=16, depth=2, heads=2, vocab=13, special=SPECIAL)
        .build((7,))
        .double()
    )


ROWS = torch.tensor(
    [
        [4, 5, 6, 7, 8, 9, 2],
        [5, 2, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0, 0],
        [12, 11, 10, 9, 8, 7, 6],
        [6, 6, 6, 2, 0, 0, 0],
    ]
)


def test_a_token_changes_what_is_said_after_it_alone(net):
    z = net.moments(ROWS)[0]
    said, _ = net.logits(z, ROWS)
    changed = ROWS.clone()
    changed[0, 3] = 11
    again, _ = net.logits(z, changed)
    moved = (said - again).abs().amax(-1)
    assert float(moved[0, :4].max()) == 0 and float(moved[0, 4:].min()) > 0 and float(moved[1:].max()) == 0


def test_every_entry_of_the_latent_reaches_every_token(net):
    z = net.moments(ROWS)[0].detach().requires_grad_(True)
    net.logits(z, ROWS)[0][0, 0].sum().backward()
    assert (z.grad[0] != 0).all() and float(z.grad[1:].abs().max()) == 0


def test_generating_is_the_likeliest_next_token_of_the_whole_row(net):
    z = torch.randn(5, *net.spec.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = net.generate(z)
    said, targets = net.logits(z, rows)
    seen = targets != IGNORED
    assert torch.equal(said.argmax(-1)[seen], rows[seen])


def test_what_pads_and_how_far_changes_no_latent(net):
    mean, logvar = net.moments(ROWS[1:3])
    for rows in (ROWS[1:3, :2], torch.tensor([[5, 2, 9, 9, 9, 9, 9], [2, 9, 9, 9, 9, 9, 9]])):
        again = net.moments(rows)
        torch.testing.assert_close(again[0], mean), torch.testing.assert_close(again[1], logvar)


def test_direct_paths_start_by_copying():
    """Without training nearly half of the tokens are copied (2 % by chance); a latent entry belongs to one position."""
    torch.manual_seed(0)
    net = TextVAE(slots=4, dims=28, direct=True, width=64, depth=1, heads=2, vocab=50, special=SPECIAL).build((7,))
    rows = torch.randint(4, 50, (200, 7))
    said, targets = net.logits(net.moments(rows)[0], rows)
    assert float((said.argmax(-1) == targets).float().mean()) > 0.4
    direct = lambda rows: net.into(net.embed(rows).flatten(1))
    changed = rows[:1].clone()
    changed[0, 3] = (changed[0, 3] - 3) % 46 + 4
    assert int((direct(changed) != direct(rows[:1])).sum()) == 4 * 28 // 7


def test_targets_end_with_the_end_token(net):
    _, targets = net.logits(net.moments(ROWS)[0], ROWS)
    assert (targets != IGNORED).sum(1).tolist() == [7, 2, 1, 7, 4]


def test_an_end_token_may_also_be_what_pads():
    torch.manual_seed(0)
    net = TextVAE(slots=2, dims=3, width=16, depth=1, heads=2, vocab=9, special=(2, 2, 2, 3)).build((5,))
    rows = torch.tensor([[4, 5, 2, 2, 2], [4, 2, 2, 2, 2]])
    assert (net.logits(net.moments(rows)[0], rows)[1] != IGNORED).sum(1).tolist() == [3, 2]
    assert net.generate(torch.randn(2, 3, 1, 2)).shape == (2, 5)


def test_drawing_at_a_temperature_is_a_function_of_the_generator(net):
    z = torch.randn(5, *net.spec.latent_shape, dtype=torch.float64)
    one, two = (net.generate(z, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, net.generate(z, 1.0, torch.Generator().manual_seed(4)))


def test_what_cannot_be_built_is_said():
    with pytest.raises(ValueError, match="heads"):
        TextVAE(width=10, heads=4)
    with pytest.raises(ValueError, match="rows of tokens"):
        TextVAE(vocab=9, special=SPECIAL).build((3, 4, 4))
    with pytest.raises(ValueError, match="vocab"):
        TextVAE().build((5,))

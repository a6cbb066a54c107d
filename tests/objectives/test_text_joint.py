"""Autoencoder and flow together: the gradient is the lexicographic one, and shrinking latents is worth nothing."""

import pytest
import torch

from flowmap.flow.barrier import barrier, lexicographic
from flowmap.flow.path import Linear
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.nets.text_joint import TextJoint as Net
from flowmap.nets.text_vae import TextVAE
from flowmap.objectives.language import TextELBO, TextJoint, normalised

ROWS = torch.tensor(
    [
        [4, 5, 6, 2, 0],
        [5, 2, 0, 0, 0],
        [7, 7, 7, 7, 2],
        [6, 4, 2, 0, 0],
        [4, 2, 0, 0, 0],
        [5, 6, 7, 2, 0],
        [6, 2, 0, 0, 0],
    ]
).float()


@pytest.fixture
def student():
    torch.manual_seed(0)
    spec = Net(
        flow=MLP(width=16),
        autoencoder=TextVAE(slots=2, dims=3, width=16, depth=1, heads=2),
        vocab=8,
        special=(0, 1, 2, 3),
    )
    return FlowMapNet(spec.build((5,)))


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(1)
    return Linear().sample(
        ROWS, torch.randn(7, 5, generator=generator), torch.rand(7, generator=generator), torch.zeros(7)
    )


def gradient(value, student):
    return torch.autograd.grad(value, list(student.parameters()), retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("least", [0.0, 100.0])
def test_the_gradient_is_that_of_the_lexicographic_combination(student, sample, least):
    objective = TextJoint(elbo=TextELBO(anneal_steps=0), least=least, alpha=0.5, beta=2.0)
    loss = objective(student, None, sample, 3)
    first, flow = objective.elbo(student, None, sample, 3), objective.flow(student, sample)
    of_first, of_flow = gradient(first.value, student), gradient(flow, student)
    phi = barrier(of_first, least, first.value.detach(), alpha=0.5, beta=2.0)
    for one, other in zip(gradient(loss.value, student), lexicographic(of_first, of_flow, phi), strict=True):
        torch.testing.assert_close(one, other)
    falls = sum((a * b).sum() for a, b in zip(of_first, gradient(loss.value, student), strict=True))
    assert float(falls) >= float(phi) - 1e-5 * abs(float(phi))
    assert float(loss.logs["reconstruction"]) == pytest.approx(float(first.value)) and float(
        loss.logs["flow"]
    ) == pytest.approx(float(flow))


def test_the_same_draw_gives_the_same_loss(student, sample):
    objective = TextJoint()
    assert torch.equal(objective(student, None, sample, 0).value, objective(student, None, sample, 0).value)


def test_latents_are_scaled_and_shifted_away():
    z = torch.randn(9, 3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(normalised(1e-3 * z + 5), normalised(z))
    assert float(normalised(z).square().mean()) == pytest.approx(1) and float(normalised(z).mean(0).abs().max()) < 1e-12


def test_both_losses_fall(student, sample):
    objective = TextJoint(elbo=TextELBO(kl=0.01, anneal_steps=0))
    optimiser, seen = torch.optim.Adam(student.parameters(), 1e-2), []
    for step in range(40):
        loss = objective(student, None, sample, step)
        seen.append((float(loss.logs["reconstruction"]), float(loss.logs["flow"])))
        optimiser.zero_grad(), loss.value.backward(), optimiser.step()
    assert seen[-1][0] < 0.8 * seen[0][0] and seen[-1][1] < 0.9 * seen[0][1]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="least: -1 must be 0 or more"):
        TextJoint(least=-1)
    with pytest.raises(ValueError, match="flow: wants the settings of a network"):
        Net(flow=object())

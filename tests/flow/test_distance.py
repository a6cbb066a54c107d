import pytest
import torch

from flowmap.flow.distance import (
    DISTANCES,
    Adaptive,
    PseudoHuber,
    Squared,
    adaptive_weight,
    gradient_as_target,
    normalise,
)
from tests.support.oracle import SHAPE, draw

D = SHAPE[1] * SHAPE[2] * SHAPE[3]


@pytest.mark.parametrize("distance", [kind() for kind in DISTANCES.values()], ids=str)
def test_one_number_a_sample_zero_at_the_target_and_descending_to_it(distance):
    target, x = draw(seed=1), draw(seed=2).requires_grad_()
    value = distance(x, target)
    assert value.shape == (SHAPE[0],) and (value > 0).all()
    assert (distance(target, target) == 0).all()
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert ((grad * (x - target)).flatten(1).sum(1) > 0).all()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(distance(x[order], target[order]), value[order])


def test_squared():
    target, x = draw(seed=1), draw(seed=2)
    total = torch.stack([((a - b) ** 2).sum() for a, b in zip(x, target, strict=True)])
    torch.testing.assert_close(Squared(mean=False)(x, target), total)
    torch.testing.assert_close(Squared()(x, target), total / D)


def test_pseudo_huber_is_its_formula_with_k_of_cifar():
    assert abs(PseudoHuber().scale * 3072 - 1.659) < 1e-3  # 2-rectified flow++ on CIFAR-10
    target, x, k = draw(seed=1), draw(seed=2), 0.00054 * D
    formula = ((Squared(mean=False)(x, target) + k**2).sqrt() - k) / D
    torch.testing.assert_close(PseudoHuber()(x, target), formula)
    # far away it grows by length / D, near by it is the square / (2 k D)
    far, near = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    far[:, 0, 0, 0], near[:, 0, 0, 0] = 1e6, 1e-6
    torch.testing.assert_close(PseudoHuber()(far, 0 * far), torch.full((5,), (1e6 - k) / D, dtype=torch.float64))
    torch.testing.assert_close(
        PseudoHuber()(near, 0 * near), torch.full((5,), 1e-12 / (2 * k * D), dtype=torch.float64)
    )


def test_pseudo_huber_has_a_gradient_at_the_target():
    x = draw().requires_grad_()
    PseudoHuber()(x, x.detach()).sum().backward()
    assert (x.grad == 0).all()


def test_adaptive_weight_is_detached():
    target, x = draw(seed=1), draw(seed=2).requires_grad_()
    error = Squared(mean=False)(x, target)
    weight = adaptive_weight(error, power=0.75, offset=0.01)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, 1 / (error.detach() + 0.01) ** 0.75)
    (grad,) = torch.autograd.grad(Adaptive(0.75, 0.01)(x, target).sum(), x)
    torch.testing.assert_close(grad, weight[:, None, None, None] * 2 * (x - target).detach())
    torch.testing.assert_close(Adaptive(power=0)(x, target), error)


def test_gradient_as_target_has_the_given_gradient():
    F, g = draw(seed=1).requires_grad_(), draw(seed=2)
    loss = gradient_as_target(F, g)
    torch.testing.assert_close(loss, (g**2).flatten(1).sum(1))
    (grad,) = torch.autograd.grad(loss.sum(), F)
    torch.testing.assert_close(grad, 2 * g)


def test_gradient_as_target_gives_no_gradient_through_g():
    F, inside = draw(seed=1).requires_grad_(), draw(seed=2).requires_grad_()
    gradient_as_target(F, F * inside).sum().backward()
    assert inside.grad is None
    torch.testing.assert_close(F.grad, (2 * F * inside).detach())


def test_normalise():
    g = draw(seed=1) * torch.tensor([0, 1e-3, 1, 1e3, 7.0]).reshape(5, 1, 1, 1)
    length = g.flatten(1).norm(dim=1).reshape(5, 1, 1, 1)
    torch.testing.assert_close(normalise(g), g / (length + 0.1))
    torch.testing.assert_close(normalise(g, c=0.5, norm="rms"), g / (length / D**0.5 + 0.5))
    assert normalise(g, norm="none") is g
    assert (normalise(g)[0] == 0).all() and (normalise(g).flatten(1).norm(dim=1) < 1).all()


def test_reductions_of_bfloat16_are_float32():
    ones = torch.ones(3, 2000, dtype=torch.bfloat16)
    assert Squared(mean=False)(ones, 0 * ones).tolist() == [2000.0] * 3
    assert gradient_as_target(ones, ones).dtype == torch.float32
    assert normalise(ones).dtype == torch.bfloat16


def test_mistakes_are_named():
    for make, words in [
        (lambda: PseudoHuber(scale=0), "scale: 0 must be above 0"),
        (lambda: Adaptive(power=-1), "power: -1 must be 0 or more"),
        (lambda: Adaptive(offset=0), "offset: 0 must be above 0"),
        (lambda: normalise(draw(), norm="max"), "norm is 'max'.*rms"),
        (lambda: normalise(draw(), c=-0.1), "c is -0.1"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()

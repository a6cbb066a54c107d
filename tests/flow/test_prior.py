import pytest
import torch

from flowmap.flow.prior import PRIORS, Gaussian, normal_like
from tests.oracle import draw, seeded


def test_noise_is_a_function_of_the_generator_alone():
    x0 = draw(dtype=torch.float32)
    first, second = Gaussian().sample(x0, None, seeded(3)), Gaussian().sample(x0 + 5, {"class": torch.arange(5)}, seeded(3))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, Gaussian().sample(x0, None, seeded(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_of_another_precision_is_the_float32_noise_cast(dtype):
    in_float32 = normal_like(draw(dtype=torch.float32), seeded(3))
    torch.testing.assert_close(normal_like(draw(dtype=dtype), seeded(3)), in_float32.to(dtype), rtol=0, atol=0)


def test_moments():
    x1 = PRIORS["gaussian"]().sample(torch.zeros(40000, 3), None, seeded())
    assert abs(float(x1.mean())) < 0.03 and abs(float(x1.std()) - 1) < 0.015  # 5 standard errors


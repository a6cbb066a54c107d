import math

import pytest
import torch

from flowmap.flow.prior import PRIORS, Gaussian, chi_square, normal_like
from tests.support.oracle import draw, seeded


def test_noise_is_a_function_of_the_generator_alone():
    x0 = draw(dtype=torch.float32)
    first, second = (
        Gaussian().sample(x0, None, seeded(3)),
        Gaussian().sample(x0 + 5, {"class": torch.arange(5)}, seeded(3)),
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, Gaussian().sample(x0, None, seeded(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_of_another_precision_is_the_float32_noise_cast(dtype):
    in_float32 = normal_like(draw(dtype=torch.float32), seeded(3))
    torch.testing.assert_close(normal_like(draw(dtype=dtype), seeded(3)), in_float32.to(dtype), rtol=0, atol=0)


def test_moments():
    x1 = PRIORS["gaussian"]().sample(torch.zeros(40000, 3), None, seeded())
    assert abs(float(x1.mean())) < 0.03 and abs(float(x1.std()) - 1) < 0.015  # 5 standard errors


def test_chi_square_by_hand_and_of_true_noise():
    found = chi_square([8.0, 14.0, 11.0, 11.0], 10)
    assert (
        found["mean"] == 11 and math.isclose(found["std"], 6**0.5) and math.isclose(found["z"], 1 / math.sqrt(20 / 4))
    )
    assert math.isclose(found["p"], 0.6547, rel_tol=1e-3)
    noise = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (
        abs(chi_square(noise.square().sum(1).tolist(), 50)["z"])
        < 4
        < chi_square((1.1 * noise).square().sum(1).tolist(), 50)["z"]
    )

import pytest
import torch

from flowmap.flow.averaging import LARGEST_STD, exponent_from_std, posthoc_coefficients, power_beta, std_from_exponent
from tests.support.oracle import seeded


def test_known_exponents_and_the_way_back():
    assert (
        abs(exponent_from_std(0.05) - 16.97) < 0.005 and abs(exponent_from_std(0.10) - 6.94) < 0.005
    )  # EDM2, section 3.1
    for std in (0.01, 0.05, 0.13, LARGEST_STD):
        assert abs(std_from_exponent(exponent_from_std(std)) - std) < 1e-12


def track(trace, std, snapshots=()):
    """The average of `trace` (N, P) at its end, and at the steps asked for."""
    average, kept, exponent = torch.full_like(trace[0], 1e9), {}, exponent_from_std(std)
    for step, theta in enumerate(trace, start=1):
        beta = power_beta(step, exponent)
        average = beta * average + (1 - beta) * theta
        if step in snapshots:
            kept[step] = average
    return average, kept


def test_profile_has_its_std_and_forgets_the_start():
    """On the trace theta_i = one-hot(i) the average is the profile itself."""
    n = 2000
    profile, _ = track(torch.eye(n, dtype=torch.float64), 0.1)
    step = torch.arange(1, n + 1, dtype=torch.float64)
    exponent = exponent_from_std(0.1)
    torch.testing.assert_close(profile, (step ** (exponent + 1) - (step - 1) ** (exponent + 1)) / n ** (exponent + 1))
    mean = (profile * step).sum()
    assert abs(float((profile * (step - mean) ** 2).sum().sqrt()) / n - 0.1) < 1e-4
    assert abs(float(profile.sum()) - 1) < 1e-12


def random_walk(n, seed=0):
    return torch.randn(n, 50, generator=seeded(seed), dtype=torch.float64).cumsum(0)


def snapshots_of(trace, every):
    """Steps, stds and values of the averages of std 0.05 and 0.10, taken `every` so many steps."""
    steps, stds, values = [], [], []
    for std in (0.05, 0.10):
        _, kept = track(trace, std, range(every, len(trace) + 1, every))
        steps += list(kept)
        stds += [std] * len(kept)
        values += list(kept.values())
    return steps, stds, values


@pytest.mark.parametrize("target_std", [0.05, 0.07, 0.10, 0.15])
def test_posthoc_combination_is_the_directly_tracked_average(target_std):
    trace = random_walk(1600)
    steps, stds, snapshots = snapshots_of(trace, every=100)
    weights = posthoc_coefficients(steps, stds, target_std=target_std)
    assert weights.dtype == torch.float64 and abs(float(weights.sum()) - 1) < 1e-12
    ours, (direct, _) = (weights[:, None] * torch.stack(snapshots)).sum(0), track(trace, target_std)
    nearest = min(float((snapshot - direct).norm()) for snapshot in snapshots)
    spread = float((trace[-1] - direct).norm())
    assert float((ours - direct).norm()) < 0.02 * spread
    assert target_std in stds or float((ours - direct).norm()) < 0.1 * nearest


def test_posthoc_reaches_an_earlier_step():
    trace = random_walk(800)
    steps, stds, snapshots = snapshots_of(trace, every=50)
    weights = posthoc_coefficients(steps, stds, target_step=620, target_std=0.08)
    ours, (direct, _) = (weights[:, None] * torch.stack(snapshots)).sum(0), track(trace[:620], 0.08)
    # no snapshot ends at 620, so a part of the profile is out of reach
    assert float((ours - direct).norm()) < 0.06 * float((trace[619] - direct).norm())


def test_posthoc_of_a_tracked_profile_picks_its_own_snapshot_even_among_twins():
    torch.testing.assert_close(
        posthoc_coefficients([100, 200, 200], [0.1, 0.05, 0.1], target_std=0.1),
        torch.tensor([0.0, 0, 1], dtype=torch.float64),
    )
    twins = posthoc_coefficients([200, 200], [0.1, 0.1], target_std=0.1)
    torch.testing.assert_close(twins, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_first_step_has_no_memory():
    assert power_beta(1, 6.94) == 0 and 0 < power_beta(2, 6.94) < power_beta(1000, 6.94) < 1


def test_mistakes_are_named():
    for make, words in [
        (lambda: exponent_from_std(0.3), "std is 0.3.*0.2887"),
        (lambda: std_from_exponent(-1), "exponent is -1"),
        (lambda: power_beta(0, 5.0), "step is 0"),
        (lambda: posthoc_coefficients([1, 2], [0.1], target_std=0.1), "2 and 1"),
        (lambda: posthoc_coefficients([10], [0.1], target_step=20, target_std=0.1), "target_step is 20"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()

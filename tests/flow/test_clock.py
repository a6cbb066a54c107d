"""Schedules of pretrained models on our clock."""

import pytest
import torch

from flowmap.flow.clock import FlowClock, TableClock, velocity_of
from flowmap.flow.path import PREDICTIONS, convert

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
TABLE = torch.cumprod(1 - BETAS, 0)


def test_a_table_gives_its_own_entries_back():
    clock = TableClock(TABLE)
    at, time = clock.at(clock.times)
    torch.testing.assert_close(time, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(at.a, TABLE.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(at.b, (1 - TABLE).sqrt(), rtol=1e-12, atol=0)


def test_between_entries_time_is_interpolated_in_log_snr():
    clock = TableClock(TABLE)
    middle = torch.sigmoid((clock.logits[:-1] + clock.logits[1:]) / 2)
    torch.testing.assert_close(clock.at(middle)[1], torch.arange(999, dtype=torch.float64) + 0.5, rtol=0, atol=1e-8)


def test_beyond_the_ends_it_rests():
    clock = TableClock(TABLE)
    at, time = clock.at(torch.tensor([0.0, 1e-3, 1.0]))
    assert time.tolist() == [0, 0, 999] and float(at.a[0]) == 1 and float(at.b[0]) == 0
    assert float(at.a[2]) == pytest.approx(float(TABLE[-1].sqrt()))


def test_zero_terminal_snr_is_finite():
    table = TABLE.clone()
    table[-1] = 0
    clock = TableClock(table)
    at, time = clock.at(torch.tensor([0.5, 1 - 1e-7, 1.0]))
    assert time.isfinite().all() and float(time[2]) == 999 and 998 < float(time[1]) < 999 and float(at.a[2]) == 0


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p in ("x0", "epsilon", "v", "linear_velocity")])
@pytest.mark.parametrize("clock", [TableClock(TABLE), FlowClock()])
def test_a_perfect_prediction_is_the_velocity(prediction, clock):
    """With x0 and x1 known, every kind of prediction says x1 - x0, and the network sees its own state."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.93], dtype=torch.float64)
    at, expected = clock.at(t)

    def predict(state, time):
        torch.testing.assert_close(state, at.a.view(-1, 1, 1) * x0 + at.b.view(-1, 1, 1) * x1)
        torch.testing.assert_close(time, expected)
        return convert(x1 - x0, state, at, source="linear_velocity", target=prediction)

    xt = (1 - t.view(-1, 1, 1)) * x0 + t.view(-1, 1, 1) * x1
    torch.testing.assert_close(velocity_of(predict, clock, xt, t, prediction), x1 - x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_at_both_ends_the_velocity_is_finite(prediction):
    x, t = torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0])
    assert velocity_of(lambda state, time: torch.ones_like(state), TableClock(TABLE), x, t, prediction).isfinite().all()


@pytest.mark.parametrize("table", [torch.linspace(0.1, 0.9, 10), torch.tensor([0.5]), torch.tensor([1.2, 0.5])])
def test_what_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="falling numbers"):
        TableClock(table)

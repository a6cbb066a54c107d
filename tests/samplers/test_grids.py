import pytest

from flowmap.samplers.grids import FewStep

SETTINGS = [{}, {"grid": "shifted", "shift": 3.0}, {"grid": "rho"}, {"t_max": 0.98}, {"grid": "rho", "t_max": 0.98}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_times_fall_from_t_max_to_zero(settings, steps):
    times = FewStep(**settings).times(steps)
    assert len(times) == steps + 1 and times[0] == settings.get("t_max", 1.0) and times[-1] == 0.0
    assert all(t > s for t, s in zip(times, times[1:], strict=False))


def test_values():
    assert FewStep().times(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert FewStep(grid="shifted", shift=3.0).times(2) == (1.0, 0.75, 0.0)
    assert FewStep(grid="shifted", shift=1.0).times(4) == FewStep().times(4)
    assert FewStep(middle=(0.9, 0.2)).times(3) == (1.0, 0.9, 0.2, 0.0)
    assert FewStep(middle=(0.9, 0.2)).times(2) == (1.0, 0.5, 0.0)
    # EDM, 3 steps: sigma_1 = ((80^(1/7) + 0.002^(1/7)) / 2)^7 = 2.5152
    assert abs(FewStep(grid="rho").times(3)[1] - 2.5152 / 3.5152) < 1e-4


def test_mistakes_are_named():
    for settings, words in [
        ({"steps": (0, 1)}, r"steps\[0\]: 0 must be 1 or more"),
        ({"steps": ()}, "steps is"),
        ({"grid": "cosine"}, "grid is 'cosine'.*uniform"),
        ({"shift": 0}, "shift: 0 must be above 0"),
        ({"t_max": 1.2}, "t_max: 1.2 must lie in"),
        ({"middle": (0.2, 0.9)}, "middle is"),
        ({"middle": (1.0,)}, "middle is"),
    ]:
        with pytest.raises(ValueError, match=words):
            FewStep(**settings)

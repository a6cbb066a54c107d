import pytest
import torch

from flowmap.build.teacher import BuiltTeacher
from flowmap.flow.solver import Euler
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.teachers.exact import GaussianTeacher
from flowmap.teachers.guidance import (
    INTERVAL,
    Autoguidance,
    ClassifierFree,
    IntervalGuidance,
    at_once,
    calls_at,
    network_calls,
    with_drawn_scales,
)
from flowmap.teachers.network import NetworkTeacher
from tests.support.oracle import RING, SHAPE, draw, draw_times

STRONG, WEAK = GaussianTeacher(mean=(0.7,), std=0.4), GaussianTeacher(mean=(0.2,), std=0.9)


class Recorder:
    def __init__(self, teacher):
        self.teacher, self.conds = teacher, []

    def velocity(self, x, t, cond=None):
        self.conds.append(cond)
        return self.teacher.velocity(x, t, cond)


def test_autoguidance_is_its_formula_with_a_scale_a_sample():
    x, (t, _), w = draw(), draw_times(), torch.tensor([1.0, 2.1, 0.0, 3.0, 1.5], dtype=torch.float64)
    v = Autoguidance(STRONG, WEAK).velocity(x, t, {"guidance": w})
    strong, weak = STRONG.velocity(x, t), WEAK.velocity(x, t)
    torch.testing.assert_close(v, weak + w.reshape(5, 1, 1, 1) * (strong - weak))
    assert torch.equal(v[0], strong[0]) and torch.equal(v[2], weak[2])
    # w > 1 goes beyond strong, away from weak
    assert ((v[3] - strong[3]) * (strong[3] - weak[3])).sum() > 0


def test_autoguidance_of_gaussians_at_pure_noise():
    """At t = 1, v = x - m: guided it is x - (w m_strong + (1 - w) m_weak)."""
    x = draw()
    v = Autoguidance(STRONG, WEAK, default=2.0).velocity(x, torch.ones(SHAPE[0], dtype=torch.float64))
    torch.testing.assert_close(v, x - (2.0 * 0.7 - 1.0 * 0.2))


def test_classifier_free_asks_with_and_without_class():
    x, (t, _), cond = (
        draw(5, 2),
        draw_times(),
        {"class": torch.tensor([3, 1, 0, 7, -1]), "guidance": torch.full((5,), 2.5)},
    )
    inner = Recorder(RING)
    v = ClassifierFree(inner).velocity(x, t, cond)
    with_class, without = RING.velocity(x, t, {"class": cond["class"]}), RING.velocity(x, t)
    torch.testing.assert_close(v, 2.5 * with_class - 1.5 * without)
    torch.testing.assert_close(v[4], without[4])
    assert inner.conds[0].keys() == {"class"} and inner.conds[1]["class"].tolist() == [-1] * 5
    assert cond["class"].tolist() == [3, 1, 0, 7, -1] and "guidance" in cond


def test_other_conditions_are_dropped():
    inner, cond = Recorder(STRONG), {"text": torch.zeros(5, 7), "guidance": torch.full((5,), 2.0)}
    ClassifierFree(inner).velocity(draw(), torch.rand(5), cond)
    assert inner.conds[0].keys() == {"text"} and inner.conds[1] is None
    ClassifierFree(inner).velocity(draw(), torch.rand(5), cond | {"class": torch.arange(5)})
    assert inner.conds[3].keys() == {"class"}


def test_autoguidance_gives_both_the_condition_but_not_the_scale():
    strong, weak = Recorder(RING), Recorder(RING)
    Autoguidance(strong, weak).velocity(
        draw(5, 2), torch.rand(5), {"class": torch.arange(5), "guidance": torch.full((5,), 2.0)}
    )
    for conds in (strong.conds, weak.conds):
        assert len(conds) == 1 and conds[0].keys() == {"class"}


@pytest.mark.parametrize("cond", [None, {}, {"guidance": torch.ones(5)}, {"class": torch.arange(5)}], ids=str)
def test_the_weak_network_is_not_called_at_scale_one(cond):
    x, t, strong, weak = draw(5, 2), torch.rand(5), Recorder(RING), Recorder(RING)
    v = Autoguidance(strong, weak).velocity(x, t, cond)
    assert not weak.conds and torch.equal(v, RING.velocity(x, t, cond))
    ClassifierFree(strong).velocity(x, t, cond)
    assert len(strong.conds) == 2
    Autoguidance(strong, weak).velocity(x, t, {"guidance": torch.tensor([1, 1, 1, 1, 1.01])})
    assert len(weak.conds) == 1


def test_default_is_read_only_where_there_is_no_guidance():
    x, (t, _) = draw(), draw_times()
    wrapped = Autoguidance(STRONG, WEAK, default=3.0)
    torch.testing.assert_close(wrapped.velocity(x, t, {"guidance": torch.ones(5)}), STRONG.velocity(x, t))
    torch.testing.assert_close(
        wrapped.velocity(x, t, {"class": torch.zeros(5)}), 3 * STRONG.velocity(x, t) - 2 * WEAK.velocity(x, t)
    )


def test_classifier_free_without_any_condition_makes_one_call():
    inner = Recorder(RING)
    ClassifierFree(inner, default=4.0).velocity(draw(5, 2), torch.rand(5), {"guidance": torch.full((5,), 2.0)})
    assert len(inner.conds) == 1


def test_permutation_of_the_batch():
    x, (t, _), order = draw(5, 2), draw_times(), torch.tensor([3, 0, 4, 1, 2])
    cond = {"class": torch.tensor([3, 1, -1, 7, 0]), "guidance": torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5])}
    guided = ClassifierFree(RING)
    permuted = guided.velocity(x[order], t[order], {key: value[order] for key, value in cond.items()})
    torch.testing.assert_close(permuted, guided.velocity(x, t, cond)[order])


def test_calls_are_counted_through_wrappers():
    assert network_calls(STRONG) == 1
    assert ClassifierFree(STRONG).network_calls == Autoguidance(STRONG, WEAK).network_calls == 2
    assert Autoguidance(ClassifierFree(STRONG), WEAK).network_calls == 3


def test_half_precision_is_kept_and_mixed_in_float32():
    x = draw().bfloat16()
    v = Autoguidance(STRONG, WEAK).velocity(x, torch.rand(5), {"guidance": torch.full((5,), 2.1)})
    assert v.dtype == torch.bfloat16


@pytest.mark.parametrize("cond", [None, {"guidance": torch.full((5,), 2.1, dtype=torch.float64)}], ids=["default", "w"])
def test_an_interval_guides_the_times_in_it_and_its_two_ends(cond):
    x, t = draw(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    v = IntervalGuidance(Autoguidance(STRONG, WEAK), 0.25, 0.75, default=2.1).velocity(x, t, cond)
    strong, weak = STRONG.velocity(x, t), WEAK.velocity(x, t)
    torch.testing.assert_close(v[1:4], (2.1 * strong - 1.1 * weak)[1:4])
    assert torch.equal(v[0], strong[0]) and torch.equal(v[4], strong[4])


def test_an_interval_of_classifier_free_guidance_keeps_the_condition():
    x, t = draw(5, 2), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    cond = {"class": torch.arange(5), "guidance": torch.full((5,), 2.5, dtype=torch.float64)}
    v = IntervalGuidance(ClassifierFree(RING), 0.4, 0.8).velocity(x, t, cond)
    given, without = RING.velocity(x, t, {"class": cond["class"]}), RING.velocity(x, t)
    guided = 2.5 * given - 1.5 * without
    torch.testing.assert_close(v, torch.where(torch.tensor([[0], [0], [1], [1], [0]]) == 1, guided, given))
    assert cond["guidance"].tolist() == [2.5] * 5


def test_guidance_acts_where_t_is_in_the_interval_of_the_row_and_in_the_teachers():
    """Rows: inside both, outside the teacher's, outside its own, at its own end, in a full interval."""
    x, t = draw(), torch.tensor([0.5, 0.9, 0.5, 0.3, 0.5], dtype=torch.float64)
    own = torch.tensor([[0.4, 0.6], [0.0, 1.0], [0.6, 1.0], [0.3, 0.4], [0.0, 1.0]], dtype=torch.float64)
    network = Recorder(STRONG)
    v = IntervalGuidance(Autoguidance(network, WEAK), 0.2, 0.8, default=2.1).velocity(x, t, {INTERVAL: own})
    strong, weak = STRONG.velocity(x, t), WEAK.velocity(x, t)
    torch.testing.assert_close(v[[0, 3, 4]], (2.1 * strong - 1.1 * weak)[[0, 3, 4]])
    assert torch.equal(v[1:3], strong[1:3]) and network.conds == [None]
    plain = ClassifierFree(network)  # without an interval of its own it passes none on either
    plain.velocity(x, t, {"class": torch.arange(5), INTERVAL: own})
    assert network.conds[1].keys() == {"class"}


def test_a_scale_that_the_network_reads_is_one_outside_the_interval():
    network, t = Recorder(STRONG), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    IntervalGuidance(network, 0.2, 0.6, default=3.5).velocity(draw(), t, {"class": torch.arange(5)})
    assert network.conds[0]["guidance"].tolist() == [1.0, 3.5, 3.5, 1.0, 1.0] and "class" in network.conds[0]


def test_euler_steps_in_an_interval_are_those_of_two_closed_forms():
    """Guided down to t = 0.5, unguided from there; the weak network is called in the interval alone."""
    x, weak = draw(), Recorder(WEAK)
    guided = Autoguidance(STRONG, weak, default=2.0)
    whole = Euler(steps=10)(IntervalGuidance(guided, 0.55, 1.0, default=2.0).velocity, x).x
    assert len(weak.conds) == 5
    half = Euler(steps=5)(guided.velocity, x, end=0.5).x
    torch.testing.assert_close(whole, Euler(steps=5)(STRONG.velocity, half, start=0.5).x)


def test_an_interval_with_drawn_scales_is_the_same_velocity():
    x, t = draw(), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    cond = {"guidance": torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5], dtype=torch.float64)}
    guided = IntervalGuidance(Autoguidance(STRONG, WEAK), 0.2, 0.6)
    drawn = with_drawn_scales(guided, (0.5, 3.0))
    assert drawn.teacher.scales_differ
    torch.testing.assert_close(drawn.velocity(x, t, cond), guided.velocity(x, t, cond), rtol=0, atol=0)


def test_calls_outside_an_interval_are_those_of_the_unguided_teacher():
    for guided in (ClassifierFree(STRONG), Autoguidance(STRONG, WEAK)):
        within = IntervalGuidance(guided, 0.3, 0.7)
        assert network_calls(within) == 2
        assert [calls_at(within, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)] == [1, 2, 2, 2, 1]
    assert calls_at(ClassifierFree(STRONG), 0.9) == 2 and calls_at(IntervalGuidance(STRONG, 0.3, 0.7), 0.5) == 1


class ReadsContext(torch.nn.Module):
    """A velocity that depends on text of two tokens, by default on that of an empty one, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.empty, self.rows = {"text": torch.full((1, 2, 3), 0.25, dtype=torch.float64)}, []

    def forward(self, x, t, s, cond=None):
        cond = cond or {}
        self.rows.append(len(x))
        text = cond["text"] if "text" in cond else self.empty["text"].to(x.device).expand(len(x), 2, 3)
        label = cond["class"] if "class" in cond else torch.full((len(x),), -1, device=x.device)
        return x * (text.flatten(1).sum(1) + label + t)[:, None, None, None]


def teacher_with(empty: bool) -> NetworkTeacher:
    if empty:
        return NetworkTeacher(FlowMapNet(ReadsContext()))
    torch.manual_seed(0)
    return NetworkTeacher(FlowMapNet(MLP(width=16, depth=1).build(SHAPE[1:], num_classes=9, arrival=False)).double())


@pytest.mark.parametrize("keys", [("class",), ("text",), ("class", "text")], ids=str)
def test_one_call_for_two_conditions_gives_the_velocities_of_two_calls(keys):
    x, (t, _), teacher = draw(), draw_times(), teacher_with("text" in keys)
    given = {"class": torch.tensor([3, 1, 0, 7, -1]), "text": torch.rand(5, 2, 3, dtype=torch.float64)}
    first = {key: given[key] for key in keys}
    second = {"class": torch.full((5,), -1)} if "class" in keys else None
    found = at_once(teacher, x, t, first, second)
    for one, cond in zip(found, (first, second), strict=True):
        torch.testing.assert_close(one, teacher.velocity(x, t, cond))
    assert not torch.allclose(*found)


def test_conditions_of_another_form_are_not_joined():
    x, (t, _) = draw(), draw_times()
    longer, half = torch.zeros(5, 3, 3, dtype=torch.float64), torch.zeros(5, 2, 3)
    assert at_once(teacher_with(True), x, t, {"text": longer}, None) is None
    assert at_once(teacher_with(True), x, t, {"text": half}, None) is None
    assert at_once(teacher_with(False), x, t, {"class": torch.arange(5), "size": longer}, None) is None
    assert at_once(RING, x, t, {"class": torch.arange(5)}, None) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_training_on_an_accelerator_makes_one_call_for_both_conditions(device):
    network = ReadsContext()
    guided = ClassifierFree(NetworkTeacher(FlowMapNet(network)))
    built = BuiltTeacher(guided, None, (guided.teacher.flow_map,)).to(torch.device(device))
    assert network.empty["text"].device.type == device  # a call copies nothing to the device
    x, t = (part.to(device) for part in (draw(), draw_times()[0]))
    cond = {"text": torch.rand(5, 2, 3, dtype=torch.float64), "guidance": torch.full((5,), 2.0)}
    cond = {key: value.to(device) for key, value in cond.items()}
    assert built.on_drawn_scales((1.0, 3.0)).velocity(x, t, cond).shape == x.shape
    assert network.rows == ([5, 5] if device == "cpu" else [10])
    network.rows.clear()
    ClassifierFree(guided.teacher).velocity(x, t, {"text": cond["text"], "guidance": 2.0})
    assert network.rows == [5, 5], "sampling keeps its memory"


def test_a_patch_of_the_guided_velocity_has_the_norm_of_the_conditional_one():
    class Two:
        def velocity(self, x, t, cond=None):
            return x if set(cond or {}) - {"class"} else 0.25 * x.flip(-1)

    x, cond = draw(5, 2, 4, 6), {"text": torch.zeros(5, 1), "guidance": torch.full((5,), 3.0)}
    x[0, :, :2, :2] = 0  # a patch without a norm
    t = torch.full((5,), 0.4, dtype=x.dtype)
    free, rescaled = ClassifierFree(Two()), ClassifierFree(Two(), rescale_patch=2)
    plain, got = free.velocity(x, t, cond), rescaled.velocity(x, t, cond)
    norms = lambda v: torch.nn.functional.pixel_unshuffle(v, 2).norm(dim=1)
    torch.testing.assert_close(norms(got), norms(x))
    ratio = got / plain
    torch.testing.assert_close(ratio[:, :, ::2, ::2], ratio[:, :, 1::2, 1::2], msg="one factor a patch", equal_nan=True)
    one = cond | {"guidance": torch.ones(5)}
    torch.testing.assert_close(rescaled.velocity(x, t, one), x)

"""The loss by time of an exact velocity is the conditional variance; that of a straight coupling is 0; draws are held
out.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowmap.base.files import write_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.student import student_config
from flowmap.data import TextDataset
from flowmap.data.text.dataset import Attribute
from flowmap.evaluation.held_out import coupled_draws, held_out_samples, loss_by_time
from flowmap.evaluation.measure import evaluate, measure
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.mlp import MLP
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.student.config import TextLatents
from flowmap.student.student import Student
from flowmap.teachers.exact import GaussianTeacher
from tests.support.oracle import ExactStudent

STD = 0.4
GAUSS = f"""\
data: {{kind: toy, num_modes: 1, radius: 0.0, std: {STD}, points: 20000, conditional: false, batch_size: 16}}
student: {{kind: mlp}}
objective: {{kind: flow_matching}}
evaluation: {{batch_size: 900}}
"""
COUPLING = "coupling: {kind: pairs, teacher: {card: exact}, num: 50, solver: {kind: heun, steps: 40}, dtype: float32}\n"
PAIRS = GAUSS.replace("flow_matching", "rectified") + COUPLING
TIMES = (0.02, 0.3, 0.9)


class Straight:
    """The flow of x0 = c x1."""

    def mean_velocity(self, x, t, s, cond=None):
        return (1 - STD) * x / ((1 - t) * STD + t)[:, None]


class Kept:
    """Leaves noise as it is, or gives a training sample of the class that is asked for."""

    def __init__(self, data=None):
        self.data = data

    def mean_velocity(self, x, t, s, cond=None):
        if self.data is None:
            return torch.zeros_like(x)
        first = torch.stack([(self.data.labels == k).nonzero()[0, 0] for k in range(10)])
        return x - self.data.train[first[cond["class"]]]


class Net(FlowMapNet):
    """An exact flow in a network's clothes."""

    def __init__(self, flow):
        super().__init__(torch.nn.Linear(1, 1))
        self.flow = flow

    def mean_velocity(self, x, t, s, cond=None):
        return self.flow.mean_velocity(x, t, s, cond)


def made(text, tmp_path, flow, *overrides):
    (tmp_path / "gauss.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "gauss.yaml", overrides)
    run = resolve(recipe)
    data = build_data(run)
    return recipe, Student(student_config(run, data, None), Net(flow)), data


EXACT = ExactStudent(GaussianTeacher(mean=(0.0,), std=STD, shape=(2,)))


def test_loss_of_the_exact_velocity_is_the_conditional_variance(tmp_path):
    """Var(x1 - x0 | xt) = c^2 / S(t)^2; 4,000 draws of 2 values have a standard error of 1.6 %."""
    recipe, student, data = made(GAUSS, tmp_path, EXACT)
    found = loss_by_time(recipe, student, data, times=TIMES, images=4000)
    assert list(found) == list(TIMES)
    for t, loss in found.items():
        assert loss == pytest.approx(STD**2 / ((1 - t) ** 2 * STD**2 + t**2), rel=0.06)
    assert (
        min(loss_by_time(recipe, Student(student.config, Net(Straight())), data, times=(0.5,), images=4000).values())
        > 0.4
    )  # another velocity


def test_loss_of_a_straight_coupling_is_zero(tmp_path):
    for inverted in (0.0, 0.4, 1.0):
        recipe, student, data = made(PAIRS, tmp_path, Straight(), f"coupling.inverted={inverted}")
        assert max(loss_by_time(recipe, student, data, times=TIMES, images=60).values()) < 1e-5  # Heun's 40 steps


def test_draws_are_not_those_of_training(tmp_path):
    from flowmap.data.pairs import noises

    recipe, student, data = made(PAIRS, tmp_path, Straight(), "coupling.inverted=0.4")
    draws = coupled_draws(recipe, student, data, 50)
    assert draws.x0.shape == draws.x1.shape == (50, 2) and draws.cond == {}
    assert not torch.isin(draws.x1[:30], noises(recipe.coupling.seed, range(50), (2,))).any()
    assert torch.equal(draws.x0[30:], data.held_out[:20])
    again = coupled_draws(recipe, student, data, 50)
    assert torch.equal(draws.x0, again.x0) and torch.equal(draws.x1, again.x1)


def test_classes_come_with_the_samples(tmp_path):
    recipe, student, data = made(GAUSS, tmp_path, Straight(), "data.conditional=true", "data.num_modes=3")
    draws = held_out_samples(recipe, student, data, 70)
    assert torch.equal(draws.cond["class"], data.held_out_labels[:70]) and torch.equal(draws.x0, data.held_out[:70])
    bare = type(data)("bare", data.train, data.held_out, data.labels, None, num_classes=3)
    with pytest.raises(ValueError, match="want the classes of held-out samples"):
        held_out_samples(recipe, student, bare, 70)
    none = type(data)("none", data.train, data.held_out[:0])
    with pytest.raises(ValueError, match="data.held_out is 0"):
        held_out_samples(recipe, student, none, 70)


def test_attributes_come_with_the_sentences(tmp_path):
    recipe, student, _ = made(GAUSS, tmp_path, Straight())
    style, codes = Attribute("style", ("plain", "odd")), {"style": torch.arange(9) % 2}
    data = TextDataset(
        "text", torch.randn(9, 2), torch.randn(9, 2), attributes=(style,), codes=codes, held_out_codes=codes
    )
    told = Student(replace(student.config, net=MLP(), samples=TextLatents(attributes=(style,))), student.flow_map)
    assert torch.equal(held_out_samples(recipe, told, data, 7).cond["style"], codes["style"][:7])
    assert held_out_samples(recipe, student, data, 7).cond == {}


METRICS = (
    "metrics=[{kind: inversion, images: 100, solver: {kind: euler, steps: 3}}, "
    "{kind: loss_by_time, images: 100, times: [0.5]}]"
)


def test_they_are_rows_of_metrics_json(tmp_path):
    recipe, student, data = made(PAIRS, tmp_path, Straight(), METRICS)
    found = measure(recipe, student, None, data, steps=[1, 2])
    assert found["floor"] == {}
    for row in found["student"].values():
        assert set(row) == {"inversion_error", "inversion_noise", "inversion_z", "loss_t0.5"}
        assert row["inversion_error"] < 1e-10 and row["loss_t0.5"] < 1e-5 and abs(row["inversion_z"]) < 4


THREE = ("coupling.inverted=0.4", "data.conditional=true", "data.num_modes=3", "data.radius=1")
MORE = (METRICS.replace("]}]", "]}, {kind: agreement, images: 100}]"), *THREE)


def _measured(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mine = folder / str(rank)
    mine.mkdir()
    torch.save(figures(mine), mine / "figures.pt")
    dist.destroy_process_group()


def figures(folder):
    """The row of 2 steps, and the floor."""
    recipe, student, data = made(PAIRS, folder, Straight(), *MORE)
    found = measure(recipe, student, None, data, steps=[2])
    return found["student"]["2"] | {f"floor {key}": value for key, value in found["floor"].items()}


@pytest.mark.slow
def test_two_processes_add_up_to_one(tmp_path):
    whole = figures(tmp_path)
    assert set(whole) >= {
        "inversion_error",
        "loss_t0.5",
        "agreement_pixels",
        "floor agreement_pixels",
        "floor agreement_pixels_shuffled",
    }
    mp.spawn(_measured, (2, tmp_path), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / str(rank) / "figures.pt") == pytest.approx(whole, rel=1e-4, abs=1e-9)


def test_evaluate_takes_them_by_name(finished):
    found = evaluate(finished, [1, 2], metrics=["inversion", "loss_by_time"])
    for row in (*found["student"].values(), found["teacher"]):
        assert {"inversion_error", "inversion_z", "loss_t0.02", "loss_t0.98"} <= set(row)
    assert found["student"]["1"]["loss_t0.5"] == found["student"]["2"]["loss_t0.5"]
    with pytest.raises(ValueError, match="metrics: agreement needs data with classes that are given to the network"):
        evaluate(finished, [1], metrics=["agreement"])


def test_agreement_of_digits_by_noise_and_by_real_ones():
    """What a student draws is looked at with the classes that it was asked for: noise agrees by chance."""
    recipe = read_recipe("digits-teacher", ["metrics=[{kind: agreement, images: 600, reference_images: 600}]"])
    run = resolve(recipe)
    data = build_data(run)
    found = measure(recipe, Student(student_config(run, data, None), Net(Kept())), None, data, steps=[1])
    assert found["student"]["1"]["agreement_pixels"] < 0.25
    assert found["floor"]["agreement_pixels"] > 0.95 and found["floor"]["agreement_pixels_shuffled"] < 0.2
    taught = measure(recipe, Student(student_config(run, data, None), Net(Kept(data))), None, data, steps=[1])
    assert taught["student"]["1"]["agreement_pixels"] == 1


def test_a_recipe_whose_data_lacks_what_a_metric_needs_is_refused_before_training(tmp_path):
    for metric, says in (("agreement", "needs data with classes"), ("retrieval", "needs data with captions")):
        with pytest.raises(RecipeError, match=f"gauss: metrics: {metric} {says}"):
            made(GAUSS, tmp_path, Straight(), f"metrics=[{{kind: {metric}}}]")
    write_tensors(tmp_path / "samples" / "a.safetensors", {"x0": torch.zeros(9, 3, 4, 6)})
    for metric in ("inversion", "loss_by_time"):
        overrides = ["data.kind=pictures", f"data.root={tmp_path / 'samples'}", f"metrics=[{{kind: {metric}}}]"]
        with pytest.raises(RecipeError, match="data.held_out is 0"):
            build_data(resolve(read_recipe(tmp_path / "gauss.yaml", overrides)))

"""Where metrics run: on the student's device, reduced there, in the precision of training; and what a row holds."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from flowmap.base.distributed import BOTH
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.evaluation.measure import measure
from flowmap.metrics import Frechet, Straightness
from flowmap.metrics.real import metric_device
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.student.student import Student
from flowmap.train.strategy import strategy_for

SMALL = ["data.points=500", "evaluation.batch_size=16", "metrics=[]"]


@pytest.fixture
def device_alone(monkeypatch):
    """A group of 8 processes that reduces on the device alone, as NCCL does on GPUs: here that device is meta."""
    monkeypatch.setattr(dist, "barrier", lambda *args, **kwargs: None)  # it would choose the CPU on this machine
    dist.init_process_group("meta:fake", store=FakeStore(), rank=0, world_size=8)
    yield torch.device("meta")
    dist.destroy_process_group()


def synced(kind):
    """A metric of that kind which reduces its states over the processes and reports their devices, not its figure."""

    @dataclass(frozen=True)
    class Synced(kind):
        def report(self, metric):
            metric.sync(metric.dist_sync_fn)
            for name in metric._defaults:
                state = getattr(metric, name)
                assert all(part.device.type == "meta" for part in (state if isinstance(state, list) else [state]))
            metric.unsync()
            return {}

    return Synced


def parts(*settings):
    recipe = read_recipe("toy/mixture", [*SMALL, *settings])
    run = resolve(recipe)
    data, teacher = build_data(run), build_teacher(run)
    config = student_config(run, data, teacher)
    return recipe, Student(config, build_student(run, config, teacher).eval()), data


def test_a_group_that_reduces_on_the_device_alone_measures_a_student_there(device_alone):
    """Metrics on the CPU fail: "No backend type associated with device type cpu"."""
    recipe, student, data = parts()
    specs = [synced(kind)(images=64) for kind in (Frechet, Straightness)]
    found = measure(recipe, student.to(device_alone), None, data, steps=[2], metrics=specs)
    assert found["student"] == {"2": {}} and found["floor"] == {}
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        Frechet(images=64).build(data.reference).compute()


def test_metrics_run_where_the_samples_are_unless_there_is_no_float64():
    for name in ("cpu", "cuda:3", "meta"):
        assert metric_device(torch.device(name)) == torch.device(name)
    assert metric_device(torch.device("mps")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("strategy", "devices", "kind"),
    [("auto", 8, "DDPStrategy"), ("ddp", 8, "DDPStrategy"), ("fsdp", 8, "ShardedStrategy"), ("auto", 1, "str")],
)
def test_process_groups_on_gpus_have_a_backend_for_the_cpu_too(strategy, devices, kind, monkeypatch):
    recipe = read_recipe("fashion", [f"trainer.strategy={strategy}", f"trainer.devices={devices}"])
    for gpus, backend in ((True, BOTH), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus)
        for accelerator, expected in (("auto", backend), ("gpu", backend), ("cpu", None)):
            found = strategy_for(
                recipe.changed(
                    trainer=recipe.trainer.__class__(accelerator=accelerator, strategy=strategy, devices=devices)
                )
            )
            if strategy == "auto" and expected is None:
                assert found == "auto"
            else:
                assert type(found).__name__ == kind and (kind == "str" or found._process_group_backend == expected)

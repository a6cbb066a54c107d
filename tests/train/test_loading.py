"""The loader's workers: any number of them gives the same batches and the same run, also one that is resumed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import zipfile
from io import BytesIO

import numpy
import pytest
import torch

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.data import StepBatches, order
from flowmap.data.dataset import full_precision
from flowmap.data.images.edm2_zip import EDM2Latents
from flowmap.prepare import read_ahead
from flowmap.prepare.encode import encode
from flowmap.recipe import read_recipe
from flowmap.train import loading
from flowmap.train.loading import loader_of, workers_of
from tests.support.encoding import spec

pytest.importorskip("datasets")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def encoded(tmp_path):
    encode(spec(), tmp_path / "encoded", batch_size=3)
    return spec(tmp_path / "encoded").build()


@pytest.fixture
def zipped(tmp_path):
    chance = numpy.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "latents.zip", "w") as archive:
        for i in range(23):
            content = BytesIO()
            numpy.save(content, chance.standard_normal((8, 32, 32)).astype(numpy.float32))
            archive.writestr(f"00000/img-mean-std-{i:08d}.npy", content.getvalue())
        labels = [[f"00000/img-mean-std-{i:08d}.npy", i % 3] for i in range(23)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return EDM2Latents(path=str(tmp_path / "latents.zip"), held_out=3).build()


def recipe_with(workers: int | None, *overrides: str):
    given = [] if workers is None else [f"trainer.workers={workers}"]
    return read_recipe("digits", ["data.batch_size=4", *given, *overrides])


def batches_of(data, workers: int, start: int = 0, **more) -> list:
    batches = StepBatches(len(data), 4, seed=5, start_step=start, num_steps=8, accumulate=2, **more)
    return [in_full(data, batch) for batch in loader_of(recipe_with(workers), data, batches, CPU)]


def in_full(data, batch):
    """As the training module completes it."""
    return full_precision(batch[0]), {name: full_precision(value) for name, value in data.complete(batch[1]).items()}


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        return
    parts = zip(a.items(), b.items(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    for one, other in parts:
        if isinstance(one, str):
            assert one == other
        else:
            assert_equal(one, other)


@pytest.fixture
def small_blocks(monkeypatch):
    """Of 8 samples, mixed within two blocks."""
    monkeypatch.setattr(order, "BLOCK", 8)
    monkeypatch.setattr(order, "WINDOW", 2)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize("kind", ["encoded", "zipped"])
def test_any_number_of_workers_gives_the_same_batches(kind, shuffle, request, small_blocks):
    data = request.getfixturevalue(kind)
    alone = batches_of(data, 0, shuffle=shuffle)
    plain = StepBatches(len(data), 4, seed=5, accumulate=2, shuffle=shuffle)
    assert_equal(alone, [data.__getitems__(plain.indices(step, micro)) for step in range(8) for micro in range(2)])
    assert len(alone) == 16
    for workers in (1, 3):
        assert_equal(batches_of(data, workers, shuffle=shuffle), alone)
    assert_equal(batches_of(data, 3, start=5, shuffle=shuffle), alone[10:])


@pytest.mark.parametrize("kind", ["encoded", "zipped"])
def test_a_copy_in_another_process_reads_the_same(kind, request):
    """A data set may be sent to another process."""
    data = request.getfixturevalue(kind)
    assert_equal(pickle.loads(pickle.dumps(data)).__getitems__([7, 0, 7]), data.__getitems__([7, 0, 7]))


def test_a_run_with_workers_resumed_with_another_number_is_the_same_run(tiny, tmp_path, monkeypatch, small_blocks):
    from flowmap.train.module import DistillModule

    settings, orders = ["trainer.accumulate=2", "data.shuffle=blocks"], []
    opened = order.BlockOrder._open
    monkeypatch.setattr(order.BlockOrder, "_open", lambda self, epoch: (orders.append(epoch), opened(self, epoch)))
    flowmap.fit(read_recipe(tiny, settings), tmp_path / "whole")
    step = DistillModule.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 9:
            raise RuntimeError("stopped")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="stopped"):
        patched.setattr(DistillModule, "training_step", stopped)
        flowmap.fit(read_recipe(tiny, ["trainer.workers=2", *settings]), tmp_path / "resumed")
    flowmap.fit(read_recipe(tiny, ["trainer.workers=1", *settings]), tmp_path / "resumed", resume=True)
    assert orders, "samples are read in the order of the recipe"
    whole, resumed = (tmp_path / name / "student" / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_the_order_is_in_the_hash_unless_it_is_that_of_earlier_versions():
    of = lambda *settings: read_recipe("digits", settings).hash()
    assert of("data.shuffle=global") == of() != of("data.shuffle=blocks")
    with pytest.raises(RecipeError, match="shuffle: 'shards' is not one of global, blocks"):
        of("data.shuffle=shards")


def test_workers_are_in_no_hash():
    assert recipe_with(3).hash() == recipe_with(None).hash() == recipe_with(0).hash()


class Counted:
    """Samples that say which thread reads them, and of which one batch cannot be read."""

    reads_disk = True

    def __init__(self, broken=None):
        self.broken, self.threads = broken, []

    def __len__(self):
        return 20

    def stored_batch(self, places):
        self.threads.append(threading.current_thread())
        if len(self.threads) == self.broken:
            raise OSError("the disk is gone")
        return torch.tensor(places), {}


def test_an_error_of_a_worker_is_raised_in_the_training_process():
    samples = Counted(broken=3)
    loaded = iter(loader_of(recipe_with(1), samples, StepBatches(20, 4, seed=5), CPU))
    next(loaded), next(loaded)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loaded)
    assert threading.main_thread() not in samples.threads


def test_workers_end_with_the_loader_and_read_two_batches_ahead():
    samples = Counted()
    endless = iter(loader_of(recipe_with(2), samples, StepBatches(20, 4, seed=5), CPU))
    next(endless)
    endless.close()
    assert len(samples.threads) <= 4
    assert not any(worker.is_alive() for worker in samples.threads)


class Hanging(Counted):
    """The second batch comes when it is released."""

    def __init__(self):
        super().__init__()
        self.hangs, self.released = threading.Event(), threading.Event()

    def stored_batch(self, places):
        if self.threads:
            self.hangs.set()
            self.released.wait()
        return super().stored_batch(places)


def test_a_loader_that_is_closed_does_not_wait_for_a_read_that_hangs(monkeypatch):
    monkeypatch.setattr(read_ahead, "GRACE_S", 0.01)
    samples = Hanging()
    loaded = iter(loader_of(recipe_with(1), samples, StepBatches(20, 4, seed=5), CPU))
    next(loaded)
    samples.hangs.wait()
    loaded.close()
    (worker,) = samples.threads
    assert worker.is_alive() and worker.daemon
    samples.released.set()
    worker.join()
    assert len(samples.threads) == 2  # the read that hung is the last


SCRIPT = """
import threading
from flowmap.prepare import read_ahead

hangs, read_ahead.GRACE_S = threading.Event(), 0.01

def read(place):
    if place == 1:
        hangs.set()
        threading.Event().wait()
    return place

kept = read_ahead.in_order(read, range(20), 1)  # as a Loader with one worker
next(kept)
hangs.wait()
print("fails", flush=True)
raise RuntimeError("the run failed")
"""


def test_a_process_that_fails_does_not_wait_for_a_read_that_hangs():
    """A traceback may keep the loader's iterator to the end."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, timeout=300, text=True)
    assert done.returncode == 1 and done.stdout == "fails\n", done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: the run failed")


def test_the_automatic_number(encoded, monkeypatch):
    monkeypatch.setattr(loading, "num_cores", lambda: 16)
    memory = flowmap.read_recipe("digits").data.build()
    assert workers_of(recipe_with(None), encoded, CPU) == 0 == workers_of(recipe_with(None), memory, CUDA)
    assert workers_of(recipe_with(None), encoded, CUDA) == 2
    eight = recipe_with(None, "trainer.devices=8", "trainer.strategy=ddp")
    assert workers_of(eight, encoded, CUDA) == 1 and workers_of(recipe_with(7), memory, CPU) == 7

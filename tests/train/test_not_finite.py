"""Weights that are not finite are neither kept, averaged, shipped nor used; the last good checkpoint stays."""

from __future__ import annotations

import pytest
import torch
from conftest import bytes_of, spoil_average
from safetensors.torch import load_file, save_file

import flowmap
from flowmap.base.files import read_tensors, write_tensors
from flowmap.base.finite import check_finite
from flowmap.train.checkpoint_file import read_checkpoint
from flowmap.train.clock import Clock
from flowmap.train.fit import FitError, fit


def quiet(message):
    pass


@pytest.mark.parametrize(("which", "value"), [(0, float("nan")), (1, float("inf"))])
def test_an_average_that_is_not_finite_ships_nothing(tiny, tmp_path, monkeypatch, which, value):
    spoil_average(monkeypatch, which, 8, value)
    name = r"averages\.\d\.net\.enter\.weight"
    last = rf"the average of width 0\.\d+ is not finite after step \d+: {name}; the last good checkpoint is .*step 6"
    with pytest.raises(FitError, match=last):
        fit(flowmap.read_recipe(tiny), tmp_path / "run", log=quiet)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    for path in (tmp_path / "run").rglob("*.safetensors"):
        check_finite(load_file(path), path)


def test_nor_does_a_run_that_its_clock_ends_between_checkpoints(tiny, tmp_path, monkeypatch):
    spoil_average(monkeypatch, 0, 2, float("nan"))
    seconds = iter(range(10_000))
    with pytest.raises(FitError, match="the average of width"):
        recipe = flowmap.read_recipe(tiny, ["ema.snapshot_every_steps=0"])
        fit(recipe, tmp_path / "run", log=quiet, clock=Clock(3.0, lambda: next(seconds), at_least=3))
    assert not list((tmp_path / "run").rglob("model.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("verb", ["sample", "evaluate", "export", "merge", "average"])
def test_a_student_that_is_not_finite_is_refused(command, finished, tmp_path, verb, value):
    path = finished / "student" / "model.safetensors"
    state = load_file(path)
    state["net.enter.weight"][1, 1] = value
    save_file(state, path)
    student = {"average": ["--run", finished, "--std", 0.1], "merge": ["--student", finished, "--lora", path]}.get(
        verb, ["--student", finished]
    )
    before = bytes_of(finished)
    code, out, err = command(
        verb, *student, *(["--to", "torch"] if verb == "export" else []), "--out", tmp_path / "out"
    )
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "model.safetensors: net.enter.weight: has values that are not finite" in err
    assert bytes_of(finished) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_in_any_type_the_first_bad_tensor_is_named_and_nothing_is_written(tmp_path, dtype):
    good = {"a": torch.ones(3).to(dtype), "whole": torch.ones(2, dtype=torch.int64), "none": torch.zeros(0).to(dtype)}
    write_tensors(tmp_path / "x.safetensors", good)
    bad = {**good, "b": torch.tensor([1.0, float("inf")]).to(dtype)}
    with pytest.raises(ValueError, match="x.safetensors: b: has values that are not finite"):
        write_tensors(tmp_path / "x.safetensors", bad)
    assert set(read_tensors(tmp_path / "x.safetensors")) == set(good)
    save_file(bad, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors: b: has"):
        read_tensors(tmp_path / "x.safetensors")


def test_an_autoencoder_that_is_not_finite_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from flowmap.teachers.autoencoder import Autoencoder

    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    with torch.no_grad():
        model.decoder.conv_out.weight[0, 0, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="autoencoder.source: .* decoder.conv_out.weight: has values that are not finite"
    ):
        Autoencoder(source=str(tmp_path)).load()

"""What a dry run says would fit a smaller GPU: its rows, their order, and that each is the memory of that recipe."""

from __future__ import annotations

import pytest

from flowmap.estimate import fits as on_device
from flowmap.estimate import smaller
from flowmap.estimate.dry_run import dry_run, networks_costs, networks_memory
from flowmap.estimate.evaluation import EvaluationMemory, evaluation_bytes
from flowmap.estimate.fits import OWN
from flowmap.estimate.memory import Memory
from flowmap.estimate.networks import config_without_weights
from flowmap.estimate.outlines import Outlines
from flowmap.estimate.smaller import AT_ONCE, smaller_lines
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe

GIB = 2**30
GPU = ["trainer.accelerator=gpu", "evaluation.batch_size=64", "data.batch_size=64"]


def peaks(run):
    """Simple numbers in place of the networks' own: 10 GiB frozen, 16 of activations, 4 of weights in float32."""
    recipe = run.recipe
    half = 0.5 if recipe.trainer.precision == "bf16" else 1.0
    kept = 16 * half * recipe.data.batch_size / 64 * (0.25 if recipe.trainer.activation_checkpointing else 1)
    frozen = 10 * {"int8": 0.25, "nf4": 0.15, None: half}[recipe.quantize.frozen]
    measured = EvaluationMemory(1 * GIB, 8 * GIB * recipe.evaluation.batch_size / 64, 0, 0, 0, 0)
    return Memory(4 * GIB, 0, 0, 0, frozen * GIB, 0, kept * GIB), measured if recipe.metrics else None


def lines_of(memory, *settings):
    run = resolve(read_recipe("digits", [*GPU, *settings]))
    return smaller_lines(run, peaks(run), peaks, memory)


def rows(lines):
    return [line.split()[0] for line in lines if not line.startswith("to fit") and "it fits with" not in line][1:]


def test_a_run_that_fits_its_device_has_no_table_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(on_device, "on_gpus", lambda accelerator: False)
    assert lines_of(None) == []
    asked = lines_of(80)
    assert rows(asked) == ["as"] and asked[-1].endswith("yes")
    (device, there) = on_device.H100[0], 20 * GIB + OWN
    monkeypatch.setattr(on_device, "H100", (device, there))
    assert lines_of(None)[0].startswith("to fit an H100 (22.00 GiB, about 2.00 GiB of them CUDA's own)")
    assert lines_of(None, "trainer.accelerator=cpu") == []


def test_settings_are_added_until_both_fit(monkeypatch):
    monkeypatch.setattr(smaller, "check_available", lambda: None)
    found = lines_of(24)
    table = [line.split() for line in found[1:-1]]
    # 30 GiB; 22.5 with int8; 21.5 with nf4, which fits 23.64 - 2 GiB, as does measuring: 4 + 1.5 + 1 + 8
    assert [line[0] for line in table] == ["settings", "as", "quantize.frozen=int8", "quantize.frozen=nf4"]
    assert table[1][-1] == "no" and table[3][1:] == ["1.50", "GiB", "21.50", "GiB", "14.50", "GiB", "yes"]
    assert found[-1] == "  it fits with: quantize.frozen=nf4"
    tight = lines_of(12)  # 9.82 GiB
    added = ["quantize.frozen=nf4", "trainer.precision=bf16", "trainer.activation_checkpointing=true"]
    assert tight[-1] == f"  it fits with: {' '.join(added)} evaluation.batch_size={AT_ONCE}"
    batch = lines_of(11, "trainer.activation_checkpointing=true", "quantize.frozen=nf4", "trainer.precision=bf16")
    assert batch[-1] == f"  it fits with: evaluation.batch_size={AT_ONCE}" and "quantize.frozen" not in batch[3]
    small = lines_of(9, "trainer.activation_checkpointing=true", "quantize.frozen=nf4", "trainer.precision=bf16")
    assert small[-1].startswith("  it fits with: data.batch_size=32 evaluation.batch_size=16 metrics=[]")


def test_what_nothing_makes_fit_says_so(monkeypatch):
    monkeypatch.setattr(smaller, "check_available", lambda: None)
    found = lines_of(4)
    assert "none of these fits" in found[-1] and "trainer.strategy=fsdp" in found[-1]
    assert "data.batch_size=1 " in found[-2]


def test_without_the_library_that_quantises_its_rows_are_left_out(monkeypatch):
    def missing():
        raise ValueError

    monkeypatch.setattr(smaller, "check_available", missing)
    assert not [line for line in lines_of(12) if "quantize" in line]


def test_the_command_ends_with_it_and_refuses_what_is_no_memory(command):
    code, out, _ = command("fit", "--recipe", "toy/mixture", "--dry-run", "--memory", 4)
    assert "to fit a GPU of 4 GB (3.94 GiB, about 2.00 GiB of them CUDA's own), estimated:" in out and "as it is" in out
    for given in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^--memory: .* must be above 0"):
            dry_run(read_recipe("toy/mixture"), None, memory=given)
    code, _, err = command("fit", "--recipe", "digits", "--memory", 24)
    assert code == 2 and err == "flowmap: --memory: goes with --dry-run\n"


@pytest.mark.slow
def test_the_rows_of_flux_are_the_memory_of_recipes_with_these_settings():
    pytest.importorskip("bitsandbytes")
    settings = ["data.images.root=there"]
    lines = dry_run(read_recipe("flux-dev-lora", settings), None, memory=24)
    for form in ("int8", "nf4"):
        run = resolve(read_recipe("flux-dev-lora", [*settings, f"quantize.frozen={form}"]))
        config = config_without_weights(run, Outlines().of(run, whole=False)[0])
        training = networks_memory(run, config, networks_costs(run, config))
        evaluation = evaluation_bytes(run, config)
        measuring = on_device.measuring_bytes(training, evaluation)
        (row,) = (
            line.split() for line in lines if line.split()[:1] == [f"quantize.frozen={form}"] and "data" not in line
        )
        assert [row[1], row[3], row[5]] == [
            f"{part / GIB:.2f}" for part in (training.frozen, training.total, measuring)
        ]

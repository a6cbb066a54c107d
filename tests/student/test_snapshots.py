"""Snapshots of a run, combined after it, are the average that the run would have tracked."""

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors, write_text
from flowmap.flow.averaging import posthoc_coefficients
from flowmap.student.folder import load_student
from flowmap.student.snapshots import combine, list_snapshots, nearest_snapshot, save_snapshot
from flowmap.train.fit import fit


def distance(a, b):
    return sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 200 steps that tracks 0.08, and keeps snapshots of 0.05 and 0.10 sixteen times."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("snapshots")
    write_text(folder / "tiny.yaml", TINY.replace("std: 0.1, ", "std: 0.08, "))
    settings = [
        "trainer.steps=192",
        "trainer.checkpoint_every_steps=192",
        "ema.snapshot_every_steps=12",
        "log.every_steps=64",
        "metrics=[]",
    ]
    return fit(flowmap.read_recipe(folder / "tiny.yaml", settings), folder / "run", log=lambda message: None).folder


def test_names(run):
    found = list_snapshots(run)
    assert len(found) == 3 * 16 and found[0][:2] == (12, 0.05) and found[-1][:2] == (192, 0.1)


def test_a_tracked_width_is_found_again_exactly(run):
    for std in (0.05, 0.08, 0.1):
        tracked = read_tensors(run / "ema" / f"step-00000192-std-{std:.3f}.safetensors")
        combined = combine(run, std=std)
        assert distance(combined, tracked) < 1e-4 * distance(tracked, {k: 0 * v for k, v in tracked.items()})


def test_a_width_that_no_snapshot_has_comes_close_to_the_one_that_was_tracked(run):
    """From the 0.05 and 0.10 snapshots alone, the tracked 0.08: far closer than either of them is."""
    for path in run.glob("ema/*std-0.080*"):
        path.unlink()
    tracked = read_tensors(run / "student" / "model.safetensors")
    error = distance(combine(run, std=0.08), tracked)
    nearest = min(
        distance(read_tensors(run / "ema" / f"step-00000192-std-{std:.3f}.safetensors"), tracked) for std in (0.05, 0.1)
    )
    assert error < 0.1 * nearest
    earlier = combine(run, std=0.08, step=96)
    assert distance(earlier, tracked) > error


def test_the_weights_of_the_combination_sum_to_one(run):
    found = list_snapshots(run)
    for std in (0.03, 0.08, 0.2):
        weights = posthoc_coefficients([s for s, _, _ in found], [w for _, w, _ in found], target_std=std)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-9)


def test_combined_weights_are_a_student(run):
    student = flowmap.load_student(run)
    student.flow_map.load_state_dict(combine(run, std=0.15))
    assert bool(torch.isfinite(student.sample(8, steps=2)).all())


def test_a_constant_signal_stays(tmp_path):
    for step in (10, 20, 30):
        for std in (0.05, 0.1):
            save_snapshot(tmp_path, step, std, {"w": torch.full((3,), 2.5)})
    torch.testing.assert_close(combine(tmp_path, std=0.07)["w"], torch.full((3,), 2.5))


def test_the_nearest_snapshot_is_the_narrowest_one_at_that_share(tmp_path):
    for step in (10, 20, 30, 40):
        for std in (0.1, 0.05):
            save_snapshot(tmp_path, step, std, {"w": torch.tensor([step + std])})
    assert float(nearest_snapshot(tmp_path, share=0.25)["w"]) == pytest.approx(10.05)
    assert float(nearest_snapshot(tmp_path, share=0.7)["w"]) == pytest.approx(30.05)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="snapshot_every_steps"):
        combine(tmp_path, std=0.1)
    save_snapshot(tmp_path, 10, 0.05, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="at or before step 5"):
        combine(tmp_path, std=0.1, step=5)
    for std in (0.0, -1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="std"):
            combine(tmp_path, std=std)
    with pytest.raises(ValueError, match="step"):
        combine(tmp_path, std=0.1, step=99)
    save_snapshot(tmp_path, 10, 0.1, {"v": torch.ones(3)})
    with pytest.raises(ValueError, match="std-0.100"):
        combine(tmp_path, std=0.1)
    (tmp_path / "ema" / "step-00000010-std-0.100.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="std-0.100"):
        combine(tmp_path, std=0.1)


def test_the_command_writes_a_student_of_another_width(run, command, tmp_path):
    code, out, _ = command("average", "--run", run, "--std", 0.07, "--out", tmp_path / "student")
    assert code == 0 and out.strip() == str(tmp_path / "student")
    student, weights = load_student(tmp_path / "student"), combine(run, std=0.07)
    for name, tensor in student.flow_map.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert student.config.step == 192 and "Not measured yet" in (tmp_path / "student" / "README.md").read_text()
    code, _, err = command("average", "--run", tmp_path, "--std", 0.07, "--out", tmp_path / "other")
    assert code == 2 and "not a run folder" in err and not (tmp_path / "other").exists()

"""The files of a run, and how it ends when it cannot go on: NaN, Ctrl-C, a full disk, a foreign folder."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from conftest import TINY, bytes_of

import flowmap
from flowmap.base.files import read_tensors
from flowmap.recipe.optimizer import AdamW
from flowmap.train.csv_log import read_log
from flowmap.train.fit import FitError, fit
from flowmap.train.module import DistillModule, norm_of
from flowmap.train.strategy import read_checkpoint


def recipe_of(path, *overrides):
    return flowmap.read_recipe(path, overrides)


def quiet(message):
    pass


def finite(state) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in state.values())


def test_a_run_leaves_what_is_promised(finished):
    names = set(bytes_of(finished))
    assert {"recipe.yaml", "metrics.json", "log.csv", "checkpoints/last.ckpt", "samples/step-00000020.png"} <= names
    assert {f"student/{name}" for name in ("config.json", "model.safetensors", "recipe.yaml", "README.md")} <= names
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= {"student", "teacher", "floor", "seconds", "nfe"} and set(metrics["student"]) == {"1", "2"}
    assert metrics["teacher"]["nfe"] == 4
    rows = read_log(finished / "log.csv")
    assert [row["step"] for row in rows] == [str(i) for i in range(20)]
    assert {"train/loss", "train/tangent_norm", "train/lr", "speed/images_per_second", "speed/memory_gib"} <= set(
        rows[-1]
    )
    assert any(key.startswith("by_time/") for row in rows for key in row)
    assert [float(row["train/tangent_weight"]) for row in rows[:3]] == pytest.approx([0, 1 / 12, 2 / 12])
    assert float(rows[0]["train/tangent_against_difference"]) < 0.05


def test_the_student_that_ships_is_the_checkpoints_average(finished):
    state, shipped = (
        read_checkpoint(finished / "checkpoints" / "last.ckpt"),
        read_tensors(finished / "student" / "model.safetensors"),
    )
    assert state["global_step"] == 20
    assert all(torch.equal(state["state_dict"][f"averages.0.{name}"], tensor) for name, tensor in shipped.items())
    assert all(name.startswith(("student.", "averages.")) for name in state["state_dict"]), (
        "the teacher is in no checkpoint"
    )


def test_the_same_recipe_gives_the_same_run_and_a_finished_run_is_left_alone(tiny, finished):
    before = bytes_of(finished)
    said = []
    fit(recipe_of(tiny), finished, log=said.append)
    assert bytes_of(finished) == before and "complete" in said[0]
    fit(recipe_of(tiny), finished, overwrite=True, log=quiet)
    after = bytes_of(finished)
    for files in (before, after):  # the card states the speed
        card = files["student/README.md"].splitlines()
        files["student/README.md"] = [line for line in card if not line.startswith(b"Samples a second")]
    assert {name for name in after if after[name] != before[name]} <= {
        "log.csv",
        "metrics.json",
        "checkpoints/last.ckpt",
    }


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch, command, bad):
    monkeypatch.setattr("flowmap.train.module.draw_sample", spoiled_at(13, float(bad)))
    code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert code == 1
    assert (
        "the loss is nan at step 13 (t in [0." in err
        and "s in [" in err
        and f"last good checkpoint is {last} (step 12)" in err
    )
    assert "Traceback" not in err
    assert finite(read_checkpoint(last)["state_dict"])
    assert finite(read_tensors(tmp_path / "run" / "student" / "model.safetensors"))


def spoiled_at(step: int, bad: float):
    """draw_sample, one coordinate of whose data is not finite at that step."""
    from flowmap.train import draw

    calls = iter(range(1000))

    def spoiled(recipe, x0, cond, generator, empty=None, x1=None, prior=None):
        sample = draw.draw_sample(recipe, x0, cond, generator)
        if next(calls) == step:
            sample.xt[0, 0] = bad
        return sample

    return spoiled


@pytest.mark.parametrize("step", [0, 5, 11])  # 11: the checkpoint of step 12 would follow at once
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tiny, tmp_path, monkeypatch, step):
    original = DistillModule.on_before_optimizer_step

    def spoil(self, optimizer):
        if self.global_step == step:
            next(self.student.parameters()).grad[0, 0] = float("nan")
        original(self, optimizer)

    monkeypatch.setattr(DistillModule, "on_before_optimizer_step", spoil)
    with pytest.raises(
        FitError, match=rf"the gradient's norm is nan at step {step} \(t in .*(step 6|no checkpoint was kept yet)"
    ):
        fit(recipe_of(tiny), tmp_path / "run", log=quiet)
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert finite(read_tensors(path))


def test_weights_that_overflow_are_never_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        AdamW, "lr_at", lambda self, step, total_steps: 1e36
    )  # far out of the range that a recipe may ask for
    with pytest.raises(FitError, match="not finite|is nan|is inf"):
        fit(recipe_of(tiny, "trainer.checkpoint_every_steps=1"), tmp_path / "run", log=quiet)
    assert not list(tmp_path.rglob("last.ckpt")) or finite(
        read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    )


def test_ctrl_c_says_one_line_and_the_run_can_be_resumed(tiny, tmp_path, monkeypatch, command):
    original = DistillModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run")
    lines = err.splitlines()
    assert (
        code == 1
        and len(lines) == 4
        and lines[0].startswith("[1/1] tiny: 20 steps")
        and lines[1].startswith("teacher: 32 samples")
    )
    assert lines[2].startswith("step 1/20  loss ")
    assert "interrupted at step 9; --resume goes on" in lines[3] and "(step 6)" in lines[3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    code, out, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume")
    assert code == 0 and "resuming at step 6" in err and "student 1" in out


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny, tmp_path, monkeypatch, command):
    original, saves = torch.save, iter(range(1000))

    def full(state, path, *args, **kwargs):
        if next(saves) == 1:
            with open(path, "wb") as handle:
                handle.write(b"PK half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run")
    assert code == 1 and "last.ckpt" in err and "No space left on device" in err and "Traceback" not in err
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert not list(tmp_path.rglob(".*.tmp"))
    assert command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume")[0] == 0


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(tiny, tmp_path, monkeypatch):
    """The loss of given rows is the mean of its halves' losses; checked without draws, which differ by micro-batch."""
    module = module_of(recipe_of(tiny))
    rows = module.data.train[:16].double()
    x1 = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 1, 16, dtype=torch.float64)
    module.student.double()

    def gradient(chosen):
        module.zero_grad()
        sample = module.recipe.path.sample(rows[chosen], x1[chosen], t[chosen], t[chosen] * 0.3, {})
        module.recipe.objective(module.student, module.teacher.guided, sample, 6).value.backward()
        return torch.cat([p.grad.flatten().clone() for p in module.student.parameters()])

    whole = gradient(slice(0, 16))
    halves = (gradient(slice(0, 8)) + gradient(slice(8, 16))) / 2
    torch.testing.assert_close(halves, whole, rtol=1e-10, atol=1e-14)


def test_accumulation_sees_the_same_data_and_makes_the_same_number_of_steps(tiny, tmp_path, monkeypatch):
    seen = {}
    for accumulate, batch in ((1, 16), (2, 8)):
        got = seen.setdefault(accumulate, [])
        original = DistillModule.training_step

        def look(self, batch, batch_idx, got=got, original=original):
            got.append(batch[0])
            return original(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(DistillModule, "training_step", look)
            settings = (f"trainer.accumulate={accumulate}", f"data.batch_size={batch}", "trainer.steps=6")
            fit(recipe_of(tiny, *settings), tmp_path / str(accumulate), log=quiet)
        assert len(read_log(tmp_path / str(accumulate) / "log.csv")) == 6
    assert torch.equal(torch.cat(seen[1]), torch.cat(seen[2]))


def module_of(recipe) -> DistillModule:
    from flowmap.build.data import build_data
    from flowmap.build.student import build_student, student_config
    from flowmap.build.teacher import build_teacher
    from flowmap.plan.plan import resolve

    run = resolve(recipe)
    data, teacher = build_data(run), build_teacher(run)
    return DistillModule(run, build_student(run, student_config(run, data, teacher), teacher), teacher, data)


def test_bf16_runs_and_keeps_float32_weights(tiny, tmp_path):
    run = fit(recipe_of(tiny, "trainer.precision=bf16", "trainer.steps=6"), tmp_path / "run", log=quiet)
    assert {tensor.dtype for tensor in read_tensors(run.folder / "student" / "model.safetensors").values()} == {
        torch.float32
    }
    other = fit(recipe_of(tiny, "trainer.steps=6"), tmp_path / "other", log=quiet)
    losses = [
        [float(row["train/loss"]) for row in read_log(folder / "log.csv")] for folder in (run.folder, other.folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]


def test_an_average_of_constant_decay_is_the_closed_form(tiny, tmp_path, monkeypatch):
    weights = []
    original = DistillModule.average

    def look(self):
        weights.append([p.detach().clone() for p in self.student.parameters()])
        original(self)

    monkeypatch.setattr(DistillModule, "average", look)
    initial = [p.detach().clone() for p in module_of(recipe_of(tiny)).student.parameters()]
    run = fit(recipe_of(tiny, "ema={kind: constant, decay: 0.8}"), tmp_path / "run", log=quiet)
    average = initial
    for step, theta in enumerate(weights, start=1):
        beta = min(0.8, step / (step + 9))
        average = [beta * a + (1 - beta) * w for a, w in zip(average, theta, strict=True)]
    assert len(weights) == 20
    for mean, tensor in zip(average, run.student.parameters(), strict=True):
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-7)
    assert not (run.folder / "ema").exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_bar_on_a_terminal_alone(tiny, tmp_path, monkeypatch, capsys, terminal):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    fit(recipe_of(tiny, "log.every_steps=1"), tmp_path / "run", log=quiet)
    err = capsys.readouterr().err
    assert ("/20 [" in err and "step/s" in err and "loss=" in err) if terminal else err == ""


def test_the_norm_of_tensors():
    assert float(norm_of([torch.tensor([3.0]), torch.tensor([[4.0]])])) == 5.0
    assert float(norm_of([])) == 0.0


def test_a_teacher_without_an_autograd_graph_is_no_submodule(tiny):
    module = module_of(recipe_of(tiny))
    assert set(dict(module.named_children())) == {"student", "averages"}


def test_the_recipe_text_of_these_tests_is_read(tiny):
    assert recipe_of(tiny).trainer.steps == 20 and "kind: exact" not in TINY

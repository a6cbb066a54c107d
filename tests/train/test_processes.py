"""Two processes through the real command (DDP and FSDP2 on gloo): gradients are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY
from torch import nn

from flowmap.base.files import read_tensors
from flowmap.train.strategy import read_checkpoint

DIGITS = """\
name: tiny-digits
data: {kind: digits, batch_size: 8, drop_condition: 0.2}
student: {kind: dit, preset: nano, depth: 2}
times: {kind: mixture, base: {kind: interval}, diagonal: 0.25}
objective: {kind: ayf_emd, warmup_steps: 4}
optimizer: {lr: 1.0e-3, schedule: cosine, clip_norm: 1.0}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 8, checkpoint_every_steps: 4, accelerator: cpu, devices: 2, activation_checkpointing: true}
ema: {kind: power, std: 0.1, snapshot_stds: [0.05, 0.1], snapshot_every_steps: 4}
metrics: [{kind: frechet, features: pixels, images: 100}, {kind: endpoint_error, images: 20, steps: 4}]
log: {wandb: false, every_steps: 1, grid_images: 8}
"""

SCRIPT = """\
import os, signal, sys
from flowmap.cli import main
from flowmap.train import module

original, calls = module.draw_sample, iter(range(1000))

def spoiled(recipe, x0, cond, generator, empty=None, x1=None, prior=None):
    sample = original(recipe, x0, cond, generator)
    call, rank = next(calls), int(os.environ.get("LOCAL_RANK", "0"))
    if os.environ.get("SPOIL") == "nan" and (call, rank) == (5, 1):
        sample.xt[0, 0] = float("nan")
    if os.environ.get("SPOIL") == "kill" and call == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample

module.draw_sample = spoiled
if __name__ == "__main__":
    sys.exit(main())
"""


def fit(recipe, out, *arguments, spoil: str = "", timeout: float = 120):
    """`flowmap fit` in a process of its own; (exit code, stdout, stderr)."""
    script = recipe.with_name("spoiled.py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPOIL": spoil}
    command = [sys.executable, str(script), "fit", "--recipe", str(recipe), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def states_of(run):
    return [read_tensors(path) for path in [run / "student" / "model.safetensors", *sorted((run / "ema").glob("*"))]]


def assert_close(a, b, **tolerance):
    for one, two in zip(states_of(a), states_of(b), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(DIGITS)
    return path


@pytest.mark.slow
def test_ddp_and_fsdp_are_one_run(digits, tmp_path, command):
    for strategy in ("ddp", "fsdp"):
        code, out, err = fit(digits, tmp_path / strategy, f"trainer.strategy={strategy}")
        assert code == 0, err
        assert out.count("student:") == 1 and out.count("\nfloor ") == 1, "the figures are printed once"
        assert (
            err.count("[1/1] tiny-digits") == 1
            and err.count("evaluating: student 1 step") == 1
            and "Warning" not in err
        )
    # Adam divides by the root of tiny second moments: rounding in the gradients' sums changes weights by about 1e-5
    assert_close(tmp_path / "ddp", tmp_path / "fsdp", rtol=1e-4, atol=3e-5)
    one, two = (json.loads((tmp_path / s / "metrics.json").read_text())["student"]["1"] for s in ("ddp", "fsdp"))
    assert one == pytest.approx(two, rel=1e-3)
    assert (
        command("sample", "--student", tmp_path / "fsdp", "--num", 2, "--class", 3, "--out", tmp_path / "drawn")[0] == 0
    )
    code, out, _ = command("evaluate", "--student", tmp_path / "fsdp", "--steps", 1)
    assert code == 0, "one process measures what two trained"
    alone = json.loads(out)["student"]["1"]
    assert alone == pytest.approx(two, rel=1e-4), "the figures do not depend on how many processes drew the samples"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_killed_and_resumed(digits, tmp_path, strategy):
    settings = [f"trainer.strategy={strategy}"]
    assert fit(digits, tmp_path / "whole", *settings)[0] == 0
    assert fit(digits, tmp_path / "killed", *settings, spoil="kill")[0] != 0
    assert read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"] == 4
    code, _, err = fit(digits, tmp_path / "killed", *settings, "--resume")
    assert code == 0 and "resuming at step 4" in err, err
    assert_close(tmp_path / "whole", tmp_path / "killed", rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nan_on_one_process_stops_both(digits, tmp_path, strategy):
    started = time.monotonic()
    code, out, err = fit(digits, tmp_path / "run", f"trainer.strategy={strategy}", spoil="nan")
    assert code == 1 and time.monotonic() - started < 60
    assert err.count("flowmap: ") == 1 and "at step 5" in err and "(step 4)" in err and "Traceback" not in err, err


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_doubled_batch(tmp_path):
    """A sample draws the same in whatever process: the runs are equal up to the order of float32 sums."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("diagonal: 0.25", "one_step: 0.1, diagonal: 0.25"))
    assert fit(path, tmp_path / "two", "trainer.devices=2", "trainer.strategy=ddp")[0] == 0
    assert fit(path, tmp_path / "one", "data.batch_size=32")[0] == 0
    assert_close(tmp_path / "one", tmp_path / "two", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "objective"),
    [
        (DIGITS, "{kind: psd}"),
        (DIGITS, "{kind: ayf_emd, warmup_steps: 0, derivative: difference}"),
        (TINY, "{kind: ayf_mixed, warmup_steps: 0, own_lagrangian: 0.5, own_eulerian: 0.5}"),
    ],
    ids=["psd", "ayf_emd", "ayf_mixed"],
)
def test_processes_whose_rows_are_of_different_kinds_call_sharded_weights_alike(tmp_path, text, objective):
    """One row a process: in some steps only one has rows of a share, and both must take part in every call."""
    path = tmp_path / "one.yaml"
    path.write_text(text)
    settings = [
        f"objective={objective}",
        "times.one_step=0.25",
        "ema={kind: constant, decay: 0.9}",
        "metrics=[]",
        "trainer.steps=8",
    ]
    sharded = ["trainer.strategy=fsdp", "trainer.devices=2", "data.batch_size=1"]
    for name, more in (("fsdp", sharded), ("one", ["trainer.devices=1", "data.batch_size=2"])):
        code, _, err = fit(path, tmp_path / name, *settings, *more)
        assert code == 0, err
    assert_close(tmp_path / "one", tmp_path / "fsdp", rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ctrl_c_in_the_real_command(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("steps: 20", "steps: 100000").replace("schedule: cosine", "schedule: constant"))
    command = [sys.executable, "-m", "flowmap", "fit", "--recipe", str(path), "--out", str(tmp_path / "run")]
    heard = lambda: signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, and so would their children
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    (line,) = [line for line in err.splitlines() if line.startswith("flowmap: ")]
    assert process.returncode == 1 and out == "" and "Traceback" not in err, err
    assert "interrupted at step" in line and "--resume" in line


# ---------------------------------------------------------------- by hand: DiT, AYF-EMD by riding, float64

RANKS, ROWS = 2, 4


def _net(checkpointed: bool) -> nn.Module:
    from flowmap.nets import DiT
    from flowmap.nets.flow_map import FlowMapNet

    torch.manual_seed(0)
    net = FlowMapNet(DiT(preset="nano").build((3, 4, 6), num_classes=5, guidance=True)).double()
    for p in net.parameters():  # zero-initialised gates would hide the blocks
        nn.init.normal_(p, std=0.1)
    net.net.activation_checkpointing = checkpointed
    return net


class _Step(nn.Module):
    """The objective on some of the batch's rows, as one forward: what DDP wants to wrap."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def forward(self, rows: slice) -> torch.Tensor:
        from flowmap.flow.path import Linear
        from flowmap.objectives import OBJECTIVES

        x0, x1, v = torch.randn(
            3, RANKS * ROWS, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        t = torch.tensor([0.9, 0.5, 1.0, 0.3] * RANKS, dtype=torch.float64)
        s = torch.tensor([0.2, 0.5, 0.0, 0.1] * RANKS, dtype=torch.float64)  # one of each rank's rows on the diagonal
        cond = {
            "class": torch.arange(RANKS * ROWS) % 5,
            "guidance": torch.linspace(1, 3, RANKS * ROWS, dtype=torch.float64),
        }
        sample = Linear().sample(
            x0[rows], x1[rows], t[rows], s[rows], {key: value[rows] for key, value in cond.items()}
        )
        teacher = SimpleNamespace(velocity=lambda x, t, cond: v[rows] - x)
        return OBJECTIVES["ayf_emd"](warmup_steps=0, derivative="dual")(self.student, teacher, sample, 10).value


def _compare(rank: int, address: str, wrapping: str, checkpointed: bool) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    reference, net = _net(False), _net(checkpointed)
    _Step(reference)(slice(None)).backward()
    step = _Step(net)
    if wrapping == "ddp":
        step = nn.parallel.DistributedDataParallel(step)
    else:
        from flowmap.train.sharding import shard

        shard(net, dist.device_mesh.init_device_mesh("cpu", (RANKS,)))
    for _ in range(2):  # the second time with the first one's state behind it
        net.zero_grad()
        step(slice(rank * ROWS, (rank + 1) * ROWS)).backward()
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(gradient, q.grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert float(q.grad.abs().max()) > 0, name
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp"])
def test_the_gradients_of_a_dit_on_two_processes_are_the_full_batchs(tmp_path, wrapping, checkpointed):
    mp.spawn(_compare, (f"file://{tmp_path}/rendezvous", wrapping, checkpointed), nprocs=RANKS)

"""Settings of a device that change speed alone: fused steps, TF32, memory format, rare looks at finiteness; and small
measurements on the way."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import flowmap
from flowmap.base.finite import check_finite
from flowmap.flow.derivative import value_and_rate
from flowmap.nets.edm2 import EDM2, Conv
from flowmap.recipe.optimizer import AdamW
from flowmap.train.checkpoint_file import read_checkpoint
from flowmap.train.csv_log import read_log
from flowmap.train.device import channels_last, fast_matmul
from flowmap.train.finish import FitError
from flowmap.train.module import DistillModule


def test_the_optimizer_is_fused_and_gradients_can_still_be_clipped():
    assert AdamW()([nn.Parameter(torch.ones(2))]).defaults["fused"]
    with FakeTensorMode():
        mixed = [nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "cuda")]
        assert not AdamW()(mixed).defaults["fused"] and not AdamW()(mixed[:1] + [meta()]).defaults["fused"]
        parameter = nn.Parameter(torch.ones(2, device="cuda"))
        parameter.grad = torch.ones(2, device="cuda")
        optimizer = AdamW()([parameter])
        assert optimizer.defaults["fused"]
        MixedPrecision("bf16-mixed", "cuda").clip_gradients(optimizer, 1.0)


def meta() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, device="meta"))


def test_fused_steps_on_the_cpu_are_the_plain_ones_to_rounding():
    settings, generator = AdamW(lr=1e-2, weight_decay=0.1), torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((3,), (5, 7), ())]
    ours, plain = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = settings(ours), torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), weight_decay=0.1, fused=False)
    for _ in range(20):
        for one, other in zip(ours, plain, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, plain, strict=True):  # 20 steps of rounding in float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("accelerator", "tf32", "inside"), [("auto", True, "high"), ("gpu", False, "highest"),
                                                             ("cpu", True, "highest")])  # fmt: skip
def test_tf32_is_on_while_training_on_a_gpu_alone(monkeypatch, accelerator, tf32, inside):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fast_matmul(SimpleNamespace(trainer=SimpleNamespace(tf32=tf32, accelerator=accelerator))):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"


def edm2():
    torch.manual_seed(0)
    spec = EDM2(channels=8, multipliers=(1, 2), num_blocks=1, attention_at=(4,))
    net = spec.build((3, 8, 8), num_classes=5, guidance=False).double()
    for p in net.parameters():  # gains that start at zero would hide the blocks
        nn.init.normal_(p, std=0.3)
    return lambda x, t: net(x, t, t / 2, {"class": torch.arange(5)}), net


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    net = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks
    ).double()
    return lambda x, t: net(x, t).sample, net


@pytest.mark.parametrize("build", [edm2, unet])
def test_channels_last_changes_no_value_and_no_tangent(build):
    plain, _ = build()
    call, net = build()
    channels_last(net, None, torch.device("cuda"))
    formats: list[bool] = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, Conv)):
            module.register_forward_hook(
                lambda m, i, out: formats.append(
                    isinstance(out, torch.Tensor)
                    and out.ndim == 4
                    and out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    wanted, found = (value_and_rate(of, (x, t), (v, torch.ones_like(t))) for of in (plain, call))
    assert sum(formats) > len(formats) / 2, "the format goes through the network"
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert float(b.norm()) > 0.1


def test_channels_last_is_for_networks_of_convolutions_on_a_gpu():
    kernels = lambda net: next(p for p in net.parameters() if p.ndim == 4)
    lasts = lambda net: kernels(net).is_contiguous(memory_format=torch.channels_last)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    patches = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Linear(64, 64))
    for net, asked, device, wanted in (
        (convolutions, None, "cuda", True),
        (convolutions, None, "cpu", False),
        (convolutions, False, "cuda", False),
        (patches, None, "cuda", False),
        (patches, True, "cpu", True),
    ):
        net = copy.deepcopy(net)
        channels_last(net, asked, torch.device(device))
        assert lasts(net) == wanted


CONV = """\
data: {kind: digits, batch_size: 8}
student: {kind: edm2, channels: 8, multipliers: [1, 2], num_blocks: 1, attention_at: []}
objective: {kind: ayf_emd, warmup_steps: 1}
sampler: {kind: deterministic, steps: [1]}
trainer: {steps: 3, accelerator: cpu}
log: {wandb: false, every_steps: 1, grid_images: 4}
"""


def test_a_run_with_channels_last_is_that_without(tmp_path):
    (tmp_path / "conv.yaml").write_text(CONV)
    losses = []
    for asked in ("true", "false"):
        recipe = flowmap.read_recipe(tmp_path / "conv.yaml", [f"trainer.channels_last={asked}"])
        run = flowmap.fit(recipe, tmp_path / asked, log=lambda line: None)
        losses.append([float(row["train/loss"]) for row in read_log(run.folder / "log.csv")])
        assert run.student.sample(2).isfinite().all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def spoil(monkeypatch, step):
    original = DistillModule.draw

    def draw(self, batch):
        sample, generator = original(self, batch)
        if self.global_step == step:
            sample.xt[0, 0] = float("nan")
        return sample, generator

    monkeypatch.setattr(DistillModule, "draw", draw)


@pytest.mark.parametrize(("every", "noticed"), [(3, 9), (50, 12)])  # at a look, or before the checkpoint at 12
def test_a_nan_is_found_at_the_next_look_and_before_anything_is_saved(tiny, tmp_path, monkeypatch, every, noticed):
    spoil(monkeypatch, 7)
    steps: list[int] = []
    average = DistillModule.average
    monkeypatch.setattr(DistillModule, "average", lambda self: (steps.append(self.global_step), average(self)))
    settings = [f"trainer.check_finite_every_steps={every}", "ema.snapshot_every_steps=6"]
    with pytest.raises(FitError, match=r"the loss is NaN or infinite at step 7; the last good checkpoint is .*step 6"):
        flowmap.fit(flowmap.read_recipe(tiny, settings), tmp_path / "run", log=lambda line: None)
    assert steps[-1] == (noticed - 1 if every == 3 else noticed)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    for path in (tmp_path / "run").rglob("*.safetensors"):
        check_finite(load_file(path), path)


def test_how_often_the_host_looks_changes_no_weight(tiny, tmp_path):
    folders = []
    for every in (1, 7):
        recipe = flowmap.read_recipe(tiny, [f"trainer.check_finite_every_steps={every}", "trainer.steps=8"])
        folders.append(flowmap.fit(recipe, tmp_path / str(every), log=lambda line: None).folder)
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_measuring_on_the_way_with_fewer_images_and_steps(tiny, tmp_path):
    settings = ["log.metrics_every_steps=8", "log.metrics_images=50", "log.metrics_steps=[2]"]
    run = flowmap.fit(flowmap.read_recipe(tiny, settings), tmp_path / "run", log=lambda line: None)
    rows = read_log(run.folder / "log.csv")
    keys = {key for row in rows for key, value in row.items() if key.startswith("metrics") and value not in ("", None)}
    on_the_way = {key for key in keys if key.startswith("metrics_of_50/")}
    assert on_the_way and all(key.endswith("/2") for key in on_the_way), keys
    assert {key for key in keys if key.endswith("/1")} and set(run.metrics["student"]) == {"1", "2"}

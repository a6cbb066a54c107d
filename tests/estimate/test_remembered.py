"""Kernels that are remembered have the same results, and only those whose results are tensors of their own."""

import torch
from torch.nn import functional as F

from flowmap.estimate import flops, live
from flowmap.estimate.costs import Cost, _counted
from flowmap.estimate.live import LiveBytes
from flowmap.estimate.remembered import Mode, remembered
from flowmap.nets import DiT
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig


class Remembering(Mode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return remembered(function, args, kwargs or {})


def outline(x):
    return x.shape, x.stride(), x.dtype, x.storage_offset(), x.untyped_storage().nbytes(), x.device


def test_a_remembered_kernel_gives_what_it_gave():
    x, weight = torch.zeros(4, 3, 5, 6, device="meta"), torch.zeros(7, 3, 3, 3, device="meta")
    calls = (
        lambda: F.conv2d(x, weight),
        lambda: x.transpose(1, 3) * 2,
        lambda: F.group_norm(x, 3),
        lambda: torch.cat([x, x], 1).bfloat16(),
        lambda: (x > 0).sum((0, 2)),
        lambda: x.std(),
    )
    plain = [outline(call()) for call in calls]
    with Remembering():
        for _ in range(2):
            assert [outline(call()) for call in calls] == plain


def test_views_changes_in_place_and_real_tensors_are_as_without_it():
    with Remembering():
        for _ in range(2):
            x = torch.zeros(4, 6, device="meta")
            assert x.view(24).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert torch.ops.aten._unsafe_view(x, [24]).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1) is x
            real = torch.arange(6.0)
            assert (real + 1).tolist() == [1, 2, 3, 4, 5, 6] and (real * 2)[3] == 6
            assert float(F.dropout(torch.ones(1000), 0.5).mean()) > 0


def test_scalars_of_other_types_are_other_arguments():
    x = torch.zeros(3, dtype=torch.int64, device="meta")
    with Remembering():
        assert (x * 1).dtype == torch.int64 and (x * 1.0).dtype == torch.float32 and (x * True).dtype == torch.int64


def test_costs_and_live_bytes_are_the_same(monkeypatch):
    config = StudentConfig(net=DiT(preset="nano", patch=1), sampler=Deterministic(), shape=(1, 8, 8))

    def found() -> tuple[Cost, int]:
        with torch.device("meta"):
            net = config.build()
        cost = _counted(net, config, graded=True, checkpointing=True)
        with torch.device("meta"), torch.no_grad(), LiveBytes() as bytes_alive:
            net(torch.zeros(5, 1, 8, 8), torch.zeros(5), torch.zeros(5), {})
        return cost, bytes_alive.peak

    first, again = found(), found()
    for module in (flops, live):
        monkeypatch.setattr(module, "remembered", lambda function, args, kwargs: function(*args, **kwargs))
    assert found() == first == again

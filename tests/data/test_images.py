"""The digits are complete and split evenly.

Fashion-MNIST's files are read in the IDX format; missing and broken ones are distinguished.
"""

import gzip
import struct

import pytest
import torch
from torch.utils.data import DataLoader

from flowmap.data import DATA, Digits, Fashion, StepBatches, as_it_is, fetch
from flowmap.data.images import idx


def test_digits_are_whole_and_disjoint():
    data = Digits().build()
    assert data.shape == (1, 8, 8) and data.num_classes == 10 and data.name == "digits"
    assert len(data) == 1500 and data.held_out.shape == (297, 1, 8, 8)
    assert data.train.dtype == torch.float32 and data.labels.dtype == torch.int64
    everything = torch.cat([data.train, data.held_out])
    assert everything.min() == -1 and everything.max() == 1
    assert len(everything.unique(dim=0)) == 1797  # all differ, so none is in both parts
    assert data.reference is data.train
    assert torch.bincount(data.labels).min() > 100


def test_digits_split_is_the_seeds():
    assert Digits().build().train.equal(Digits().build().train)
    assert not Digits(seed=1).build().train.equal(Digits().build().train)
    with pytest.raises(ValueError, match="data.held_out is 1797"):
        Digits(held_out=1797).build()


def test_batches_come_whole_through_a_loader():
    data = Digits().build()
    steps = StepBatches(len(data), 5, seed=3, num_steps=2)
    batches = list(DataLoader(data, batch_sampler=steps, collate_fn=as_it_is))
    assert len(batches) == 2
    x0, cond = batches[1]
    rows = steps.indices(1)
    assert x0.shape == (5, 1, 8, 8) and x0.equal(data.train[rows]) and cond["class"].equal(data.labels[rows])


def idx_bytes(values: torch.Tensor) -> bytes:
    return (
        struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape)
        + values.to(torch.uint8).numpy().tobytes()
    )


@pytest.fixture
def small_fashion(tmp_path, monkeypatch):
    """A folder with the four files, of 6 and 4 images; image n is 4n in its left half and 255 in its right one."""
    shapes = {name: (6 if name.startswith("train") else 4, *shape[1:]) for name, shape in idx.FASHION_FILES.items()}
    monkeypatch.setattr(idx, "FASHION_FILES", shapes)
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")
    for name, shape in shapes.items():
        values = (
            torch.arange(shape[0]) if len(shape) == 1 else (4 * torch.arange(shape[0])).view(-1, 1, 1).repeat(1, 28, 28)
        )
        if len(shape) == 3:
            values[..., 14:] = 255
        (tmp_path / name).write_bytes(gzip.compress(idx_bytes(values)))
    return tmp_path


@pytest.mark.parametrize("size", [28, 14])
def test_fashion_reads_its_files(small_fashion, size):
    data = Fashion(root=str(small_fashion), size=size).build()
    assert data.shape == (1, size, size) and len(data) == 6 and len(data.held_out) == 4
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5] and data.num_classes == 10
    assert data.train[..., size // 2 :].eq(1).all()
    assert torch.allclose(data.train[:, 0, 0, 0], torch.arange(6) * 4 / 127.5 - 1)


def test_fashion_pools_areas(small_fashion):
    name = "t10k-images-idx3-ubyte.gz"
    checks = (torch.arange(28).view(-1, 1) + torch.arange(28)) % 2 * 255
    (small_fashion / name).write_bytes(gzip.compress(idx_bytes(checks.expand(4, 28, 28))))
    assert Fashion(root=str(small_fashion), size=14).build().held_out.abs().max() < 1e-6  # a chequered board is grey


def test_fashion_says_what_to_do(tmp_path, small_fashion):
    (small_fashion / "train-labels-idx1-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="train-labels.*make data"):
        Fashion(root=str(small_fashion)).build()
    (small_fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(torch.zeros(5))))
    with pytest.raises(ValueError, match="is not an IDX file"):
        Fashion(root=str(small_fashion)).build()
    assert not idx.complete(small_fashion)
    with pytest.raises(ValueError, match="make data") as error:
        Fashion(root=str(tmp_path / "nowhere")).build()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="data.size is 7"):
        Fashion(size=7).build()


def test_fetch_does_nothing_where_all_is_there(small_fashion, monkeypatch, capsys):
    (small_fashion / "fashion").mkdir()
    for name in idx.FASHION_FILES:
        (small_fashion / name).rename(small_fashion / "fashion" / name)
    monkeypatch.setattr(fetch, "_download", lambda scratch: pytest.fail("downloaded again"))
    assert fetch.main(["fashion", "--out", str(small_fashion)]) == 0
    assert "complete" in capsys.readouterr().out


def test_fetch_puts_whole_files_in_place(small_fashion, monkeypatch):
    def unpack(scratch, package, by_hand):
        folder = scratch / "unpacked" / idx.SYSTEM_FOLDER.relative_to("/")
        folder.mkdir(parents=True)
        for name in idx.FASHION_FILES:
            (folder / name).write_bytes((small_fashion / name).read_bytes())

    monkeypatch.setattr(fetch, "_download", unpack)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: name)
    out = small_fashion / "out"
    assert fetch.main(["fashion", "--out", str(out)]) == 0
    assert [p.name for p in out.iterdir()] == ["fashion"] and idx.complete(out / "fashion")


def test_fetch_without_apt_tells_another_way(small_fashion, monkeypatch, capsys):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert fetch.main(["fashion", "--out", str(small_fashion / "out")]) == 2
    assert "no apt-get" in capsys.readouterr().err


def test_kinds():
    assert set(DATA) >= {"digits", "fashion", "toy"}

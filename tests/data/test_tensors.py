"""Shards of tensors: read in order, held-out part apart, anything else named."""

import pytest
import torch
from safetensors.torch import save_file

from flowmap.data import Latents


def shards(folder, classes=True):
    for i, n in enumerate((5, 3)):
        part = {"x0": torch.full((n, 4, 6, 3), float(i))}
        save_file(part | ({"class": torch.arange(n)} if classes else {}), folder / f"{i}.safetensors")


def test_shards_are_one_set(tmp_path):
    shards(tmp_path)
    (tmp_path / "._0.safetensors").write_bytes(b"what another system leaves")
    data = Latents(root=str(tmp_path), num_classes=7, held_out=2).build()
    assert data.train.shape == (6, 4, 6, 3) and data.held_out.shape == (2, 4, 6, 3)
    assert sorted(data.labels.tolist() + data.held_out_labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 4]
    again = Latents(root=str(tmp_path), num_classes=7, held_out=2, seed=1).build()
    assert data.held_out_labels.tolist() != again.held_out_labels.tolist(), "drawn by the seed: a folder may be sorted"
    assert data.num_classes == 7


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="data.root: .*has no"):
        Latents(root=str(tmp_path)).build()
    shards(tmp_path, classes=False)
    assert Latents(root=str(tmp_path)).build().labels is None
    with pytest.raises(ValueError, match="needs x0 .* and class"):
        Latents(root=str(tmp_path), num_classes=3).build()
    with pytest.raises(ValueError, match="leaves nothing"):
        Latents(root=str(tmp_path), held_out=8).build()
    (tmp_path / "2.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        Latents(root=str(tmp_path)).build()


def test_a_tenth_is_held_out_where_nothing_is_said(tmp_path):
    save_file({"x0": torch.arange(40.0).view(40, 1, 1, 1), "class": torch.arange(40) // 20}, tmp_path / "0.safetensors")
    data = Latents(root=str(tmp_path), num_classes=2).build()
    assert (
        len(data.held_out) == 4
        and len(data) == 36
        and torch.equal(data.train.flatten(), data.train.flatten().sort().values)
    )
    assert data.held_out_labels.tolist() == (data.held_out.flatten() // 20).long().tolist() != [1, 1, 1, 1]
    assert len(Latents(root=str(tmp_path), held_out=0).build()) == 40
    with pytest.raises(ValueError, match="held_out: -1 must be 0 or more"):
        Latents(root=str(tmp_path), held_out=-1)

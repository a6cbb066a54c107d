"""Data from Python: what is read, how it is scaled, and what is refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from flowmap.data.given import as_data

PICTURES = 2 * torch.rand(20, 1, 4, 6, generator=torch.Generator().manual_seed(0)) - 1
LABELS = torch.arange(20) % 3


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    "given",
    [
        (PICTURES, LABELS),
        TensorDataset(PICTURES, LABELS),
        Items([(x, int(y)) for x, y in zip(PICTURES, LABELS, strict=True)]),
    ],
)
def test_tensors_and_datasets_are_the_same_data(given):
    spec = as_data(given)
    data = spec.build()
    assert spec == as_data((PICTURES, LABELS)) and spec.outline() == ((1, 4, 6), 3) and spec.conditional
    assert (len(data.train), len(data.held_out), data.num_classes) == (18, 2, 3)
    whole = torch.cat([data.train, data.held_out]), torch.cat([data.labels, data.held_out_labels])
    order = whole[0][:, 0, 0, 0].argsort()
    assert torch.equal(whole[0][order], PICTURES[(mine := PICTURES[:, 0, 0, 0].argsort())])
    assert torch.equal(whole[1][order], LABELS[mine])


def test_a_range_becomes_ours_and_other_values_another_fingerprint():
    bytes_of = ((PICTURES + 1) * 127.5).round().to(torch.uint8)
    assert (as_data(bytes_of, range=(0, 255)).build().train.aminmax().max) <= 1
    assert as_data(PICTURES / 2).digest != as_data(PICTURES).digest
    points = torch.randn(20, 2)
    assert as_data(points).build().shape == (2,) and as_data(points).num_classes is None


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ([1, 2], {}, "list is no tensor, pair"),
        (PICTURES[0, 0, 0], {}, "are no (N, ...)"),
        ((PICTURES * 255).long(), {}, "samples are int64, with values from -"),
        ((PICTURES + 1) / 2, {}, "pictures in -1..1; state their range, such as flowmap.as_data(x, range=(0, 1))"),
        (PICTURES * 3, {}, "pictures in -1..1"),
        (PICTURES, {"range": (0, 1)}, "pictures in 0..1"),
        (PICTURES / 0, {}, "values that are not finite"),
        ((PICTURES, LABELS.float()), {}, "labels of shape (20,) and float32 are not (20,) whole numbers"),
        ((PICTURES, LABELS[:5]), {}, "labels of shape (5,)"),
        ((PICTURES, LABELS), {"num_classes": 2}, "labels are 0..2, not 0..1"),
        (Items([PICTURES[0], PICTURES[0, :, 1:]]), {}, "item 1 is (1, 3, 6) float32, the first (1, 4, 6) float32"),
        (Items([PICTURES[0], PICTURES[0].double()]), {}, "item 1 is (1, 4, 6) float64"),
        (Items(["a"]), {}, "item 0 is str, not a tensor"),
        (Items([(PICTURES[0], 1), PICTURES[0]]), {}, "item 1 has no label"),
        (Items([PICTURES[0], (PICTURES[0], 1)]), {}, "item 1 has a label"),
        (Items([]), {}, "the dataset has no items"),
    ],
)
def test_what_is_no_data_is_refused(given, options, says):
    with pytest.raises(ValueError) as error:
        as_data(given, **options)
    assert says in str(error.value) and str(error.value).startswith("data: ") and "\n" not in str(error.value)

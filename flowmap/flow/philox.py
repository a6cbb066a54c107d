"""Philox4x32-10, a counter-based random generator: 128 random bits from a 128-bit counter and a 64-bit key, stateless.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; the Random123 library. torch has
no unsigned 32-bit arithmetic on all devices, so words are int64 in [0, 2^32); the product of two words wraps around to
the correct 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmap.flow.host import on_device

ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Random words (4, ...), int64 in [0, 2^32), for counters of four words, each an int64 tensor (...).

    The key is two words.
    """
    a, b, c, d = counter
    even, odd = torch.stack([c, a]), torch.stack([b, d])
    shape = (2, *[1] * a.ndim)
    factors = on_device(torch.tensor(FACTORS[::-1]), a.device).view(shape)
    keys = [tuple((word + i * step) & WORD for word, step in zip(key, WEYL, strict=True)) for i in range(ROUNDS)]
    for round_key in on_device(torch.tensor(keys), a.device):
        product = even * factors
        high = (product >> 32).bitwise_and_(WORD)
        even = high.bitwise_xor_(odd).bitwise_xor_(round_key.view(shape)).flip(0)
        odd = product.bitwise_and_(WORD)
    return torch.stack([even[1], odd[0], even[0], odd[1]])

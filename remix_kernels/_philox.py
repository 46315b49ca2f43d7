"""Philox 4x32-10 in torch integers: the counter-based generator behind every draw.

A draw is a pure function of (seed, row, expert): no state, so that any backend, any split of the
batch and any number of threads give the same experts. The layout, shared by all backends:

    key      (seed low 32 bits, seed high 32 bits)
    counter  (row low 32 bits, row high 32 bits, expert // 4, 0)
    word     expert % 4 of the four output words

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox-4x32 with ten
    rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox_uint32(seed: int, offset: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Random words for `rows` consecutive counters from `offset` on.

    Products of two 32-bit numbers are taken modulo 2^64 in int64, and an arithmetic shift gives
    their high half. Only the low 32 bits of a word count: they are cut out where a word is
    multiplied next, and at the end.

    Returns:
        [rows, columns] int64, values in [0, 2^32).
    """
    blocks = (columns + 3) // 4
    row = torch.arange(offset, offset + rows, device=device, dtype=torch.int64).unsqueeze(1)
    c0 = (row & _MASK32).expand(rows, blocks).contiguous()
    c1 = ((row >> 32) & _MASK32).expand(rows, blocks)
    c2 = torch.arange(blocks, device=device, dtype=torch.int64).expand(rows, blocks).contiguous()
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    # A number would be made a tensor every time.
    low_half = torch.full((), _MASK32, dtype=torch.int64, device=device)
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0.mul_(_MULTIPLIER_0), c2.mul_(_MULTIPLIER_1)
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(low_half)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(low_half)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    words = torch.stack((c0, c1, c2, c3), dim=-1).bitwise_and_(low_half)
    return words.reshape(rows, blocks * 4)[:, :columns]

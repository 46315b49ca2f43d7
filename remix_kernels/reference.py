"""Every op as a plain loop: the specification and the oracle. Never on a hot path.

    y[t] = base[t] + sum_j w[t, j] * B[i_tj] @ (A[i_tj] @ x[t])

No hand-written backward pass: autograd differentiates these loops, so they also define the
gradients that the fast backends must return.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remix_kernels._philox import PHILOX_ROUNDS

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def routed_lora_ref(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
    *,
    base: Tensor | None = None,
) -> Tensor:
    """`remix_kernels.routed_lora` as a loop over rows and slots. Same arguments, same result."""
    shared = top_k_index.dim() == x.dim() + 1
    num_selections = top_k_index.shape[0] if shared else 1
    top_k = top_k_index.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    index = top_k_index.reshape(num_selections, rows.shape[0], top_k)
    if isinstance(top_k_weights, Tensor):
        weights = top_k_weights.reshape(index.shape)
    else:
        weights = torch.full(index.shape, float(top_k_weights), dtype=x.dtype, device=x.device)
    out_shape = (*top_k_index.shape[:-1], lora_B.shape[1])
    result = []
    for m in range(num_selections):
        for t in range(rows.shape[0]):
            y = rows.new_zeros(lora_B.shape[1])
            for j in range(top_k):
                expert = int(index[m, t, j])
                a = lora_A[expert if lora_A.shape[0] > 1 else 0].to(x.dtype)
                b = lora_B[expert].to(x.dtype)
                y = y + weights[m, t, j].to(x.dtype) * (b @ (a @ rows[t]))
            result.append(y)
    if not result:  # the sum of nothing, still attached to every input
        nothing = rows.sum() + lora_A.to(x.dtype).sum() + lora_B.to(x.dtype).sum()
        result = [(nothing + weights.to(x.dtype).sum()) * x.new_zeros(0)]
    y = torch.stack(result).reshape(out_shape)
    return y if base is None else base + y


def routed_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
) -> Tensor:
    """`remix_kernels.routed_linear` as the frozen linear plus `routed_lora_ref`."""
    bias = None if bias is None else bias.to(x.dtype)
    base = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    if top_k_index.dim() == x.dim() + 1:
        base = base.expand(*top_k_index.shape[:-1], -1)
    return routed_lora_ref(x, lora_A, lora_B, top_k_index, top_k_weights, base=base)


def philox_words(seed: int, row: int, block: int) -> tuple[int, int, int, int]:
    """The four 32-bit words of Philox 4x32-10 at counter (row low, row high, block, 0).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    counter = [row & _MASK32, (row >> 32) & _MASK32, block & _MASK32, 0]
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]
        counter = [
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & _MASK32,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & _MASK32,
        ]
        key = [(key[0] + _WEYL[0]) & _MASK32, (key[1] + _WEYL[1]) & _MASK32]
    return counter[0], counter[1], counter[2], counter[3]


def sample_top_k_ref(logits: Tensor, k: int, *, seed: int, offset: int = 0) -> Tensor:
    """`remix_kernels.sample_top_k` in Python numbers, one row and expert at a time."""
    n = logits.shape[-1]
    rows = logits.detach().reshape(-1, n).tolist()
    picks = []
    for t, row in enumerate(rows):
        keys = []
        for expert in range(n):
            word = philox_words(seed, offset + t, expert // 4)[expert % 4]
            u = min((word + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
            keys.append(row[expert] - math.log(-math.log1p(-u)))
        picks.append(sorted(range(n), key=lambda e: -keys[e])[:k])
    index = torch.tensor(picks, dtype=torch.int32, device=logits.device)
    return index.reshape(*logits.shape[:-1], k)


def selection_log_prob_ref(
    logits: Tensor, top_k_index: Tensor, *, unordered: bool = False
) -> Tensor:
    """`remix_kernels.selection_log_prob` in the dtype of `logits`, step by step.

    Ordered: sum_j [z_{i_j} - logsumexp(z over experts not drawn yet)] (ReMix section 3.2).
        Unordered:
    the log of the sum of that probability over all k! orders of the same set.
    """
    from itertools import permutations

    n, top_k = logits.shape[-1], top_k_index.shape[-1]
    rows, index = logits.reshape(-1, n), top_k_index.reshape(-1, top_k)
    result = []
    for z, chosen in zip(rows, index.tolist(), strict=True):
        orders = permutations(chosen) if unordered else [tuple(chosen)]
        totals = []
        for order in orders:
            left = list(range(n))
            total = z.new_zeros(())
            for expert in order:
                total = total + z[expert] - torch.logsumexp(z[left], 0)
                left.remove(expert)
            totals.append(total)
        result.append(torch.logsumexp(torch.stack(totals), 0))
    if not result:  # still attached to the logits
        return logits.sum() + logits.new_zeros(top_k_index.shape[:-1])
    return torch.stack(result).reshape(top_k_index.shape[:-1])

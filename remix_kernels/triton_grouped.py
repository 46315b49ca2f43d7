"""Grouped strategy in Triton: (row, slot) pairs sorted by expert, each expert's in small GEMMs.

Pairs are sorted by (expert, slot), on the device: group g = expert * top_k + slot owns the sorted
positions offsets[g] : offsets[g + 1]. An expert's pairs are contiguous, and so are, within them,
those of each slot. With q a sorted position, p its row of y, t its row of x and i its expert:

    S[q] = A_i x[t]                  H[q] = w[q] S[q]
    y[p] = base[p] + sum over slots j, in order, of B_i H[q]
    dH[q] = dy[p] B_i                dS[q] = w[q] dH[q],   dw[q] = dH[q] . S[q]
    dA_i = sum over q of dS[q] x[t]^T,     dB_i = sum over q of dy[p] H[q]^T
    dx[t] = sum over slots, in order, of dS[q] A_i

y and dx are written in k passes, one a slot: in a pass every row is met exactly once, so there is
no race, no atomic and no pair buffer, and the order of the sum is always the same. Grids are upper
bounds known on the host (an expert that has fewer tiles leaves programs without work), so nothing
is read back: no synchronisation, and a CUDA graph can capture it.

Bytes (s an element, P = M T pairs a slot; weights of an expert are read once a tile, out of L2):

    sort      8 P k read and written a few times, in integers
    shrink    s (k P in + R in + k P r) twice over for H and S      FLOPs 2 P k r in
    expand    s (2 k P out + k P r + R out)                         2 P k r out
    dH        s (k P out + R out + 2 k P r)                         2 P k r out
    dx        s (2 k P in + k P r + R in)                           2 P k r in
    dA, dB    s (k P (in + out) + 2 k P r) + 8 R (in + out) where an expert has several chunks
"""

from __future__ import annotations

import torch
from torch import Tensor

from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy, base_and_output, frozen_dx
from remix_kernels.triton_grouped_products import expand, gram, shrink
from remix_kernels.triton_sort import Pairs, sort_pairs


def grouped_prepare(call: Call, learned: bool) -> Kept:
    """H [M T k, r], S in fp32 for learned weights, both sorted, and the order."""
    index = call.top_k_index.contiguous()
    pairs = sort_pairs(index, call.lora_B.shape[0])
    hidden = call.x.new_empty(index.numel(), call.lora_B.shape[2])
    shrunk = torch.empty_like(hidden, dtype=torch.float32) if learned else None
    shrink(call, call.x, call.lora_A, pairs, hidden, keep=shrunk)
    return Kept((hidden, shrunk, *pairs))


def grouped_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    hidden, _, order, offsets = kept.tensors
    assert hidden is not None and order is not None and offsets is not None
    base, y = base_and_output(call)
    expand(hidden, call.lora_B, Pairs(order, offsets), call.top_k_index.shape[1], y, base)
    return y


def grouped_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> the gradients that are needed."""
    x, lora_A, lora_B = call.x, call.lora_A, call.lora_B
    hidden, shrunk, order, offsets = kept.tensors
    assert hidden is not None and order is not None and offsets is not None
    n, top_k, pairs = lora_B.shape[0], call.top_k_index.shape[1], Pairs(order, offsets)
    dx = dlora_a = dlora_b = dweights = None
    if need.lora_B:
        dlora_b = gram(hidden, dy, pairs, n, top_k, lora_B.dtype).transpose(1, 2)
    if not (need.x or need.lora_A or need.weights):
        return Grads(lora_B=dlora_b)
    dshrunk = torch.empty_like(hidden)
    if need.weights:
        assert isinstance(call.top_k_weights, Tensor)
        dweights = torch.empty_like(call.top_k_weights, memory_format=torch.contiguous_format)
    columns = lora_B.transpose(1, 2)  # [n, r, out], as A is [n, r, in]
    shrink(
        call, dy, columns, pairs, dshrunk, dot_with=shrunk if need.weights else None, dots=dweights
    )
    if need.lora_A:
        wide = torch.float32 if call.shared_a else lora_A.dtype
        dlora_a = gram(dshrunk, x, pairs, n, top_k, wide)
        if call.shared_a:
            dlora_a = dlora_a.sum(0, keepdim=True).to(lora_A.dtype)
    if need.x:
        columns = lora_A.expand(n, -1, -1).transpose(1, 2)  # [n, in, r], as B is [n, out, r]
        frozen = frozen_dx(call, dy) if call.weight is not None else None
        if dy.shape[0] == x.shape[0]:
            dx = x.new_empty(x.shape) if frozen is None else frozen
            expand(dshrunk, columns, pairs, top_k, dx, frozen)
        else:  # a row of x is met by M rows of y: summed in order, afterwards
            parts = x.new_empty(dy.shape[0], x.shape[1])
            expand(dshrunk, columns, pairs, top_k, parts, None)
            dx = parts.view(-1, *x.shape).sum(0)
            dx = dx if frozen is None else dx.add_(frozen)
    return Grads(dx, dlora_a, dlora_b, dweights)


GROUPED = Strategy(grouped_prepare, grouped_fwd, grouped_bwd)

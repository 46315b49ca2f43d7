"""Dense strategy: all n experts in one GEMM along the rank axis, the selection as a mask.

    H = (A_all x^T) * mask              A_all [n r, in], mask[i, t] = w[t, j] where index[t, j] = i,
                                        else 0
    y = x W^T + b + H^T B_all           B_all [n r, out], added in place: n r more columns of K

    dH = B_all dy^T                     dB_all = H dy
    d(Ax) = dH * mask                   dA_all = d(Ax) x,   dx = dy W + d(Ax)^T A_all

No sort, no padding, no atomics; x and dy are read once each. The weight multiplies H (r numbers an
expert), never y. H is kept transposed, [n r, rows]: every product with it is then the shape that
CPU GEMMs run fastest, and the mask meets it along contiguous rows. `lora_A [1, r, in]` is shared by
all experts: the same formulas broadcast.

With x [T, in] and an index [M, T, k], A_all x^T and x W^T are computed once for all M selections,
and dy is summed over M before it meets W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remix_kernels._routed import (
    Call,
    Grads,
    Kept,
    Needs,
    Strategy,
    cast,
    frozen_dx,
    start_output,
)


def selection_mask(index: Tensor, weights: Tensor | float, n: int, dtype: torch.dtype) -> Tensor:
    """index [P, k], weights [P, k] or a number -> [n, P] in `dtype`."""
    mask = torch.zeros(n, index.shape[0], dtype=dtype, device=index.device)
    index = index if index.dtype == torch.int64 else index.long()
    if isinstance(weights, Tensor):
        return mask.scatter_(0, index.T, weights.to(dtype).T)
    return mask.scatter_(0, index.T, weights)


def pack_a(lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """[n or 1, r, in] -> [n r or r, in]: a view when the dtype agrees."""
    return cast(lora_A, dtype).flatten(0, 1)


def pack_b(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, out, r] -> [n r, out]: a view when lora_B is one of [n, r, out], else one copy."""
    return cast(lora_B, dtype).transpose(1, 2).flatten(0, 1)


def dense_prepare(call: Call, learned: bool) -> Kept:
    """mask [n, M T], H [n r, M T] and, for learned weights, A x [n r, T]."""
    x, n, r = call.x, call.lora_B.shape[0], call.lora_B.shape[2]
    rows, P = x.shape[0], call.top_k_index.shape[0]
    mask = selection_mask(call.top_k_index, call.top_k_weights, n, x.dtype)
    shrunk = pack_a(call.lora_A, x.dtype) @ x.T
    if not learned and rows == P and not call.shared_a:
        shrunk.view(n, r, rows).mul_(mask.unsqueeze(1))
        return Kept((mask, shrunk, None))
    masked = shrunk.view(-1, r, 1, rows) * mask.view(n, 1, P // rows, rows)
    return Kept((mask, masked.view(n * r, P), shrunk if learned else None))


def dense_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    hidden = kept.tensors[1]
    assert hidden is not None
    packed_b = pack_b(call.lora_B, call.x.dtype)
    if call.base is not None:
        return torch.addmm(call.base, hidden.T, packed_b)
    if call.weight is not None:
        return start_output(call).addmm_(hidden.T, packed_b)
    return hidden.T @ packed_b


def dense_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> the gradients that are needed."""
    x, lora_A, lora_B = call.x, call.lora_A, call.lora_B
    mask, hidden, shrunk = kept.tensors
    assert mask is not None and hidden is not None
    rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
    m = dy.shape[0] // rows
    dx = dlora_a = dlora_b = dweights = None
    if need.lora_B:
        dlora_b = (hidden @ dy).view(n, r, -1).transpose(1, 2).to(lora_B.dtype)
    if need.x or need.lora_A or need.weights:
        dhidden = (pack_b(lora_B, x.dtype) @ dy.T).view(n, r, m, rows)
        if need.weights:
            assert isinstance(call.top_k_weights, Tensor) and shrunk is not None
            dmask = (dhidden * shrunk.view(-1, r, 1, rows)).sum(1).view(n, m * rows)
            dweights = dmask.T.gather(1, call.top_k_index.long()).to(call.top_k_weights.dtype)
        dshrunk = dhidden.mul_(mask.view(n, 1, m, rows))
        dshrunk = dshrunk.sum(2) if m > 1 else dshrunk[:, :, 0]
        dshrunk = dshrunk.sum(0) if call.shared_a else dshrunk.view(n * r, rows)
        if need.lora_A:
            dlora_a = (dshrunk @ x).view(lora_A.shape).to(lora_A.dtype)
        if need.x:
            packed_a = pack_a(lora_A, x.dtype)
            if call.weight is None:
                dx = dshrunk.T @ packed_a
            else:
                dx = frozen_dx(call, dy).addmm_(dshrunk.T, packed_a)
    return Grads(dx, dlora_a, dlora_b, dweights)


DENSE = Strategy(dense_prepare, dense_fwd, dense_bwd)

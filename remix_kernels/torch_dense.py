"""Dense strategy: all n experts in one GEMM along the rank axis, the selection as a mask.

    H = (A_all x^T) * mask          A_all [n r, in], mask[i, t] = w[t, j] where index[t, j] = i,
    else 0 y = x W^T + b + H^T B_all       B_all [n r, out], added in place: R = n r more columns
    of K

    dH = B_all dy^T                 dB_all = H dy
    d(Ax) = dH * mask               dA_all = d(Ax) x,   dx = dy W + d(Ax)^T A_all

No sort, no padding, no atomics; x and dy are read once each. The weight multiplies H (r numbers an
expert), never y. H is kept transposed, [n r, rows]: every product with it is then the shape that
CPU GEMMs run fastest, and the mask meets it along contiguous rows. `lora_A [1, r, in]` is shared
by all
experts: the same formulas broadcast.

With x [T, in] and an index [M, T, k], A_all x^T and x W^T are computed once for all M selections,
and dy is summed over M before it meets W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remix_kernels._frozen import frozen_dx, start_output, without_autocast


def selection_mask(index: Tensor, weights: Tensor | float, n: int, dtype: torch.dtype) -> Tensor:
    """index [P, k], weights [P, k] or a number -> [n, P] in `dtype`."""
    mask = torch.zeros(n, index.shape[0], dtype=dtype, device=index.device)
    if isinstance(weights, Tensor):
        return mask.scatter_(0, index.T, weights.to(dtype).T)
    return mask.scatter_(0, index.T, weights)


def pack_a(lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """[n or 1, r, in] -> [n r or r, in]: a view when the dtype agrees."""
    return lora_A.to(dtype).reshape(-1, lora_A.shape[2])


def pack_b(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, out, r] -> [n r, out]: a view when lora_B is one of [n, r, out], else one copy."""
    return lora_B.to(dtype).transpose(1, 2).reshape(-1, lora_B.shape[1])


def dense_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor,
    weights: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, in], index [M T, k] -> y [M T, out], mask [n, M T], H [n r, M T], A x [n r or r, T]."""
    rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
    m = index.shape[0] // rows
    mask = selection_mask(index.long(), weights, n, x.dtype)
    shrunk = pack_a(lora_A, x.dtype) @ x.T
    masked = shrunk.view(-1, r, 1, rows) * mask.view(n, 1, m, rows)
    hidden = masked.view(n * r, m * rows)
    packed_b = pack_b(lora_B, x.dtype)
    if base is not None:
        y = torch.addmm(base, hidden.T, packed_b)
    elif weight is not None:
        y = start_output(x, weight, bias, None, m * rows, lora_B.shape[1])
        y.addmm_(hidden.T, packed_b)
    else:
        y = hidden.T @ packed_b
    return y, mask, hidden, shrunk


class DenseRouted(torch.autograd.Function):
    """y [M T, out] from x [T, in] and index [M T, k]; added to x W^T + b, to base, or alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        index: Tensor,
        weights: Tensor | float,
    ) -> Tensor:
        y, mask, hidden, shrunk = dense_fwd(x, weight, bias, base, lora_A, lora_B, index, weights)
        tensor_weights = weights if isinstance(weights, Tensor) else None
        learned = tensor_weights is not None and tensor_weights.requires_grad
        kept = shrunk if learned else None
        ctx.save_for_backward(x, weight, lora_A, lora_B, index, tensor_weights, mask, hidden, kept)
        return y

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, index, weights, mask, hidden, shrunk = ctx.saved_tensors
        need_x, _, _, need_base, need_a, need_b, _, need_w = ctx.needs_input_grad
        rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
        m = dy.shape[0] // rows
        dx = dlora_a = dlora_b = dweights = None
        if need_b:
            dlora_b = (hidden @ dy).view(n, r, -1).transpose(1, 2).to(lora_B.dtype)
        if need_x or need_a or need_w:
            dhidden = (pack_b(lora_B, x.dtype) @ dy.T).view(n, r, m, rows)
            if need_w:
                dmask = (dhidden * shrunk.view(-1, r, 1, rows)).sum(1).view(n, m * rows)
                dweights = dmask.T.gather(1, index.long()).to(weights.dtype)
            dshrunk = dhidden.mul_(mask.view(n, 1, m, rows))
            dshrunk = dshrunk.sum(2) if m > 1 else dshrunk[:, :, 0]
            dshrunk = dshrunk.sum(0) if lora_A.shape[0] == 1 else dshrunk.view(n * r, rows)
            if need_a:
                dlora_a = (dshrunk @ x).view(lora_A.shape).to(lora_A.dtype)
            if need_x:
                packed_a = pack_a(lora_A, x.dtype)
                if weight is None:
                    dx = dshrunk.T @ packed_a
                else:
                    dx = frozen_dx(dy, x, weight).addmm_(dshrunk.T, packed_a)
        return dx, None, None, dy if need_base else None, dlora_a, dlora_b, None, dweights

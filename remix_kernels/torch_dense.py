"""Dense strategy: all n experts in one GEMM along the rank axis, the selection as a mask.

    H = (x A_all^T) * mask          A_all [n r, in], mask[t, i] = w[t, j] where index[t, j] = i, else 0
    y = x W^T + b + H B_all         B_all [n r, out], added in place: R = n r more columns of K

    dH = dy B_all^T                 dB_all = H^T dy
    d(xA) = dH * mask               dA_all = d(xA)^T x,   dx = dy W + d(xA) A_all

No sort, no padding, no atomics; x and dy are read once each. The weight multiplies H (r numbers an
expert), never y. `lora_A [1, r, in]` is shared by all experts: the same formulas broadcast.

With x [T, in] and an index [M, T, k], x A_all^T and x W^T are computed once for all M selections, and
dy is summed over M before it meets W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remix_kernels._frozen import frozen_dx, start_output


def selection_mask(index: Tensor, weights: Tensor | float, n: int, dtype: torch.dtype) -> Tensor:
    """index [P, k], weights [P, k] or a number -> [P, n] in `dtype`."""
    mask = torch.zeros(index.shape[0], n, dtype=dtype, device=index.device)
    if isinstance(weights, Tensor):
        return mask.scatter_(1, index, weights.to(dtype))
    return mask.scatter_(1, index, weights)


def pack_a(lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """[n or 1, r, in] -> [n r or r, in]: a view when the dtype agrees."""
    return lora_A.to(dtype).reshape(-1, lora_A.shape[2])


def pack_b(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, out, r] -> [n r, out]: a view when lora_B is itself a view of [n, r, out]."""
    return lora_B.to(dtype).transpose(1, 2).reshape(-1, lora_B.shape[1])


class DenseRouted(torch.autograd.Function):
    """y [M T, out] from x [T, in] and index [M T, k]; added to x W^T + b, to base, or alone."""

    @staticmethod
    def forward(  # noqa: D102
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
        rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
        num_selections = index.shape[0] // rows if rows else 1
        mask = selection_mask(index.long(), weights, n, x.dtype)
        shrunk = x @ pack_a(lora_A, x.dtype).T
        hidden = _masked(shrunk, mask, num_selections, rows, n, r)
        packed_b = pack_b(lora_B, x.dtype)
        if base is not None:
            y = torch.addmm(base, hidden, packed_b)
        elif weight is not None:
            y = start_output(x, weight, bias, None, index.shape[0], lora_B.shape[1])
            y.addmm_(hidden, packed_b)
        else:
            y = hidden @ packed_b
        tensor_weights = weights if isinstance(weights, Tensor) else None
        learned = tensor_weights is not None and tensor_weights.requires_grad
        ctx.num_selections = num_selections
        ctx.save_for_backward(
            x, weight, lora_A, lora_B, index, tensor_weights, mask, hidden, shrunk if learned else None
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, lora_A, lora_B, index, weights, mask, hidden, shrunk = ctx.saved_tensors
        need_x, _, _, need_base, need_a, need_b, _, need_w = ctx.needs_input_grad
        rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
        m = ctx.num_selections
        dx = dlora_a = dlora_b = dweights = None
        if need_b:
            dlora_b = (hidden.T @ dy).view(n, r, -1).transpose(1, 2).to(lora_B.dtype)
        if need_x or need_a or need_w:
            dhidden = dy @ pack_b(lora_B, x.dtype).T
            if need_w:
                products = dhidden.view(m, rows, n, r) * shrunk.view(1, rows, -1, r)
                dmask = products.sum(-1).view(m * rows, n)
                dweights = dmask.gather(1, index.long()).to(weights.dtype)
            dshrunk = dhidden.view(m, rows, n, r).mul_(mask.view(m, rows, n, 1))
            dshrunk = dshrunk.sum(0) if m > 1 else dshrunk[0]
            dshrunk = dshrunk.sum(1) if lora_A.shape[0] == 1 else dshrunk.view(rows, n * r)
            if need_a:
                dlora_a = (dshrunk.T @ x).view(lora_A.shape).to(lora_A.dtype)
            if need_x:
                packed_a = pack_a(lora_A, x.dtype)
                if weight is None:
                    dx = dshrunk @ packed_a
                else:
                    dx = frozen_dx(dy, x, weight).addmm_(dshrunk, packed_a)
        return dx, None, None, dy if need_base else None, dlora_a, dlora_b, None, dweights


def _masked(shrunk: Tensor, mask: Tensor, m: int, rows: int, n: int, r: int) -> Tensor:
    """[T, n r or r] times mask [M T, n] -> [M T, n r]."""
    return (shrunk.view(1, rows, -1, r) * mask.view(m, rows, n, 1)).view(m * rows, n * r)

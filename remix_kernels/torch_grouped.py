"""Grouped strategy: rows sorted by expert, each expert's rows in one small GEMM.

A pair is one (row, slot). Sorted by expert, expert i owns pairs offsets[i]:offsets[i+1]:

    h_i = x[rows_i] A_i^T           [T_i, r]
    y[rows_i] += (w_i * h_i) B_i^T  in the order of the experts, so always the same sum

    dh_i = (dy[rows_i] B_i) * w_i   dB_i = dy[rows_i]^T (w_i * h_i)
    dA_i = dh_i^T x[rows_i]         dx[rows_i] += dh_i A_i

Work grows with k, not with n; x and dy are read k times. An expert without rows costs nothing. The
offsets are read on the host: on CUDA that is one synchronisation a call.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remix_kernels._frozen import frozen_dx, start_output, without_autocast


class Pairs(NamedTuple):
    """(row, slot) pairs sorted by expert."""

    order: Tensor  # [P] position in the flattened index
    x_rows: Tensor  # [P] row of x
    y_rows: Tensor  # [P] row of y
    offsets: list[int]  # [n + 1]


def sort_pairs(index: Tensor, rows: int, n: int) -> Pairs:
    """index [M T, k] over `rows` = T rows of x -> pairs sorted by expert, stable."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n)
    offsets = [0, *counts.cumsum(0).tolist()]
    y_rows = order // index.shape[1]
    x_rows = y_rows if index.shape[0] == rows else y_rows % rows
    return Pairs(order, x_rows, y_rows, offsets)


def each_expert(offsets: list[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of the pairs) for every expert that has any."""
    spans = pairwise(offsets)
    return [(i, slice(low, high)) for i, (low, high) in enumerate(spans) if high > low]


def grouped_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor,
    weights: Tensor | float,
) -> tuple[Tensor, Tensor, Pairs]:
    """x [T, in], index [M T, k] -> y [M T, out], A x of every pair [P, r], the sorted pairs."""
    rows, n, r = x.shape[0], lora_B.shape[0], lora_B.shape[2]
    pairs = sort_pairs(index, rows, n)
    y = start_output(x, weight, bias, base, index.shape[0], lora_B.shape[1])
    shrunk = x.new_empty(index.numel(), r)
    scale = _sorted_weights(weights, pairs, x.dtype)
    for i, span in each_expert(pairs.offsets):
        a = lora_A[i if lora_A.shape[0] > 1 else 0].to(x.dtype)
        torch.mm(x.index_select(0, pairs.x_rows[span]), a.T, out=shrunk[span])
        hidden = shrunk[span] * _at(scale, span)
        y.index_add_(0, pairs.y_rows[span], hidden @ lora_B[i].to(x.dtype).T)
    return y, shrunk, pairs


class GroupedRouted(torch.autograd.Function):
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
        y, shrunk, pairs = grouped_fwd(x, weight, bias, base, lora_A, lora_B, index, weights)
        tensor_weights = weights if isinstance(weights, Tensor) else None
        ctx.offsets, ctx.scale = pairs.offsets, None if tensor_weights is not None else weights
        ctx.save_for_backward(
            x,
            weight,
            lora_A,
            lora_B,
            tensor_weights,
            shrunk,
            pairs.order,
            pairs.x_rows,
            pairs.y_rows,
        )
        return y

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, weights, shrunk, order, x_rows, y_rows = ctx.saved_tensors
        need_x, _, _, need_base, need_a, need_b, _, need_w = ctx.needs_input_grad
        pairs = Pairs(order, x_rows, y_rows, ctx.offsets)
        scale = _sorted_weights(ctx.scale if weights is None else weights, pairs, x.dtype)
        sum_dtype = torch.promote_types(lora_A.dtype, x.dtype)
        dlora_a = torch.zeros_like(lora_A, dtype=sum_dtype) if need_a else None
        dlora_b = torch.zeros_like(lora_B) if need_b else None
        dscale = x.new_empty(order.numel()) if need_w else None
        dx = frozen_dx(dy, x, weight) if need_x else None
        for i, span in each_expert(pairs.offsets):
            dyi = dy.index_select(0, y_rows[span])
            if dlora_b is not None:
                dlora_b[i] = dyi.T @ (shrunk[span] * _at(scale, span))
            if not (need_x or need_a or need_w):
                continue
            dhidden = dyi @ lora_B[i].to(x.dtype)
            if dscale is not None:
                dscale[span] = (dhidden * shrunk[span]).sum(1)
            dhidden = dhidden * _at(scale, span)
            shared_a = lora_A.shape[0] == 1
            if dlora_a is not None:
                dlora_a[0 if shared_a else i] += dhidden.T @ x.index_select(0, x_rows[span])
            if dx is not None:
                dx.index_add_(0, x_rows[span], dhidden @ lora_A[0 if shared_a else i].to(x.dtype))
        dweights = None
        if dscale is not None:
            dweights = torch.empty_like(dscale).index_copy_(0, order, dscale)
            dweights = dweights.view(weights.shape).to(weights.dtype)
        dbase = dy if need_base else None
        dlora_a = None if dlora_a is None else dlora_a.to(lora_A.dtype)
        return dx, None, None, dbase, dlora_a, dlora_b, None, dweights


def _sorted_weights(weights: Tensor | float, pairs: Pairs, dtype: torch.dtype) -> Tensor | float:
    """Weights in the order of the pairs, [P, 1]; a number stays a number."""
    if not isinstance(weights, Tensor):
        return weights
    return weights.reshape(-1).to(dtype).index_select(0, pairs.order).unsqueeze(1)


def _at(scale: Tensor | float, span: slice) -> Tensor | float:
    return scale[span] if isinstance(scale, Tensor) else scale

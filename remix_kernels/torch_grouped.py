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
from typing import NamedTuple

import torch
from torch import Tensor

from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy, frozen_dx, start_output


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


def grouped_prepare(call: Call, learned: bool) -> Kept:
    """A x of every pair [P, r], and the sorted pairs."""
    x = call.x
    pairs = sort_pairs(call.top_k_index, x.shape[0], call.lora_B.shape[0])
    shrunk = x.new_empty(call.top_k_index.numel(), call.lora_B.shape[2])
    for i, span in each_expert(pairs.offsets):
        a = call.lora_A[0 if call.shared_a else i].to(x.dtype)
        torch.mm(x.index_select(0, pairs.x_rows[span]), a.T, out=shrunk[span])
    return Kept((shrunk, pairs.order, pairs.x_rows, pairs.y_rows), pairs.offsets)


def grouped_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    shrunk, pairs = _kept(kept)
    scale = _sorted_weights(call.top_k_weights, pairs, call.x.dtype)
    y = start_output(call)
    for i, span in each_expert(pairs.offsets):
        hidden = shrunk[span] * _at(scale, span)
        y.index_add_(0, pairs.y_rows[span], hidden @ call.lora_B[i].to(y.dtype).T)
    return y


def grouped_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> the gradients that are needed."""
    x, lora_A, lora_B = call.x, call.lora_A, call.lora_B
    shrunk, pairs = _kept(kept)
    order, x_rows, y_rows, _ = pairs
    scale = _sorted_weights(call.top_k_weights, pairs, x.dtype)
    sum_dtype = torch.promote_types(lora_A.dtype, x.dtype)
    dlora_a = torch.zeros_like(lora_A, dtype=sum_dtype) if need.lora_A else None
    dlora_b = torch.zeros_like(lora_B) if need.lora_B else None
    dscale = x.new_empty(order.numel()) if need.weights else None
    # With M selections of one x, a row of x is met by M rows of y: summed in order, afterwards.
    dx = None
    if need.x:
        dx = (
            frozen_dx(call, dy)
            if dy.shape[0] == x.shape[0]
            else x.new_zeros(dy.shape[0], x.shape[1])
        )
    for i, span in each_expert(pairs.offsets):
        dyi = dy.index_select(0, y_rows[span])
        if dlora_b is not None:
            dlora_b[i] = dyi.T @ (shrunk[span] * _at(scale, span))
        if not (need.x or need.lora_A or need.weights):
            continue
        dhidden = dyi @ lora_B[i].to(x.dtype)
        if dscale is not None:
            dscale[span] = (dhidden * shrunk[span]).sum(1)
        dhidden = dhidden * _at(scale, span)
        ia = 0 if call.shared_a else i
        if dlora_a is not None:
            dlora_a[ia] += dhidden.T @ x.index_select(0, x_rows[span])
        if dx is not None:
            dx.index_add_(0, y_rows[span], dhidden @ lora_A[ia].to(x.dtype))
    if dx is not None and dy.shape[0] != x.shape[0]:
        dx = dx.view(-1, *x.shape).sum(0).add_(frozen_dx(call, dy))
    dweights = None
    if dscale is not None:
        assert isinstance(call.top_k_weights, Tensor)
        dweights = torch.empty_like(dscale).index_copy_(0, order, dscale)
        dweights = dweights.view(call.top_k_weights.shape).to(call.top_k_weights.dtype)
    dlora_a = None if dlora_a is None else dlora_a.to(lora_A.dtype)
    return Grads(dx, dlora_a, dlora_b, dweights)


GROUPED = Strategy(grouped_prepare, grouped_fwd, grouped_bwd)


def _kept(kept: Kept) -> tuple[Tensor, Pairs]:
    shrunk, order, x_rows, y_rows = kept.tensors
    assert shrunk is not None and order is not None and x_rows is not None and y_rows is not None
    return shrunk, Pairs(order, x_rows, y_rows, kept.host)


def _sorted_weights(weights: Tensor | float, pairs: Pairs, dtype: torch.dtype) -> Tensor | float:
    """Weights in the order of the pairs, [P, 1]; a number stays a number."""
    if not isinstance(weights, Tensor):
        return weights
    return weights.reshape(-1).to(dtype).index_select(0, pairs.order).unsqueeze(1)


def _at(scale: Tensor | float, span: slice) -> Tensor | float:
    return scale[span] if isinstance(scale, Tensor) else scale

"""Grouped strategy: rows sorted by expert, each expert's rows in one small GEMM.

A pair is one (row, slot). Sorted by expert, expert i owns pairs offsets[i]:offsets[i+1]:

    h_i = x[rows_i] A_i^T           [T_i, r]
    y[rows_i] += (w_i * h_i) B_i^T  in the order of the experts, so always the same sum

    dh_i = (dy[rows_i] B_i) * w_i   dB_i = dy[rows_i]^T (w_i * h_i)
    dA_i = dh_i^T x[rows_i]         dx[rows_i] += dh_i A_i

Work grows with k, not with n; x and dy are read k times. An expert without rows costs nothing. On a
processor, experts are worked on together while their pairs are no more than the rows of y, so that
what is copied of x and y is never larger than y has rows. The offsets are read on the host: on CUDA
that is one synchronisation a call.
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


class Batch(NamedTuple):
    """Neighbouring experts that are worked on together."""

    experts: slice
    pairs: slice  # theirs
    ends: list[int]  # within `pairs`, where each expert's end


def sort_pairs(index: Tensor, rows: int, n: int) -> Pairs:
    """index [M T, k] over `rows` = T rows of x -> pairs sorted by expert, stable."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n)
    offsets = [0, *counts.cumsum(0).tolist()]
    y_rows = order // index.shape[1]
    x_rows = y_rows if index.shape[0] == rows else y_rows % rows
    return Pairs(order, x_rows, y_rows, offsets)


def batches(offsets: list[int], most: int) -> list[Batch]:
    """All experts in order, in batches of at most `most` pairs or one expert with pairs.

    Those without belong to a neighbour's batch, where all they cost is zeros in dA and dB.
    """
    found, first = [], 0
    for last in range(1, len(offsets)):
        if last + 1 < len(offsets):
            without = offsets[first] == offsets[last] or offsets[last] == offsets[last + 1]
            if without or offsets[last + 1] - offsets[first] <= most:
                continue
        low = offsets[first]
        ends = [end - low for end in offsets[first + 1 : last + 1]]
        found.append(Batch(slice(first, last), slice(low, offsets[last]), ends))
        first = last
    return found


def grouped_prepare(call: Call, learned: bool) -> Kept:
    """A x of every pair [P, r], and the sorted pairs."""
    x = call.x
    pairs = sort_pairs(call.top_k_index, x.shape[0], call.lora_B.shape[0])
    shrunk = x.new_empty(call.top_k_index.numel(), call.lora_B.shape[2])
    for batch in _batches(call, pairs):
        columns = _matrices(call.lora_A, batch, x.dtype).transpose(1, 2)
        shrunk[batch.pairs] = times(x.index_select(0, pairs.x_rows[batch.pairs]), columns, batch)
    return Kept((shrunk, pairs.order, pairs.x_rows, pairs.y_rows), pairs.offsets)


def grouped_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    shrunk, pairs = _kept(kept)
    hidden = shrunk * _sorted_weights(call.top_k_weights, pairs, call.x.dtype)
    y = start_output(call)
    for batch in _batches(call, pairs):
        columns = _matrices(call.lora_B, batch, y.dtype).transpose(1, 2)
        y.index_add_(0, pairs.y_rows[batch.pairs], times(hidden[batch.pairs], columns, batch))
    return y


def grouped_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> the gradients that are needed."""
    x, lora_A, lora_B = call.x, call.lora_A, call.lora_B
    shrunk, pairs = _kept(kept)
    scale = _sorted_weights(call.top_k_weights, pairs, x.dtype)
    hidden = shrunk * scale
    dlora_a: list[Tensor] = []
    dlora_b: list[Tensor] = []
    dscale = x.new_empty(pairs.order.numel()) if need.weights else None
    # With M selections of one x, a row of x is met by M rows of y: summed in order, afterwards.
    dx = None
    if need.x:
        dx = (
            frozen_dx(call, dy)
            if dy.shape[0] == x.shape[0]
            else x.new_zeros(dy.shape[0], x.shape[1])
        )
    for batch in _batches(call, pairs):
        span, y_rows = batch.pairs, pairs.y_rows[batch.pairs]
        dy_sorted = dy.index_select(0, y_rows)
        if need.lora_B:
            dlora_b.append(gram(hidden[span], dy_sorted, batch))
        if not (need.x or need.lora_A or need.weights):
            continue
        dhidden = times(dy_sorted, _matrices(lora_B, batch, x.dtype), batch)
        if dscale is not None:
            dscale[span] = (dhidden * shrunk[span]).sum(1)
        dhidden = dhidden * (scale[span] if isinstance(scale, Tensor) else scale)
        if need.lora_A:
            x_sorted = x.index_select(0, pairs.x_rows[span])
            dlora_a.append(gram(dhidden, x_sorted, batch, call.shared_a))
        if dx is not None:
            dx.index_add_(0, y_rows, times(dhidden, _matrices(lora_A, batch, x.dtype), batch))
    if dx is not None and dy.shape[0] != x.shape[0]:
        dx = dx.view(-1, *x.shape).sum(0).add_(frozen_dx(call, dy))
    dweights = None
    if dscale is not None:
        assert isinstance(call.top_k_weights, Tensor)
        dweights = torch.empty_like(dscale).index_copy_(0, pairs.order, dscale)
        dweights = dweights.view(call.top_k_weights.shape).to(call.top_k_weights.dtype)
    whole_a = _joined(dlora_a, lora_A, call.shared_a)
    whole_b = _joined(dlora_b, lora_B)
    return Grads(dx, whole_a, None if whole_b is None else whole_b.transpose(1, 2), dweights)


GROUPED = Strategy(grouped_prepare, grouped_fwd, grouped_bwd)


def times(rows: Tensor, matrices: Tensor, batch: Batch) -> Tensor:
    """Each expert's rows [P, c] times its matrix of [experts or 1, c, e] -> [P, e]."""
    if matrices.shape[0] == 1:
        return rows @ matrices[0]
    if _one_call_does(rows, matrices):
        ends = torch.tensor(batch.ends, dtype=torch.int32)
        return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for i, span in _each_expert(batch):
        torch.mm(rows[span], matrices[i], out=out[span])
    return out


def gram(left: Tensor, right: Tensor, batch: Batch, summed: bool = False) -> Tensor:
    """left^T right of each expert's rows, [P, c] and [P, e] -> [experts, c, e], or [1, c, e]."""
    if summed or len(batch.ends) == 1:
        return (left.T @ right).unsqueeze(0)
    if _one_call_does(left.T, right):
        ends = torch.tensor(batch.ends, dtype=torch.int32)
        return torch.nn.functional.grouped_mm(left.T, right, offs=ends)
    out = left.new_zeros(len(batch.ends), left.shape[1], right.shape[1])
    for i, span in _each_expert(batch):
        torch.mm(left[span].T, right[span], out=out[i])
    return out


def _joined(parts: list[Tensor], like: Tensor, summed: bool = False) -> Tensor | None:
    """The batches' gradients as one in the dtype of `like`; None of none."""
    if not parts:
        return None
    whole = parts[0]
    if len(parts) > 1:
        whole = torch.stack(parts).sum(0) if summed else torch.cat(parts)
    return whole.to(like.dtype)


def _batches(call: Call, pairs: Pairs) -> list[Batch]:
    """One expert's rows each on CUDA, where `index_add_` is only ordered if none comes twice."""
    together = call.x.device.type == "cpu"
    return batches(pairs.offsets, call.top_k_index.shape[0] if together else 0)


def _each_expert(batch: Batch) -> list[tuple[int, slice]]:
    spans = pairwise([0, *batch.ends])
    return [(i, slice(low, high)) for i, (low, high) in enumerate(spans) if high > low]


def _one_call_does(rows: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: on a processor, a loop without Python in it."""
    return (
        rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and _is_aligned(rows)
        and _is_aligned(matrices)
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether the lines of its last two dimensions are contiguous and begin every 16 bytes."""
    (height, width), (down, across) = tensor.shape[-2:], tensor.stride()[-2:]
    step, line = (down, width) if across == 1 else (across, height)
    return 1 in (down, across) and step >= line and step * tensor.itemsize % 16 == 0


def _matrices(pool: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The batch's matrices of [n, ...]; of [1, ...], the one."""
    return (pool if pool.shape[0] == 1 else pool[batch.experts]).to(dtype)


def _kept(kept: Kept) -> tuple[Tensor, Pairs]:
    shrunk, order, x_rows, y_rows = kept.tensors
    assert shrunk is not None and order is not None and x_rows is not None and y_rows is not None
    return shrunk, Pairs(order, x_rows, y_rows, kept.host)


def _sorted_weights(weights: Tensor | float, pairs: Pairs, dtype: torch.dtype) -> Tensor | float:
    """Weights in the order of the pairs, [P, 1]; a number stays a number."""
    if not isinstance(weights, Tensor):
        return weights
    return weights.reshape(-1).to(dtype).index_select(0, pairs.order).unsqueeze(1)

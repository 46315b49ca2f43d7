"""The probability of a set, a draw without replacement whose order is forgotten, in Triton.

    a_i = exp(z_i) / sum_{e not in I} exp(z_e), for the k experts i of the set I
    P(I) = integral_0^inf exp(-t) prod_{i in I} (1 - exp(-a_i t)) dt
    d log P / d log a_i = mean of h(a_i t) under the integrand, h(x) = x / (exp(x) - 1)
    d log P / d z_i = that for i in I,  -softmax_{e not in I}(z) * its sum over I for the others

by the trapezoid rule at the nodes of `torch_unordered.node_range`, which says where the integral
comes from. The recursion over subsets, which PyTorch takes up to 8 experts, has 2^k numbers a row
to keep and to find again; this is one loop over 40 to 130 nodes for any k, with nothing kept but
sums, and its gradient has no cancellation.

One program a block of rows: all n experts once for the logsumexp of the others, then the k drawn
ones alone.

Floor, per row (z bytes a logit, i an index entry): both read z n + i k and gather z k again, which
the cache serves; forward writes 4, its gradient reads 4 and writes z n. FLOPs: about 30 k a node.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels._launch import launch
from remix_kernels.torch_unordered import node_eps, node_range
from remix_kernels.triton_sampling import _blocks, _rows

_LANES = 512  # logits a program holds: more would spill on sm_90, and fewer programs share the loop


@triton.jit
def _drawn_and_rest(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k]
    offs_m,
    T,
    N_EXPERTS,
    stride_zm,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(drawn [M, BLOCK_K], log a of them, softmax of the others over themselves, others).

    log a is very large past the last slot: a factor of 1.
    """
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m = offs_m < T
    mask_n, mask_k = mask_m[:, None] & (offs_n < N_EXPERTS)[None, :], offs_k < TOP_K
    z_ptrs = logits_ptr + offs_m[:, None] * stride_zm
    left = tl.load(z_ptrs + offs_n[None, :], mask=mask_n, other=float("-inf")).to(tl.float32)
    others = mask_n
    for j in range(TOP_K):
        expert = tl.load(index_ptr + offs_m * TOP_K + j, mask=mask_m, other=0).to(tl.int32)
        others = others & (offs_n[None, :] != expert[:, None])
    left = tl.where(others, left, float("-inf"))
    largest = tl.maximum(tl.max(left, axis=1), -3.0e38)  # finite where all others are -inf
    shifted = tl.exp(left - largest[:, None])
    total = tl.sum(shifted, axis=1)
    total = tl.where(total == 0.0, 1.0, total)

    mask_k = mask_m[:, None] & mask_k[None, :]
    slots = offs_m[:, None] * TOP_K + offs_k[None, :]
    drawn = tl.load(index_ptr + slots, mask=mask_k, other=0).to(tl.int32)
    z = tl.load(z_ptrs + drawn, mask=mask_k, other=0.0).to(tl.float32)
    log_a = tl.where(mask_k, z - largest[:, None] - tl.log(total)[:, None], 1.0e4)
    return drawn, log_a, shifted / total[:, None], others


@triton.jit
def _node(log_a, node, STEP: tl.constexpr):
    """(logarithm of the integrand without the small a_i [M], slopes h [M, BLOCK_K]) at a node."""
    u = node * STEP
    bend = tl.exp(-0.25 * u)
    s = u - 2.0 * bend
    log_x = s + log_a
    x = tl.exp(tl.where(log_x > 4.3, 4.3, log_x))  # 1 - exp(-x) rounds to 1 from there on
    x2 = x * x
    series = x2 * (1.0 / 24.0 - x2 * (1.0 / 2880.0 - x2 * (1.0 / 181440.0))) - 0.5 * x
    missed = tl.exp(-x)
    hit = tl.where(x < 0.5, 0.5, 1.0 - missed)
    log_hit = tl.where(
        x < 0.5, s + tl.maximum(log_a, 0.0) + series, tl.log(hit) - tl.minimum(log_a, 0.0)
    )
    slope = 1.0 - 0.5 * x + x2 * (1.0 / 12.0 - x2 * (1.0 / 720.0 - x2 * (1.0 / 30240.0)))
    slope = tl.where(x < 0.5, slope, x * missed / hit)
    return tl.sum(log_hit, axis=1) + (s - tl.exp(s) + tl.log(STEP + 0.5 * STEP * bend)), slope


@triton.jit
def _unordered_log_prob_fwd_kernel(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k]
    log_prob_ptr,  # [T] fp32, out
    T,
    N_EXPERTS,
    stride_zm,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    log_a = _drawn_and_rest(
        logits_ptr, index_ptr, offs_m, T, N_EXPERTS, stride_zm, TOP_K, BLOCK_N, BLOCK_K
    )[1]
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for node in tl.range(FIRST, LAST):
        value = _node(log_a, node, STEP)[0]
        highest = tl.maximum(largest, value)
        total = total * tl.exp(largest - highest) + tl.exp(value - highest)
        largest = highest
    small = tl.sum(tl.where(log_a > 0.0, 0.0, log_a), axis=1)
    tl.store(log_prob_ptr + offs_m, small + largest + tl.log(total), mask=offs_m < T)


@triton.jit
def _unordered_log_prob_bwd_kernel(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k]
    grad_ptr,  # [T] fp32
    dlogits_ptr,  # [T, n], out
    T,
    N_EXPERTS,
    stride_zm,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    drawn, log_a, share, others = _drawn_and_rest(
        logits_ptr, index_ptr, offs_m, T, N_EXPERTS, stride_zm, TOP_K, BLOCK_N, BLOCK_K
    )
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    dlog_a = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for node in tl.range(FIRST, LAST):
        value, slope = _node(log_a, node, STEP)
        highest = tl.maximum(largest, value)
        scale, weight = tl.exp(largest - highest), tl.exp(value - highest)
        total = total * scale + weight
        dlog_a = dlog_a * scale[:, None] + slope * weight[:, None]
        largest = highest
    mask_m = offs_m < T
    grad = tl.load(grad_ptr + offs_m, mask=mask_m, other=0.0)
    dlog_a *= (grad / total)[:, None]
    mask_k = mask_m[:, None] & (tl.arange(0, BLOCK_K) < TOP_K)[None, :]
    drest = tl.sum(tl.where(mask_k, dlog_a, 0.0), axis=1)
    dz = -drest[:, None] * share
    # Two stores to different places, the experts not drawn and those drawn.
    dz_ptrs = dlogits_ptr + offs_m[:, None] * N_EXPERTS
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    tl.store(dz_ptrs + offs_n, dz.to(dlogits_ptr.dtype.element_ty), mask=others)
    tl.store(dz_ptrs + drawn, dlog_a.to(dlogits_ptr.dtype.element_ty), mask=mask_k)


def unordered_log_prob_fwd(logits: Tensor, index: Tensor) -> Tensor:
    """logits [T, n], index [T, k] -> fp32 [T]."""
    z = _rows(logits)
    if index.shape[1] == z.shape[1]:
        return z.new_zeros(z.shape[0], dtype=torch.float32)
    log_prob = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    grid, constants = _constants(z, index.shape[1])
    launch(
        _unordered_log_prob_fwd_kernel,
        grid,
        logits_ptr=z,
        index_ptr=index,
        log_prob_ptr=log_prob,
        T=z.shape[0],
        N_EXPERTS=z.shape[1],
        stride_zm=z.stride(0),
        **constants,
    )
    return log_prob


def unordered_log_prob_bwd(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """logits [T, n], index [T, k], grad fp32 [T] -> dlogits [T, n] in the dtype of logits."""
    z = _rows(logits)
    if index.shape[1] == z.shape[1]:
        return torch.zeros_like(logits)
    dlogits = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    grid, constants = _constants(z, index.shape[1])
    launch(
        _unordered_log_prob_bwd_kernel,
        grid,
        logits_ptr=z,
        index_ptr=index,
        grad_ptr=grad.contiguous(),
        dlogits_ptr=dlogits,
        T=z.shape[0],
        N_EXPERTS=z.shape[1],
        stride_zm=z.stride(0),
        **constants,
    )
    return dlogits


def _constants(z: Tensor, k: int) -> tuple[tuple[int], dict[str, Any]]:
    grid, blocks = _blocks(z, _LANES)
    step, first, last = node_range(k, node_eps(torch.float32))
    nodes = {"STEP": step, "FIRST": first, "LAST": last}
    return grid, {"TOP_K": k, **nodes, **blocks, "BLOCK_K": triton.next_power_of_2(k)}

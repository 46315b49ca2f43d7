"""Sampling without replacement and its log-probability, in Triton.

One program a block of rows holds all n experts, so each kernel reads the logits once:

    sample      key_e = z_e - log(E_e), E_e = -log(1 - u_e) standard exponential; k times the argmax
    log_prob    L_j = logsumexp(z over experts not drawn before step j), fresh for each step
                log Q = sum_j z_{i_j} - L_j
    gradient    d log Q / d z_e = [e in I] - sum_{j <= last(e)} exp(z_e - L_j)

The noise comes from Philox 4x32-10 in the kernel, on the counters of `_philox.py`: the same words
as the PyTorch backend, so the same draws wherever two keys differ by more than rounding.

Floor, per row (z bytes a logit, i an index entry): sample reads z n and writes 4 k; log_prob reads
z n + i k and writes 4; its gradient reads z n + i k + 4 and writes z n. Each kernel moves exactly
that. FLOPs: sample about 60 n for Philox and the logarithms and n k for the argmaxes; the others
4 n k.

Source: Gumbel top-k, Kool et al. 2019, arXiv 1903.06059; Philox, Salmon et al. 2011.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels._launch import launch

_LANES = 1024  # logits a program holds: 8 for each of 128 threads; 16 spill on sm_80


@triton.jit
def _philox_uint32(row, expert_block, key_low, key_high):
    """Four words of [rows, n / 4] for 64-bit rows [rows, 1] and expert blocks [1, n / 4]."""
    zero = (row.to(tl.int32) * 0 + expert_block * 0).to(tl.uint32)
    c0 = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    c1 = zero + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + expert_block.to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, zero, key_low, key_high, 10)


@triton.jit
def _exponential(words):
    """-log(1 - u), u = (word + 1/2) / 2^32: precise for small u, where 1 - u is not."""
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 1.0 - 5.9604644775390625e-08)
    rest = 1.0 - u  # rounded: log(rest) is exact for it, and u / (1 - rest) repairs the rounding
    lost = 1.0 - rest
    return tl.where(lost == 0.0, u, -tl.log(rest) * (u / tl.where(lost == 0.0, 1.0, lost)))


@triton.jit(do_not_specialize=["seed", "offset"])
def _sample_top_k_fwd_kernel(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k] int32, out
    T,
    N_EXPERTS,
    seed,
    offset,
    stride_zm,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < T, offs_n < N_EXPERTS
    mask = mask_m[:, None] & mask_n[None, :]
    z_ptrs = logits_ptr + offs_m[:, None] * stride_zm + offs_n[None, :]
    z = tl.load(z_ptrs, mask=mask, other=0.0).to(tl.float32)

    key = seed.to(tl.int64)
    key_low = (key & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row = (offs_m + offset)[:, None]
    block = tl.arange(0, BLOCK_N // 4)[None, :]
    w0, w1, w2, w3 = _philox_uint32(row, block, key_low, key_high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))

    keys = z - tl.log(_exponential(words))
    # Finite where there is an expert, so that one with logit -inf still comes before none.
    keys = tl.where(mask_n[None, :], tl.maximum(keys, -3.0e38), float("-inf"))
    for j in range(TOP_K):
        drawn = tl.argmax(keys, axis=1)
        tl.store(index_ptr + offs_m * TOP_K + j, drawn.to(tl.int32), mask=mask_m)
        keys = tl.where(offs_n[None, :] == drawn[:, None], float("-inf"), keys)


@triton.jit
def _log_prob_fwd_kernel(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k]
    log_prob_ptr,  # [T] fp32, out
    T,
    N_EXPERTS,
    stride_zm,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < T
    mask = mask_m[:, None] & (offs_n < N_EXPERTS)[None, :]
    z_ptrs = logits_ptr + offs_m[:, None] * stride_zm + offs_n[None, :]
    left = tl.load(z_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    left = tl.where(mask_m[:, None], left, 0.0)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for j in range(TOP_K):
        drawn = tl.load(index_ptr + offs_m * TOP_K + j, mask=mask_m, other=0).to(tl.int32)
        is_drawn = offs_n[None, :] == drawn[:, None]
        largest = tl.max(left, axis=1)
        step_lse = largest + tl.log(tl.sum(tl.exp(left - largest[:, None]), axis=1))
        total += tl.sum(tl.where(is_drawn, left, 0.0), axis=1) - step_lse
        left = tl.where(is_drawn, float("-inf"), left)
    tl.store(log_prob_ptr + offs_m, total, mask=mask_m)


@triton.jit
def _log_prob_bwd_kernel(
    logits_ptr,  # [T, n]
    index_ptr,  # [T, top_k]
    grad_ptr,  # [T] fp32
    dlogits_ptr,  # [T, n], out
    T,
    N_EXPERTS,
    stride_zm,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < T, offs_n < N_EXPERTS
    mask = mask_m[:, None] & mask_n[None, :]
    z_ptrs = logits_ptr + offs_m[:, None] * stride_zm + offs_n[None, :]
    left = tl.load(z_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    left = tl.where(mask_m[:, None], left, 0.0)
    dz = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for j in range(TOP_K):
        drawn = tl.load(index_ptr + offs_m * TOP_K + j, mask=mask_m, other=0).to(tl.int32)
        is_drawn = offs_n[None, :] == drawn[:, None]
        largest = tl.max(left, axis=1)
        shifted = tl.exp(left - largest[:, None])
        dz -= shifted / tl.sum(shifted, axis=1)[:, None]
        dz = tl.where(is_drawn, dz + 1.0, dz)
        left = tl.where(is_drawn, float("-inf"), left)
    dz *= tl.load(grad_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    dz_ptrs = dlogits_ptr + offs_m[:, None] * N_EXPERTS + offs_n[None, :]
    tl.store(dz_ptrs, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


def sample_top_k_fwd(logits: Tensor, k: int, seed: int, offset: int) -> Tensor:
    """logits [T, n] -> int32 [T, k]."""
    z = _rows(logits.detach())
    index = torch.empty(z.shape[0], k, dtype=torch.int32, device=z.device)
    signed = (seed + 2**63) % 2**64 - 2**63
    grid, blocks = _blocks(z)
    launch(
        _sample_top_k_fwd_kernel,
        grid,
        logits_ptr=z,
        index_ptr=index,
        T=z.shape[0],
        N_EXPERTS=z.shape[1],
        seed=signed,
        offset=offset,
        stride_zm=z.stride(0),
        TOP_K=k,
        **blocks,
    )
    return index


def log_prob_fwd(logits: Tensor, index: Tensor) -> Tensor:
    """logits [T, n], index [T, k] -> fp32 [T]."""
    z = _rows(logits)
    log_prob = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    grid, blocks = _blocks(z)
    launch(
        _log_prob_fwd_kernel,
        grid,
        logits_ptr=z,
        index_ptr=index,
        log_prob_ptr=log_prob,
        T=z.shape[0],
        N_EXPERTS=z.shape[1],
        stride_zm=z.stride(0),
        TOP_K=index.shape[1],
        **blocks,
    )
    return log_prob


def log_prob_bwd(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """logits [T, n], index [T, k], grad fp32 [T] -> dlogits [T, n] in the dtype of logits."""
    z = _rows(logits)
    dlogits = torch.empty(z.shape, dtype=logits.dtype, device=z.device)
    grid, blocks = _blocks(z)
    launch(
        _log_prob_bwd_kernel,
        grid,
        logits_ptr=z,
        index_ptr=index,
        grad_ptr=grad.contiguous(),
        dlogits_ptr=dlogits,
        T=z.shape[0],
        N_EXPERTS=z.shape[1],
        stride_zm=z.stride(0),
        TOP_K=index.shape[1],
        **blocks,
    )
    return dlogits


def _rows(logits: Tensor) -> Tensor:
    """Rows whose experts lie side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _blocks(z: Tensor, lanes: int = _LANES) -> tuple[tuple[int], dict[str, int]]:
    block_n = max(4, triton.next_power_of_2(z.shape[1]))
    block_m = max(1, lanes // block_n)
    return (triton.cdiv(z.shape[0], block_m),), {"BLOCK_M": block_m, "BLOCK_N": block_n}

"""What the kernels share on the device side, and how they multiply.

The interpreter multiplies bf16 tiles wrongly, so there, and only there, operands are widened to
fp32 first. Everywhere else tiles are multiplied in their own dtype and summed in fp32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_R] fp32
    x_rows,  # [BLOCK_M] pointers to rows of x
    stride_xk,
    mask_m,
    a_rows,  # [BLOCK_R] pointers to rows of a
    stride_ak,
    mask_r,
    K_IN,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x a^T, a block of K_IN at a time; a is cast to x's dtype."""
    for start in range(0, K_IN, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K_IN
        k = offs_k.to(tl.int64)
        x = tl.load(
            x_rows[:, None] + k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = tl.load(
            a_rows[None, :] + k[:, None] * stride_ak,
            mask=mask_r[None, :] & mask_k[:, None],
            other=0.0,
        )
        acc = dot(x, a.to(x.dtype), acc, PRECISION)
    return acc


@triton.jit
def selection_mask(
    index_ptr,  # [P, top_k]
    weights_ptr,  # [P, top_k], when HAS_WEIGHTS
    rows,  # [BLOCK_M] int64
    mask_m,
    expert,  # [BLOCK_R]
    scale,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The weight of each column's expert in each row, fp32 [BLOCK_M, BLOCK_R]; 0: not chosen."""
    mask = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for j in range(TOP_K):
        chosen = tl.load(index_ptr + rows * TOP_K + j, mask=mask_m, other=0).to(tl.int32)
        hit = chosen[:, None] == expert[None, :]
        if HAS_WEIGHTS:
            w = tl.load(weights_ptr + rows * TOP_K + j, mask=mask_m, other=0.0).to(tl.float32)
            mask += tl.where(hit, w[:, None], 0.0)
        else:
            mask += tl.where(hit, scale, 0.0)
    return mask


@triton.jit
def swizzled_pid(num_m, num_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a one-dimensional grid, so that neighbours share operands in L2."""
    pid = tl.program_id(0)
    in_group = GROUP_M * num_n
    first_m = (pid // in_group) * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    return first_m + (pid % in_group) % rows, (pid % in_group) // rows


def precision() -> str:
    """How fp32 tiles are multiplied: exactly, unless tf32 was asked of torch."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds `size`; tensor cores want 16."""
    return max(least, triton.next_power_of_2(size))

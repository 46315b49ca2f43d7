"""Gather strategy in Triton, for decoding: each row reads the weights of its own k experts, once.

    h[p, j] = w[p, j] A_i x[t]                  a program a (row, slot, few ranks)
    y[p] = base[p] + sum over j of B_i h[p, j]  a program a (row, tile of y)

No tensor cores: the work is reading k r (in + out) numbers a row, and a few rows at that. The sums
run in a fixed order, so a row's result never depends on the others. h stays in fp32.

Bytes over the frozen linear (s an element, P rows): P (s k r (in + out) + s k ceil(r / BLOCK_R) in
+ 8 k r + 2 s out); floor: P s k r (in + out). FLOPs: 2 P k r (in + out).

Only the forward pass is gathered: with gradients, the backward pass is the dense strategy's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels import _configs
from remix_kernels._launch import launch
from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy, base_and_output
from remix_kernels.triton_dense import dense_bwd, dense_prepare


@triton.jit
def _gather_fwd_shrink_kernel(
    x_ptr,  # [T, K_IN] by strides
    a_ptr,  # [n, r, K_IN] by strides
    index_ptr,  # [P, top_k]
    weights_ptr,  # [P, top_k], when HAS_WEIGHTS
    h_ptr,  # [P, top_k, r] fp32, out
    T,
    K_IN,
    RANK: tl.constexpr,
    scale,
    stride_xm,
    stride_xk,
    stride_an,
    stride_ar,
    stride_ak,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < RANK
    expert = tl.load(index_ptr + pair).to(tl.int64)
    x_row = x_ptr + ((pair // TOP_K) % T) * stride_xm
    a_rows = a_ptr + expert * stride_an + offs_r.to(tl.int64) * stride_ar
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(0, K_IN, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K_IN
        k = offs_k.to(tl.int64)
        x = tl.load(x_row + k * stride_xk, mask=mask_k, other=0.0)
        a = tl.load(
            a_rows[:, None] + k[None, :] * stride_ak,
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc += a.to(tl.float32) * x.to(tl.float32)[None, :]
    h = tl.sum(acc, axis=1)
    if HAS_WEIGHTS:
        h *= tl.load(weights_ptr + pair).to(tl.float32)
    else:
        h *= scale
    tl.store(h_ptr + pair * RANK + offs_r, h, mask=mask_r)


@triton.jit
def _gather_fwd_expand_kernel(
    h_ptr,  # [P, top_k, r] fp32
    b_ptr,  # [n, N_OUT, r] by strides
    index_ptr,  # [P, top_k]
    base_ptr,  # [BASE_ROWS, N_OUT] by strides, when HAS_BASE
    y_ptr,  # [P, N_OUT], out; may be base
    N_OUT,
    RANK: tl.constexpr,
    BASE_ROWS,
    stride_basem,
    stride_basen,
    stride_bn,
    stride_bo,
    stride_br,
    TOP_K: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_OUT
    n = offs_n.to(tl.int64)
    acc = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_BASE:
        base_row = base_ptr + (row % BASE_ROWS) * stride_basem
        acc += tl.load(base_row + n * stride_basen, mask=mask_n, other=0.0).to(tl.float32)
    for j in range(TOP_K):
        expert = tl.load(index_ptr + row * TOP_K + j).to(tl.int64)
        h_row = h_ptr + (row * TOP_K + j) * RANK
        b_cols = b_ptr + expert * stride_bn + n * stride_bo
        for start in range(0, RANK, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < RANK
            h = tl.load(h_row + offs_r, mask=mask_r, other=0.0)
            b = tl.load(
                b_cols[None, :] + offs_r[:, None].to(tl.int64) * stride_br,
                mask=mask_r[:, None] & mask_n[None, :],
                other=0.0,
            )
            acc += tl.sum(b.to(tl.float32) * h[:, None], axis=0)
    tl.store(y_ptr + row * N_OUT + n, acc.to(y_ptr.dtype.element_ty), mask=mask_n)


def gather_prepare(call: Call, learned: bool) -> Kept:
    """Nothing: the backward pass is another strategy's."""
    return Kept()


def gather_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    x, lora_B, index = call.x, call.lora_B, call.top_k_index.contiguous()
    n, out, r = lora_B.shape
    P, top_k = index.shape
    lora_A = call.lora_A.expand(n, -1, -1)
    weights = call.top_k_weights
    tensor = weights.contiguous() if isinstance(weights, Tensor) else index
    hidden = torch.empty(P, top_k, r, dtype=torch.float32, device=x.device)
    config = _configs.gather_shrink(_configs.arch(x.device), r)
    launch(
        _gather_fwd_shrink_kernel,
        lambda c: (P * top_k, triton.cdiv(r, c["BLOCK_R"])),
        config,
        x_ptr=x,
        a_ptr=lora_A,
        index_ptr=index,
        weights_ptr=tensor,
        h_ptr=hidden,
        T=x.shape[0],
        K_IN=x.shape[1],
        RANK=r,
        scale=0.0 if isinstance(weights, Tensor) else float(weights),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_an=lora_A.stride(0),
        stride_ar=lora_A.stride(1),
        stride_ak=lora_A.stride(2),
        TOP_K=top_k,
        HAS_WEIGHTS=isinstance(weights, Tensor),
    )
    base, y = base_and_output(call)
    start = y if base is None else base
    config = _configs.gather_expand(_configs.arch(x.device), r)
    launch(
        _gather_fwd_expand_kernel,
        lambda c: (P, triton.cdiv(out, c["BLOCK_N"])),
        config,
        h_ptr=hidden,
        b_ptr=lora_B,
        index_ptr=index,
        base_ptr=start,
        y_ptr=y,
        N_OUT=out,
        RANK=r,
        BASE_ROWS=start.shape[0],
        stride_basem=start.stride(0),
        stride_basen=start.stride(1),
        stride_bn=lora_B.stride(0),
        stride_bo=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        TOP_K=top_k,
        HAS_BASE=base is not None,
    )
    return y


def gather_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """The dense strategy's, with its H made again."""
    return dense_bwd(call, dense_prepare(call, need.weights), dy, need)


GATHER = Strategy(gather_prepare, gather_fwd, gather_bwd)

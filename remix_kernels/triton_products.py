"""The dense strategy's two products, which know nothing of selections: y = x W^T + b + H B, u^T v.

Forward and backward run the same two: dx is an `expand` of dS with A in B's place, dA and dB are
`gram`s. Its sum over rows runs in planes of T, added in a fixed order: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels import _configs
from remix_kernels._launch import launch
from remix_kernels._triton import add_product, dot, precision, swizzled_pid


@triton.jit
def _dense_fwd_expand_kernel(
    x_ptr,  # [P, K_IN], when HAS_FROZEN
    w_ptr,  # [N_OUT, K_IN] by strides, when HAS_FROZEN
    bias_ptr,  # [N_OUT], when HAS_BIAS
    base_ptr,  # [BASE_ROWS, N_OUT], when HAS_BASE; row p reads row p % BASE_ROWS
    h_ptr,  # [P, R]
    b_ptr,  # [n, N_OUT, r] by strides
    y_ptr,  # [P, N_OUT], out; may be base
    P,
    K_IN,
    N_OUT,
    R,
    RANK: tl.constexpr,
    BASE_ROWS,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_basem,
    stride_basen,
    stride_bn,
    stride_bo,
    stride_br,
    HAS_FROZEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = swizzled_pid(tl.cdiv(P, BLOCK_M), tl.cdiv(N_OUT, BLOCK_N), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < P, offs_n < N_OUT
    n = offs_n.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_FROZEN:
        x_rows, w_rows = x_ptr + offs_m * stride_xm, w_ptr + n * stride_wn
        acc = add_product(
            acc, x_rows, stride_xk, mask_m, w_rows, stride_wk, mask_n, K_IN, PRECISION, BLOCK_K
        )
    h_rows, b_cols = h_ptr + offs_m * R, b_ptr + n * stride_bo
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        expert = (offs_r // RANK).to(tl.int64)
        b_rows = expert * stride_bn + (offs_r % RANK).to(tl.int64) * stride_br
        h = tl.load(
            h_rows[:, None] + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        b = tl.load(
            b_cols[None, :] + b_rows[:, None], mask=mask_r[:, None] & mask_n[None, :], other=0.0
        )
        acc = dot(h, b.to(h.dtype), acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BASE:
        base_rows = (offs_m % BASE_ROWS) * stride_basem
        base_ptrs = base_ptr + base_rows[:, None] + n[None, :] * stride_basen
        acc += tl.load(base_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N_OUT + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _dense_bwd_gram_kernel(
    u_ptr,  # [P, R]
    v_ptr,  # [P, D] by strides
    g_ptr,  # [planes, R, D], out: the sum over each plane's rows of u^T v
    P,
    R,
    D,
    plane_rows,
    stride_vm,
    stride_vn,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tl.program_id(2).to(tl.int64)
    mask_r, mask_n = offs_r < R, offs_n < D
    n = offs_n.to(tl.int64)
    first = plane * plane_rows
    last = tl.minimum(first + plane_rows, P)
    acc = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = rows < last
        u = tl.load(
            u_ptr + rows[None, :] * R + offs_r[:, None],
            mask=mask_r[:, None] & mask_m[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + n[None, :] * stride_vn,
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = dot(u, v, acc, PRECISION)
    g_ptrs = g_ptr + (plane * R + offs_r[:, None]) * D + n[None, :]
    tl.store(g_ptrs, acc.to(g_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_n[None, :])


@triton.jit
def _dense_bwd_sum_kernel(
    planes_ptr,  # [planes, SIZE] fp32
    g_ptr,  # [SIZE], out
    SIZE,
    num_planes,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for plane in range(num_planes):
        acc += tl.load(planes_ptr + plane * tl.cast(SIZE, tl.int64) + offs, mask=mask, other=0.0)
    tl.store(g_ptr + offs, acc.to(g_ptr.dtype.element_ty), mask=mask)


def expand(
    hidden: Tensor,
    lora_B: Tensor,
    y: Tensor,
    *,
    base: Tensor | None = None,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """y = x W^T + b + base + H B_all, each where given; base may be y itself.

    Args:
        hidden: H [P, R].
        lora_B: [n, out, r], any strides.
        y: [P, out], written.
        base: [P or T, out]; row p of y reads row p mod T.
        x: [P, in].
        weight: [out, in], any strides.
        bias: [out].
    """
    P, R = hidden.shape
    out = y.shape[1]
    fused = x is not None and weight is not None
    first, second = (x, weight) if fused else (hidden, hidden)
    assert first is not None and second is not None
    start = y if base is None else base
    config = _configs.expand(
        _configs.arch(y.device), y.element_size(), R, fused=fused, aligned=_configs.aligned(y)
    )
    launch(
        _dense_fwd_expand_kernel,
        lambda c: (triton.cdiv(P, c["BLOCK_M"]) * triton.cdiv(out, c["BLOCK_N"]),),
        config,
        x_ptr=first,
        w_ptr=second,
        bias_ptr=hidden if bias is None else bias,
        base_ptr=start,
        h_ptr=hidden,
        b_ptr=lora_B,
        y_ptr=y,
        P=P,
        K_IN=first.shape[1] if fused else 0,
        N_OUT=out,
        R=R,
        RANK=lora_B.shape[2],
        BASE_ROWS=start.shape[0],
        stride_xm=first.stride(0),
        stride_xk=first.stride(1),
        stride_wn=second.stride(0),
        stride_wk=second.stride(1),
        stride_basem=start.stride(0),
        stride_basen=start.stride(1),
        stride_bn=lora_B.stride(0),
        stride_bo=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        HAS_FROZEN=fused,
        HAS_BIAS=bias is not None,
        HAS_BASE=base is not None,
        PRECISION=precision(),
    )


def gram(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """u^T v, [R, D] in `dtype`. u [P, R], v [P, D]: over planes of rows, added in order."""
    P, R, D = *u.shape, v.shape[1]
    where = _configs.arch(u.device)
    config = _configs.gram(where, u.element_size(), R, aligned=_configs.aligned(v))
    plane_rows = _configs.plane_rows(where)
    planes = triton.cdiv(P, plane_rows)
    result = torch.empty(R, D, dtype=dtype, device=u.device)
    parts = (
        result if planes == 1 else torch.empty(planes, R, D, dtype=torch.float32, device=u.device)
    )
    launch(
        _dense_bwd_gram_kernel,
        lambda c: (triton.cdiv(R, c["BLOCK_R"]), triton.cdiv(D, c["BLOCK_N"]), planes),
        config,
        u_ptr=u,
        v_ptr=v,
        g_ptr=parts,
        P=P,
        R=R,
        D=D,
        plane_rows=plane_rows,
        stride_vm=v.stride(0),
        stride_vn=v.stride(1),
        PRECISION=precision(),
    )
    if planes > 1:
        add_planes(parts, result)
    return result


def add_planes(parts: Tensor, result: Tensor) -> None:
    """result [R, D] = the ordered sum of parts [planes, R, D]."""
    launch(
        _dense_bwd_sum_kernel,
        (triton.cdiv(result.numel(), 1024),),
        planes_ptr=parts,
        g_ptr=result,
        SIZE=result.numel(),
        num_planes=parts.shape[0],
        BLOCK=1024,
    )

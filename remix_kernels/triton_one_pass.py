"""dH and dB of the dense strategy in one pass over dy, for pools of few columns (R = n r <= 32).

    dH = dy B_all^T [P, R]         dB_all = H^T dy [R, out]

Both sums need all of dy, one along its columns and one along its rows, so a program takes a block
of rows and a chunk of columns and leaves two partial sums in fp32, which are added in order:

    planes of dH  [chunks, P, R]            small, because R is
    planes of dB  [row blocks, R, out]      written and read again: 8 R / (BLOCK_M s) of the bytes
                                            of dy, a half at R = 32, BLOCK_M = 256 and 16 bits

Bytes (s an element; C chunks of columns, G blocks of rows):

    both     s (P out + C P R) + b G R out + 4 (C P R + G R out)         FLOPs 4 P R out
    dS       4 C P R + s P R (+ 4 P R for learned weights)               b: an element of B
    dB       (4 G + b) R out

At R = 64 the planes would cost what a second reading of dy does: two kernels above 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels import _configs
from remix_kernels._launch import launch
from remix_kernels._triton import dot, precision, selection_mask

MOST_COLUMNS = 32


@triton.jit
def _one_pass_kernel(
    dy_ptr,  # [P, N_OUT] by strides
    b_ptr,  # [n, N_OUT, r] by strides
    h_ptr,  # [P, R]
    dh_ptr,  # [chunks, P, R] fp32, out: dy B_all^T over a chunk of columns
    g_ptr,  # [row blocks, R, N_OUT] fp32, out: H^T dy over a block of rows
    P,
    N_OUT,
    R,
    chunk,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_bo,
    stride_br,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < P, offs_r < R
    dy_rows = dy_ptr + offs_m * stride_dym
    expert = (offs_r // RANK).to(tl.int64)
    b_rows = b_ptr + expert * stride_bn + (offs_r % RANK).to(tl.int64) * stride_br
    u = tl.load(
        h_ptr + offs_m[None, :] * R + offs_r[:, None],
        mask=mask_r[:, None] & mask_m[None, :],
        other=0.0,
    )
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, N_OUT)
    dh = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        n = offs_n.to(tl.int64)
        dy = tl.load(
            dy_rows[:, None] + n[None, :] * stride_dyn,
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        b = tl.load(
            b_rows[None, :] + n[:, None] * stride_bo,
            mask=mask_r[None, :] & mask_n[:, None],
            other=0.0,
        )
        dh = dot(dy, b.to(dy.dtype), dh, PRECISION)
        g = dot(u, dy, tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32), PRECISION)
        g_ptrs = g_ptr + (block * R + offs_r[:, None]) * N_OUT + n[None, :]
        tl.store(g_ptrs, g, mask=mask_r[:, None] & mask_n[None, :])
    dh_ptrs = dh_ptr + (part * P + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(dh_ptrs, dh, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _one_pass_ds_kernel(
    parts_ptr,  # [num_parts, P, R] fp32
    index_ptr,  # [P, top_k]
    weights_ptr,  # [P, top_k]
    ds_ptr,  # [P, R], out
    dh_ptr,  # [P, R] fp32, out when KEEP_DH
    P,
    R,
    num_parts,
    scale,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < P
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    offs = offs_m[:, None] * R + offs_r[None, :]
    dh = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for part in range(num_parts):
        dh += tl.load(parts_ptr + part * (tl.cast(P, tl.int64) * R) + offs, mask=mask, other=0.0)
    if KEEP_DH:
        tl.store(dh_ptr + offs, dh, mask=mask)
    w = selection_mask(
        index_ptr,
        weights_ptr,
        offs_m,
        mask_m,
        offs_r // RANK,
        scale,
        TOP_K,
        HAS_WEIGHTS,
        BLOCK_M,
        BLOCK_R,
    )
    tl.store(ds_ptr + offs, (dh * w).to(ds_ptr.dtype.element_ty), mask=mask)


def partial_sums(hidden: Tensor, lora_B: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Planes of dH [chunks, P, R] and of dB [row blocks, R, out], fp32.

    Args:
        hidden: H [P, R].
        lora_B: [n, out, r], any strides.
        dy: [P, out], any strides.
    """
    (P, R), out = hidden.shape, dy.shape[1]
    where = _configs.arch(dy.device)
    config = _configs.one_pass(where, dy.element_size(), aligned=_configs.aligned(dy))
    chunk = _configs.column_chunk(where)
    blocks, chunks = triton.cdiv(P, config["BLOCK_M"]), triton.cdiv(out, chunk)
    dh = torch.empty(chunks, P, R, dtype=torch.float32, device=dy.device)
    g = torch.empty(blocks, R, out, dtype=torch.float32, device=dy.device)
    launch(
        _one_pass_kernel,
        lambda c: (blocks, chunks),
        config,
        ("BLOCK_M", "BLOCK_R"),
        dy_ptr=dy,
        b_ptr=lora_B,
        h_ptr=hidden,
        dh_ptr=dh,
        g_ptr=g,
        P=P,
        N_OUT=out,
        R=R,
        chunk=chunk,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_bn=lora_B.stride(0),
        stride_bo=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        RANK=lora_B.shape[2],
        PRECISION=precision(),
    )
    return dh, g


def masked_sum(
    parts: Tensor,
    index: Tensor,
    weights: Tensor | None,
    scale: float,
    r: int,
    dshrunk: Tensor,
    dhidden: Tensor | None,
) -> None:
    """dS [P, R] = mask * the ordered sum of parts, which goes into dhidden where given."""
    P, R = dshrunk.shape
    launch(
        _one_pass_ds_kernel,
        (triton.cdiv(P, 64),),
        parts_ptr=parts,
        index_ptr=index,
        weights_ptr=index if weights is None else weights,
        ds_ptr=dshrunk,
        dh_ptr=parts if dhidden is None else dhidden,
        P=P,
        R=R,
        num_parts=parts.shape[0],
        scale=scale,
        RANK=r,
        TOP_K=index.shape[1],
        HAS_WEIGHTS=weights is not None,
        KEEP_DH=dhidden is not None,
        BLOCK_M=64,
        BLOCK_R=MOST_COLUMNS,
    )

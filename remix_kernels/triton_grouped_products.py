"""The grouped strategy's three products over sorted pairs, each expert's a GEMM of its own.

Forward and backward run the same ones: dS is a `shrink` of dy with B in A's place, dx an `expand`
of dS with A in B's, dA and dB are `gram`s. Groups and positions are those of triton_grouped.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels import _configs
from remix_kernels._launch import launch
from remix_kernels._routed import Call
from remix_kernels._triton import add_product, dot, precision
from remix_kernels.triton_sort import Pairs, tile_ends


@triton.jit
def _find_tile(
    offsets_ptr,  # [GROUPS + 1]
    ends_ptr,  # [n]: tiles of the experts up to and including each one
    tile,
    slot,
    N_EXPERTS,
    TOP_K: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(expert, first position, end) of a tile: BLOCK_M pairs of one expert and one slot, or all.

    The end is the first where there is no such tile.
    """
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < N_EXPERTS, other=2147483647)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)  # those whose tiles all come before
    exists = expert < N_EXPERTS
    before = tl.load(ends_ptr + expert - 1, mask=exists & (expert > 0), other=0)
    if ALL_SLOTS:
        begin = tl.load(offsets_ptr + expert * TOP_K, mask=exists, other=0)
        end = tl.load(offsets_ptr + expert * TOP_K + TOP_K, mask=exists, other=0)
    else:
        begin = tl.load(offsets_ptr + expert * TOP_K + slot, mask=exists, other=0)
        end = tl.load(offsets_ptr + expert * TOP_K + slot + 1, mask=exists, other=0)
    first = begin + (tile - before) * BLOCK_M
    first = tl.where(exists, first, 0)
    return expert, first, tl.where(exists, tl.minimum(first + BLOCK_M, end), 0)


@triton.jit
def _grouped_shrink_kernel(
    x_ptr,  # [X_ROWS, K_IN] by strides; pair q reads row (order[q] // TOP_K) % X_ROWS
    a_ptr,  # [n, r, K_IN] by strides
    order_ptr,  # [PAIRS]
    offsets_ptr,  # [GROUPS + 1]
    ends_ptr,  # [n], of tiles of BLOCK_M
    weights_ptr,  # [PAIRS] in the order of the index, when HAS_WEIGHTS
    s_ptr,  # [PAIRS, r] fp32: out when KEEP_S; read when DOT_S
    h_ptr,  # [PAIRS, r], out: weight times the product
    dot_ptr,  # [PAIRS] in the order of the index, out when DOT_S: product . S
    X_ROWS,
    K_IN,
    RANK: tl.constexpr,
    N_EXPERTS,
    scale,
    stride_xm,
    stride_xk,
    stride_an,
    stride_ar,
    stride_ak,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_S: tl.constexpr,
    DOT_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert, first, last = _find_tile(
        offsets_ptr, ends_ptr, tl.program_id(0), 0, N_EXPERTS, TOP_K, True, BLOCK_M, BLOCK_E
    )
    if first < last:
        offs_q = first + tl.arange(0, BLOCK_M)
        mask_m = offs_q < last
        pair = tl.load(order_ptr + offs_q, mask=mask_m, other=0).to(tl.int64)
        rows = (pair // TOP_K) % X_ROWS
        x_rows = x_ptr + rows * stride_xm
        a_base = a_ptr + expert.to(tl.int64) * stride_an
        if HAS_WEIGHTS:
            w = tl.load(weights_ptr + pair, mask=mask_m, other=0.0).to(tl.float32)
        else:
            w = tl.zeros([BLOCK_M], dtype=tl.float32) + scale
        product_s = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start_r in range(0, RANK, BLOCK_R):
            offs_r = start_r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < RANK
            a_rows = a_base + offs_r.to(tl.int64) * stride_ar
            acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            acc = add_product(
                acc, x_rows, stride_xk, mask_m, a_rows, stride_ak, mask_r, K_IN, PRECISION, BLOCK_K
            )
            out_offs = offs_q[:, None].to(tl.int64) * RANK + offs_r[None, :]
            mask = mask_m[:, None] & mask_r[None, :]
            if KEEP_S:
                tl.store(s_ptr + out_offs, acc.to(s_ptr.dtype.element_ty), mask=mask)
            if DOT_S:
                s = tl.load(s_ptr + out_offs, mask=mask, other=0.0).to(tl.float32)
                product_s += tl.sum(acc * s, axis=1)
            h = acc * w[:, None]
            tl.store(h_ptr + out_offs, h.to(h_ptr.dtype.element_ty), mask=mask)
        if DOT_S:
            tl.store(dot_ptr + pair, product_s.to(dot_ptr.dtype.element_ty), mask=mask_m)


@triton.jit(do_not_specialize=["slot"])
def _grouped_expand_kernel(
    h_ptr,  # [PAIRS, r]
    b_ptr,  # [n, N_OUT, r] by strides
    order_ptr,  # [PAIRS]
    offsets_ptr,  # [GROUPS + 1]
    ends_ptr,  # [n], of this slot's tiles of BLOCK_M
    base_ptr,  # [BASE_ROWS, N_OUT] by strides, when HAS_BASE; row p reads row p % BASE_ROWS
    y_ptr,  # [P, N_OUT], out; may be base
    slot,
    N_OUT,
    RANK: tl.constexpr,
    N_EXPERTS,
    BASE_ROWS,
    stride_basem,
    stride_basen,
    stride_bn,
    stride_bo,
    stride_br,
    TOP_K: tl.constexpr,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert, first, last = _find_tile(
        offsets_ptr, ends_ptr, tl.program_id(0), slot, N_EXPERTS, TOP_K, False, BLOCK_M, BLOCK_E
    )
    if first < last:
        offs_q = first + tl.arange(0, BLOCK_M)
        mask_m = offs_q < last
        rows = tl.load(order_ptr + offs_q, mask=mask_m, other=0).to(tl.int64) // TOP_K
        h_rows = h_ptr + offs_q.to(tl.int64) * RANK
        b_expert = b_ptr + expert.to(tl.int64) * stride_bn
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < RANK
        if RANK <= BLOCK_R:  # loaded once for all columns
            h_mask = mask_m[:, None] & mask_r[None, :]
            h = tl.load(h_rows[:, None] + offs_r[None, :], mask=h_mask, other=0.0)
        first_column = tl.program_id(1) * COLUMN_BLOCKS * BLOCK_N
        blocks = min(COLUMN_BLOCKS, tl.cdiv(N_OUT - first_column, BLOCK_N))
        for block in range(blocks):
            offs_n = first_column + block * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N_OUT
            n = offs_n.to(tl.int64)
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            if RANK <= BLOCK_R:
                b = tl.load(
                    b_expert + offs_r[:, None].to(tl.int64) * stride_br + n[None, :] * stride_bo,
                    mask=mask_r[:, None] & mask_n[None, :],
                    other=0.0,
                )
                acc = dot(h, b.to(h.dtype), acc, PRECISION)
            else:
                acc = add_product(
                    acc,
                    h_rows,
                    1,
                    mask_m,
                    b_expert + n * stride_bo,
                    stride_br,
                    mask_n,
                    RANK,
                    PRECISION,
                    BLOCK_R,
                )
            mask = mask_m[:, None] & mask_n[None, :]
            if HAS_BASE:
                base_rows = (rows % BASE_ROWS) * stride_basem
                base_ptrs = base_ptr + base_rows[:, None] + n[None, :] * stride_basen
                acc += tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
            y_ptrs = y_ptr + rows[:, None] * N_OUT + n[None, :]
            tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_bwd_gram_kernel(
    u_ptr,  # [PAIRS, r], sorted
    v_ptr,  # [V_ROWS, D] by strides; pair q reads row (order[q] // TOP_K) % V_ROWS
    order_ptr,  # [PAIRS]
    offsets_ptr,  # [GROUPS + 1]
    ends_ptr,  # [n], of chunks
    g_ptr,  # [chunks, r, D] fp32, out: the sum over each chunk's pairs of u^T v
    V_ROWS,
    D,
    RANK: tl.constexpr,
    N_EXPERTS,
    stride_vm,
    stride_vn,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(2)
    _, first, last = _find_tile(
        offsets_ptr, ends_ptr, chunk, 0, N_EXPERTS, TOP_K, True, CHUNK, BLOCK_E
    )
    if first < last:
        offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_r, mask_n = offs_r < RANK, offs_n < D
        n = offs_n.to(tl.int64)
        acc = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
        for start in range(first, last, BLOCK_M):
            offs_q = start + tl.arange(0, BLOCK_M)
            mask_m = offs_q < last
            pair = tl.load(order_ptr + offs_q, mask=mask_m, other=0).to(tl.int64)
            rows = (pair // TOP_K) % V_ROWS
            u = tl.load(
                u_ptr + offs_q[None, :].to(tl.int64) * RANK + offs_r[:, None],
                mask=mask_r[:, None] & mask_m[None, :],
                other=0.0,
            )
            v = tl.load(
                v_ptr + rows[:, None] * stride_vm + n[None, :] * stride_vn,
                mask=mask_m[:, None] & mask_n[None, :],
                other=0.0,
            )
            acc = dot(u, v, acc, PRECISION)
        g_ptrs = g_ptr + (chunk.to(tl.int64) * RANK + offs_r[:, None]) * D + n[None, :]
        tl.store(g_ptrs, acc, mask=mask_r[:, None] & mask_n[None, :])


@triton.jit
def _grouped_bwd_sum_kernel(
    planes_ptr,  # [chunks, SIZE] fp32
    ends_ptr,  # [n], of chunks
    g_ptr,  # [n, SIZE], out: the ordered sum over the chunks of an expert, 0 where it has none
    SIZE,
    BLOCK: tl.constexpr,
):
    expert = tl.program_id(1)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends_ptr + expert)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for chunk in range(first, last):
        acc += tl.load(planes_ptr + tl.cast(chunk, tl.int64) * SIZE + offs, mask=mask, other=0.0)
    g_ptrs = g_ptr + expert.to(tl.int64) * SIZE + offs
    tl.store(g_ptrs, acc.to(g_ptr.dtype.element_ty), mask=mask)


def shrink(
    call: Call,
    x: Tensor,
    lora_A: Tensor,
    pairs: Pairs,
    hidden: Tensor,
    *,
    keep: Tensor | None = None,
    dot_with: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    """hidden[q] = w[q] A_i x[row of q] for every sorted pair.

    Args:
        call: For its index and weights.
        x: [rows, in]; M times as many pairs as rows share them.
        lora_A: [n or 1, r, in], any strides.
        pairs: The order.
        hidden: [P k, r], written.
        keep: [P k, r], written: the product before the weight.
        dot_with: [P k, r]; its product with that, by pair, goes into dots.
        dots: [P, k], written where dot_with is given.
    """
    top_k, n = call.top_k_index.shape[1], call.lora_B.shape[0]
    weights = call.top_k_weights
    tensor = weights.contiguous() if isinstance(weights, Tensor) else hidden
    lora_A = lora_A.expand(n, -1, -1)
    config = _configs.grouped_shrink(
        _configs.arch(x.device), x.element_size(), hidden.shape[1], hidden.shape[0] // n
    )
    stored = keep if keep is not None else hidden if dot_with is None else dot_with
    launch(
        _grouped_shrink_kernel,
        lambda c: (triton.cdiv(hidden.shape[0], c["BLOCK_M"]) + n,),
        config,
        ("BLOCK_M",),
        x_ptr=x,
        a_ptr=lora_A,
        order_ptr=pairs.order,
        offsets_ptr=pairs.offsets,
        ends_ptr=tile_ends(pairs, top_k, config["BLOCK_M"], by_slot=False),
        weights_ptr=tensor,
        s_ptr=stored,
        h_ptr=hidden,
        dot_ptr=hidden if dots is None else dots,
        X_ROWS=x.shape[0],
        K_IN=x.shape[1],
        RANK=hidden.shape[1],
        N_EXPERTS=n,
        scale=0.0 if isinstance(weights, Tensor) else float(weights),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_an=lora_A.stride(0),
        stride_ar=lora_A.stride(1),
        stride_ak=lora_A.stride(2),
        TOP_K=top_k,
        HAS_WEIGHTS=isinstance(weights, Tensor),
        KEEP_S=keep is not None,
        DOT_S=dot_with is not None,
        PRECISION=precision(),
        BLOCK_E=triton.next_power_of_2(n),
    )


def expand(
    hidden: Tensor, lora_B: Tensor, pairs: Pairs, top_k: int, y: Tensor, base: Tensor | None
) -> None:
    """y[p] = base[p] + sum over slots of B_i hidden[q], a pass a slot; base may be y itself."""
    n, P = lora_B.shape[0], y.shape[0]
    config = _configs.grouped_expand(
        _configs.arch(y.device),
        y.element_size(),
        hidden.shape[1],
        P // n,
        aligned=_configs.aligned(y),
    )
    ends = tile_ends(pairs, top_k, config["BLOCK_M"], by_slot=True)
    for slot in range(top_k):
        start = base if slot == 0 else y
        launch(
            _grouped_expand_kernel,
            lambda c: (
                triton.cdiv(P, c["BLOCK_M"]) + n,
                triton.cdiv(y.shape[1], c["BLOCK_N"] * c["COLUMN_BLOCKS"]),
            ),
            config,
            ("BLOCK_M",),
            h_ptr=hidden,
            b_ptr=lora_B,
            order_ptr=pairs.order,
            offsets_ptr=pairs.offsets,
            ends_ptr=ends[slot],
            base_ptr=y if start is None else start,
            y_ptr=y,
            slot=slot,
            N_OUT=y.shape[1],
            RANK=hidden.shape[1],
            N_EXPERTS=n,
            BASE_ROWS=P if start is None else start.shape[0],
            stride_basem=0 if start is None else start.stride(0),
            stride_basen=0 if start is None else start.stride(1),
            stride_bn=lora_B.stride(0),
            stride_bo=lora_B.stride(1),
            stride_br=lora_B.stride(2),
            TOP_K=top_k,
            HAS_BASE=start is not None,
            PRECISION=precision(),
            BLOCK_E=triton.next_power_of_2(n),
        )


def gram(u: Tensor, v: Tensor, pairs: Pairs, n: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """For every expert the sum over its pairs of u[q]^T v[row of q]: [n, r, D] in `dtype`."""
    r, D = u.shape[1], v.shape[1]
    config = _configs.grouped_gram(_configs.arch(u.device), u.element_size(), r)
    chunks = triton.cdiv(u.shape[0], config["CHUNK"]) + n
    parts = torch.empty(chunks, r, D, dtype=torch.float32, device=u.device)
    result = torch.empty(n, r, D, dtype=dtype, device=u.device)
    ends = tile_ends(pairs, top_k, config["CHUNK"], by_slot=False)
    launch(
        _grouped_bwd_gram_kernel,
        lambda c: (triton.cdiv(r, c["BLOCK_R"]), triton.cdiv(D, c["BLOCK_N"]), chunks),
        config,
        ("CHUNK",),
        u_ptr=u,
        v_ptr=v,
        order_ptr=pairs.order,
        offsets_ptr=pairs.offsets,
        ends_ptr=ends,
        g_ptr=parts,
        V_ROWS=v.shape[0],
        D=D,
        RANK=r,
        N_EXPERTS=n,
        stride_vm=v.stride(0),
        stride_vn=v.stride(1),
        TOP_K=top_k,
        PRECISION=precision(),
        BLOCK_E=triton.next_power_of_2(n),
    )
    launch(
        _grouped_bwd_sum_kernel,
        (triton.cdiv(r * D, 1024), n),
        planes_ptr=parts,
        ends_ptr=ends,
        g_ptr=result,
        SIZE=r * D,
        BLOCK=1024,
    )
    return result

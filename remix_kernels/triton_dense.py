"""Dense strategy in Triton: all n experts along the rank axis, the selection as a mask.

    S = x A_all^T                    [T, R], R = n r
    H = S * mask                     [M T, R], mask[p, i r + rho] = w[p, j] where index[p, j] = i
    y = x W^T + b + H B_all          [M T, out]: R more columns of K

    dH = dy B_all^T                  dS = sum over m of dH * mask          [T, R]
    dB_all = H^T dy                  dA_all = dS^T x
    dx = (sum over m of dy) W + dS A_all
    dw[p, j] = sum over rho of dH S at expert index[p, j]                  learned weights only:
                                                                           dH and S kept in fp32

No sort, no padding, no atomics. The mask is made in the epilogue of the shrink from the k indices
of a row, so that it is never in memory, and x is read once for all n experts and all M selections.
Sums over rows run in planes of T, added in a fixed order: the same bits on every run, and a row's y
does not depend on the other rows.

Bytes (s an element; R in one block; tiles of x, dy and H are read once, those of A and B once a row
block, out of L2):

    shrink   s (T in + R in + M T R) + i M T k          FLOPs 2 T R in
    expand   s (M T R + R out + 2 M T out)              2 M T R out       (y is read and written)
    dH       s (M T out + R out + T R) + i M T k        2 M T R out
    dB, dA   s (M T R + M T out + R out)                2 M T R out       (dA likewise with in)
             and 8 R out a plane but the first

The floor is the same sum without the second reading of y: y once, each input once. Up to R = 32,
unless selections share x, dH and dB come from one pass over dy: triton_one_pass.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels import _configs, triton_one_pass
from remix_kernels._launch import launch
from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy, base_and_output, frozen_dx
from remix_kernels._triton import add_product, precision, selection_mask
from remix_kernels.torch_dense import pack_a, pack_b
from remix_kernels.triton_products import add_planes, expand, gram


@triton.jit
def _dense_fwd_shrink_kernel(
    x_ptr,  # [T, K_IN]
    a_ptr,  # [n, r, K_IN] by strides
    index_ptr,  # [M T, top_k]
    weights_ptr,  # [M T, top_k]
    h_ptr,  # [M T, R], out
    s_ptr,  # [T, R] fp32, out when KEEP_S
    T,
    K_IN,
    R,
    RANK: tl.constexpr,
    num_selections,
    scale,
    stride_xm,
    stride_xk,
    stride_an,
    stride_ar,
    stride_ak,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_S: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < T, offs_r < R
    expert = offs_r // RANK
    x_rows = x_ptr + offs_m * stride_xm
    a_rows = a_ptr + expert.to(tl.int64) * stride_an + (offs_r % RANK).to(tl.int64) * stride_ar
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    acc = add_product(
        acc, x_rows, stride_xk, mask_m, a_rows, stride_ak, mask_r, K_IN, PRECISION, BLOCK_K
    )
    out_mask = mask_m[:, None] & mask_r[None, :]
    if KEEP_S:
        s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=out_mask)
    for m in range(num_selections):
        rows = offs_m + m * tl.cast(T, tl.int64)
        w = selection_mask(
            index_ptr,
            weights_ptr,
            rows,
            mask_m,
            expert,
            scale,
            TOP_K,
            HAS_WEIGHTS,
            BLOCK_M,
            BLOCK_R,
        )
        h_ptrs = h_ptr + rows[:, None] * R + offs_r[None, :]
        tl.store(h_ptrs, (acc * w).to(h_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _dense_bwd_dh_kernel(
    dy_ptr,  # [M T, N_OUT] by strides
    b_ptr,  # [n, N_OUT, r] by strides
    index_ptr,  # [M T, top_k]
    weights_ptr,  # [M T, top_k]
    ds_ptr,  # [T, R], out
    dh_ptr,  # [M T, R] fp32, out when KEEP_DH
    T,
    N_OUT,
    R,
    RANK: tl.constexpr,
    num_selections,
    scale,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_bo,
    stride_br,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_DH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < T, offs_r < R
    out_mask = mask_m[:, None] & mask_r[None, :]
    expert = offs_r // RANK
    b_rows = b_ptr + expert.to(tl.int64) * stride_bn + (offs_r % RANK).to(tl.int64) * stride_br
    ds = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for m in range(num_selections):
        rows = offs_m + m * tl.cast(T, tl.int64)
        dy_rows = dy_ptr + rows * stride_dym
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        acc = add_product(
            acc, dy_rows, stride_dyn, mask_m, b_rows, stride_bo, mask_r, N_OUT, PRECISION, BLOCK_K
        )
        if KEEP_DH:
            dh_ptrs = dh_ptr + rows[:, None] * R + offs_r[None, :]
            tl.store(dh_ptrs, acc.to(dh_ptr.dtype.element_ty), mask=out_mask)
        ds += acc * selection_mask(
            index_ptr,
            weights_ptr,
            rows,
            mask_m,
            expert,
            scale,
            TOP_K,
            HAS_WEIGHTS,
            BLOCK_M,
            BLOCK_R,
        )
    ds_ptrs = ds_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _dense_bwd_dweights_kernel(
    dh_ptr,  # [M T, R] fp32
    s_ptr,  # [T, R] fp32
    index_ptr,  # [M T, top_k]
    dweights_ptr,  # [M T, top_k], out
    P,
    T,
    R,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < P
    for j in range(TOP_K):
        chosen = tl.load(index_ptr + rows * TOP_K + j, mask=mask_m, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, RANK, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask = mask_m[:, None] & (offs_r < RANK)[None, :]
            columns = (chosen * RANK)[:, None] + offs_r[None, :]
            dh = tl.load(dh_ptr + rows[:, None] * R + columns, mask=mask, other=0.0)
            s = tl.load(s_ptr + (rows % T)[:, None] * R + columns, mask=mask, other=0.0)
            acc += tl.sum(dh.to(tl.float32) * s.to(tl.float32), axis=1)
        out = acc.to(dweights_ptr.dtype.element_ty)
        tl.store(dweights_ptr + rows * TOP_K + j, out, mask=mask_m)


def dense_prepare(call: Call, learned: bool) -> Kept:
    """H [M T, R] and, for learned weights, S [T, R]."""
    x, lora_A = call.x, _all_a(call)
    rows, P = x.shape[0], call.top_k_index.shape[0]
    n, r = lora_A.shape[:2]
    index, weights, scale = _selection(call)
    hidden = x.new_empty(P, n * r)
    shrunk = x.new_empty(rows, n * r, dtype=torch.float32) if learned else None
    config = _configs.shrink(_configs.arch(x.device), x.element_size(), n * r)
    launch(
        _dense_fwd_shrink_kernel,
        lambda c: (triton.cdiv(rows, c["BLOCK_M"]), triton.cdiv(n * r, c["BLOCK_R"])),
        config,
        x_ptr=x,
        a_ptr=lora_A,
        index_ptr=index,
        weights_ptr=index if weights is None else weights,
        h_ptr=hidden,
        s_ptr=hidden if shrunk is None else shrunk,
        T=rows,
        K_IN=x.shape[1],
        R=n * r,
        RANK=r,
        num_selections=P // rows,
        scale=scale,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_an=lora_A.stride(0),
        stride_ar=lora_A.stride(1),
        stride_ak=lora_A.stride(2),
        TOP_K=index.shape[1],
        HAS_WEIGHTS=weights is not None,
        KEEP_S=shrunk is not None,
        PRECISION=precision(),
    )
    return Kept((hidden, shrunk))


def dense_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    x, lora_B, hidden = call.x, call.lora_B, kept.tensors[0]
    assert hidden is not None
    P = call.top_k_index.shape[0]
    if call.weight is not None and x.shape[0] == P and _configs.own_gemm():
        y = x.new_empty(P, lora_B.shape[1])
        expand(hidden, lora_B, y, x=x, weight=call.weight, bias=call.bias)
    else:
        base, y = base_and_output(call)
        if _configs.adds_in_cublas(hidden.shape[1]) and (base is None or base.shape == y.shape):
            return _add_product(base, y, hidden, pack_b(lora_B, x.dtype))
        expand(hidden, lora_B, y, base=base)
    return y


def dense_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> the gradients that are needed."""
    x, lora_A, lora_B = call.x, _all_a(call), call.lora_B
    hidden, shrunk = kept.tensors
    assert hidden is not None
    rows, (n, out, r), P = x.shape[0], lora_B.shape, dy.shape[0]
    dx = dlora_a = dlora_b = dweights = None
    if not (need.x or need.lora_A or need.weights):
        if need.lora_B:
            dlora_b = _as_b(gram(hidden, dy, lora_B.dtype), lora_B)
        return Grads(lora_B=dlora_b)
    index, weights, scale = _selection(call)
    dshrunk = x.new_empty(rows, n * r)
    dhidden = x.new_empty(P, n * r, dtype=torch.float32) if need.weights else None
    if need.lora_B and rows == P and n * r <= triton_one_pass.MOST_COLUMNS:
        parts, planes = triton_one_pass.partial_sums(hidden, lora_B, dy)
        summed = torch.empty(n * r, out, dtype=lora_B.dtype, device=x.device)
        add_planes(planes, summed)
        dlora_b = _as_b(summed, lora_B)
        triton_one_pass.masked_sum(parts, index, weights, scale, r, dshrunk, dhidden)
    else:
        if need.lora_B:
            dlora_b = _as_b(gram(hidden, dy, lora_B.dtype), lora_B)
        _dh(call, (index, weights, scale), dy, dshrunk, dhidden)
    if dhidden is not None:
        assert shrunk is not None and weights is not None
        dweights = torch.empty_like(weights)
        launch(
            _dense_bwd_dweights_kernel,
            (triton.cdiv(P, 32),),
            dh_ptr=dhidden,
            s_ptr=shrunk,
            index_ptr=index,
            dweights_ptr=dweights,
            P=P,
            T=rows,
            R=n * r,
            RANK=r,
            TOP_K=index.shape[1],
            BLOCK_M=32,
            BLOCK_R=16,
        )
    if need.lora_A:
        wide = torch.float32 if call.shared_a else call.lora_A.dtype
        dlora_a = gram(dshrunk, x, wide).view(n, r, -1)
        if call.shared_a:
            dlora_a = dlora_a.sum(0, keepdim=True).to(call.lora_A.dtype)
    if need.x:
        dx = dense_dx(call, dy, dshrunk, lora_A)
    return Grads(dx, dlora_a, dlora_b, dweights)


DENSE = Strategy(dense_prepare, dense_fwd, dense_bwd)


def _dh(
    call: Call,
    selection: tuple[Tensor, Tensor | None, float],
    dy: Tensor,
    dshrunk: Tensor,
    dhidden: Tensor | None,
) -> None:
    """dS = sum over m of mask * (dy B_all^T) into dshrunk; the product into dhidden where given."""
    (rows, _), (n, out, r), P = call.x.shape, call.lora_B.shape, dy.shape[0]
    lora_B, (index, weights, scale) = call.lora_B, selection
    heavy = rows < P or not _configs.aligned(dy)
    config = _configs.shrink(_configs.arch(dy.device), dy.element_size(), n * r, heavy=heavy)
    launch(
        _dense_bwd_dh_kernel,
        lambda c: (triton.cdiv(rows, c["BLOCK_M"]), triton.cdiv(n * r, c["BLOCK_R"])),
        config,
        dy_ptr=dy,
        b_ptr=lora_B,
        index_ptr=index,
        weights_ptr=index if weights is None else weights,
        ds_ptr=dshrunk,
        dh_ptr=dshrunk if dhidden is None else dhidden,
        T=rows,
        N_OUT=out,
        R=n * r,
        RANK=r,
        num_selections=P // rows,
        scale=scale,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_bn=lora_B.stride(0),
        stride_bo=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        TOP_K=index.shape[1],
        HAS_WEIGHTS=weights is not None,
        KEEP_DH=dhidden is not None,
        PRECISION=precision(),
    )


def _as_b(packed: Tensor, lora_B: Tensor) -> Tensor:
    """[R, out] as a gradient of lora_B, [n, out, r]."""
    n, out, r = lora_B.shape
    return packed.view(n, r, out).transpose(1, 2)


def dense_dx(call: Call, dy: Tensor, dshrunk: Tensor, lora_A: Tensor) -> Tensor:
    """(sum over m of dy) W + dS A_all, [T, in]."""
    x, weight = call.x, call.weight
    columns = lora_A.transpose(1, 2)  # [n, in, r], as B is [n, out, r]
    if weight is not None and _configs.own_gemm():
        summed = dy if dy.shape[0] == x.shape[0] else dy.view(-1, x.shape[0], dy.shape[1]).sum(0)
        dx = x.new_empty(x.shape)
        expand(dshrunk, columns, dx, x=summed, weight=weight.T)
        return dx
    frozen = None if weight is None else frozen_dx(call, dy)
    if _configs.adds_in_cublas(dshrunk.shape[1]):
        return _add_product(frozen, frozen, dshrunk, pack_a(lora_A, x.dtype))
    dx = x.new_empty(x.shape) if frozen is None else frozen
    expand(dshrunk, columns, dx, base=frozen)
    return dx


def _add_product(base: Tensor | None, y: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    """base + u v, in place where base is y; u v alone without a base."""
    if base is None:
        return u @ v
    return base.addmm_(u, v) if base is y else torch.addmm(base, u, v)


def _all_a(call: Call) -> Tensor:
    """[n, r, in]; a shared A is repeated by its stride, not in memory."""
    return call.lora_A.expand(call.lora_B.shape[0], -1, -1) if call.shared_a else call.lora_A


def _selection(call: Call) -> tuple[Tensor, Tensor | None, float]:
    """(index, tensor weights or None, the number that they are otherwise)."""
    index = call.top_k_index.contiguous()
    if isinstance(call.top_k_weights, Tensor):
        return index, call.top_k_weights.contiguous(), 0.0
    return index, None, float(call.top_k_weights)

"""Gather strategy: row by row, reading only the chosen experts' weights. For decoding.

    h = A_i x_t,   y_t += w B_i h        for each of the k experts i of row t

Nothing is copied or sorted; the experts' matrices are read in place. Each row costs 2 k small
matrix-vector products, so this pays only for a handful of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy, frozen_dx, start_output


def gather_prepare(call: Call, learned: bool) -> Kept:
    """The index as lists."""
    return Kept(host=call.top_k_index.tolist())


def gather_fwd(call: Call, kept: Kept) -> Tensor:
    """y [M T, out]."""
    x, lora_A, lora_B = call.x, call.lora_A, call.lora_B
    scales = call.top_k_weights.tolist() if isinstance(call.top_k_weights, Tensor) else None
    scale: Any = call.top_k_weights
    y = start_output(call)
    for p, experts in enumerate(kept.host):
        row, out = x[p % x.shape[0]], y[p]
        for j, i in enumerate(experts):
            a, b = lora_A[0 if call.shared_a else i], lora_B[i]
            if a.dtype != x.dtype or b.dtype != x.dtype:
                a, b = a.to(x.dtype), b.to(x.dtype)
            out.addmv_(b, a.mv(row), alpha=scale if scales is None else scales[p][j])
    return y


def gather_bwd(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
    """dy [M T, out] -> every gradient, summed in fp32 at least (nobody trains this way)."""
    x, lora_A, lora_B, weights = call.x, call.lora_A, call.lora_B, call.top_k_weights
    scales = weights.tolist() if isinstance(weights, Tensor) else None
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = frozen_dx(call, dy).to(wide)
    x_dtype, x, dy = x.dtype, x.to(wide), dy.to(wide)
    dlora_a = torch.zeros_like(lora_A, dtype=wide)
    dlora_b = torch.zeros_like(lora_B, dtype=wide)
    dweights = torch.zeros_like(weights) if isinstance(weights, Tensor) else None
    for p, experts in enumerate(kept.host):
        t = p % x.shape[0]
        for j, i in enumerate(experts):
            ia = 0 if call.shared_a else i
            a, b = lora_A[ia].to(x.dtype), lora_B[i].to(x.dtype)
            scale: Any = weights if scales is None else scales[p][j]
            hidden, dhidden = a.mv(x[t]), b.T.mv(dy[p])
            if dweights is not None:
                dweights[p, j] = hidden.dot(dhidden)
            dlora_b[i] += scale * torch.outer(dy[p], hidden)
            dlora_a[ia] += scale * torch.outer(dhidden, x[t])
            dx[t].addmv_(a.T, dhidden, alpha=scale)
    return Grads(dx.to(x_dtype), dlora_a.to(lora_A.dtype), dlora_b.to(lora_B.dtype), dweights)


GATHER = Strategy(gather_prepare, gather_fwd, gather_bwd)

"""Gather strategy: row by row, reading only the chosen experts' weights. For decoding.

    h = A_i x_t,   y_t += w B_i h        for each of the k experts i of row t

Nothing is copied or sorted; the experts' matrices are read in place. Each row costs 2 k small
matrix-vector products, so this pays only for a handful of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remix_kernels._frozen import frozen_dx, start_output, without_autocast


def gather_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    index: Tensor,
    weights: Tensor | float,
) -> tuple[Tensor, list[list[int]]]:
    """x [T, in], index [M T, k] -> y [M T, out], and the index as lists."""
    rows = x.shape[0]
    y = start_output(x, weight, bias, base, index.shape[0], lora_B.shape[1])
    chosen = index.tolist()
    scales = weights.tolist() if isinstance(weights, Tensor) else None
    shared_a = lora_A.shape[0] == 1
    for p, experts in enumerate(chosen):
        row = x[p % rows]
        for j, i in enumerate(experts):
            hidden = lora_A[0 if shared_a else i].to(x.dtype).mv(row)
            scale: Any = weights if scales is None else scales[p][j]
            y[p].addmv_(lora_B[i].to(x.dtype), hidden, alpha=scale)
    return y, chosen


class GatherRouted(torch.autograd.Function):
    """y [M T, out] from x [T, in] and index [M T, k]; added to x W^T + b, to base, or alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        index: Tensor,
        weights: Tensor | float,
    ) -> Tensor:
        y, ctx.chosen = gather_fwd(x, weight, bias, base, lora_A, lora_B, index, weights)
        tensor_weights = weights if isinstance(weights, Tensor) else None
        ctx.scale = None if isinstance(weights, Tensor) else weights
        ctx.save_for_backward(x, weight, lora_A, lora_B, tensor_weights)
        return y

    @staticmethod
    @without_autocast
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, weights = ctx.saved_tensors
        rows = x.shape[0]
        scales = None if weights is None else weights.tolist()
        dx = frozen_dx(dy, x, weight)
        dlora_a = torch.zeros_like(lora_A, dtype=torch.promote_types(lora_A.dtype, x.dtype))
        dlora_b = torch.zeros_like(lora_B, dtype=torch.promote_types(lora_B.dtype, x.dtype))
        dweights = None if weights is None else torch.zeros_like(weights)
        shared_a = lora_A.shape[0] == 1
        for p, experts in enumerate(ctx.chosen):
            t = p % rows
            for j, i in enumerate(experts):
                ia = 0 if shared_a else i
                a, b = lora_A[ia].to(x.dtype), lora_B[i].to(x.dtype)
                scale = ctx.scale if scales is None else scales[p][j]
                hidden, dhidden = a.mv(x[t]), b.T.mv(dy[p])
                if dweights is not None:
                    dweights[p, j] = hidden.dot(dhidden)
                dlora_b[i] += scale * torch.outer(dy[p], hidden)
                dlora_a[ia] += scale * torch.outer(dhidden, x[t])
                dx[t].addmv_(a.T, dhidden, alpha=scale)
        dbase = dy if ctx.needs_input_grad[3] else None
        dlora_a, dlora_b = dlora_a.to(lora_A.dtype), dlora_b.to(lora_B.dtype)
        return dx, None, None, dbase, dlora_a, dlora_b, None, dweights

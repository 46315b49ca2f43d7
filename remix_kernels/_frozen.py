"""What every torch strategy shares: the output the adapters add to, and its gradient for x."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def start_output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, rows: int, out: int
) -> Tensor:
    """A fresh y [rows, out] to add the adapters to: x W^T + b, a copy of base, or zeros.

    Args:
        x: [T, in]. With rows = M T, each of the M selections starts from the same T rows.
        weight: [out, in] or None.
        bias: [out] or None.
        base: [rows, out] or None; never together with weight.
        rows: Rows of the result.
        out: Columns of the result.
    """
    if weight is None:
        return x.new_zeros(rows, out) if base is None else base.clone()
    bias = None if bias is None else bias.to(x.dtype)
    y = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    return y if rows == x.shape[0] else y.repeat(rows // x.shape[0], 1)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Run in the dtypes at hand: the ops choose their own, and autocast would mix them again."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(backward: Callable[..., Any]) -> Any:
    """Decorate a Function's backward: autocast may be on around loss.backward()."""

    @functools.wraps(backward)
    def run(ctx: Any, *grad_outputs: Any) -> Any:
        with no_autocast(grad_outputs[0].device):
            return backward(ctx, *grad_outputs)

    return run


def frozen_dx(dy: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """What the frozen linear sends to x, [T, in]: dy W, dy summed over selections that shared x."""
    if weight is None:
        return torch.zeros_like(x)
    if dy.shape[0] != x.shape[0]:
        dy = dy.view(-1, x.shape[0], dy.shape[1]).sum(0)
    return dy @ weight.to(x.dtype)

"""What every strategy shares: one call's operands, the autograd boundary, and the frozen linear.

A strategy is a file with three plain functions over a `Call`: what both passes need (`prepare`: the
low-rank products, a sort), the rest of the forward pass, and the backward pass. `Routed` makes them
differentiable. So a new strategy or backend is these functions and a line in a table of `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The operands of one routed op, checked, rows flattened. M = 1 unless selections share x."""

    x: Tensor  # [T, in]
    weight: Tensor | None  # [out, in], frozen; never together with base
    bias: Tensor | None  # [out]
    base: Tensor | None  # [M T, out]
    lora_A: Tensor  # [n, r, in], or [1, r, in]: shared by all experts
    lora_B: Tensor  # [n, out, r]
    top_k_index: Tensor  # [M T, k], integer
    top_k_weights: Tensor | float  # [M T, k] or one number

    @property
    def shared_a(self) -> bool:
        """Whether all experts read the same A."""
        return self.lora_A.shape[0] == 1


class Kept(NamedTuple):
    """What both passes need: made before the forward pass, kept for the backward pass."""

    tensors: tuple[Tensor | None, ...] = ()
    host: Any = None  # what is not a tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_A: bool
    lora_B: bool
    weights: bool


class Grads(NamedTuple):
    """What a backward pass returns, None where it was not wanted."""

    x: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    weights: Tensor | None = None


class Strategy(NamedTuple):
    """One way to compute a routed op."""

    prepare: Callable[[Call, bool], Kept]  # the flag: d(weights) will be wanted
    forward: Callable[[Call, Kept], Tensor]  # -> y [M T, out], freshly allocated
    backward: Callable[[Call, Kept, Tensor, Needs], Grads]

    def run(self, call: Call) -> Tensor:
        """The forward pass alone."""
        return self.forward(call, self.prepare(call, False))


class Routed(torch.autograd.Function):
    """y [M T, out] of one Call by one Strategy, differentiable once."""

    @staticmethod
    def forward(ctx: Any, strategy: Strategy, *operands: Any) -> Tensor:
        call = Call(*operands)
        weights = call.top_k_weights if isinstance(call.top_k_weights, Tensor) else None
        kept = strategy.prepare(call, weights is not None and weights.requires_grad)
        y = strategy.forward(call, kept)
        ctx.strategy, ctx.host = strategy, kept.host
        ctx.number = call.top_k_weights if weights is None else None
        ctx.save_for_backward(
            call.x, call.weight, call.lora_A, call.lora_B, call.top_k_index, weights, *kept.tensors
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, index, weights, *tensors = ctx.saved_tensors
        _, need_x, _, _, need_base, need_a, need_b, _, need_w = ctx.needs_input_grad
        scale = ctx.number if weights is None else weights
        call = Call(x, weight, None, None, lora_A, lora_B, index, scale)
        needs = Needs(need_x, need_a, need_b, need_w)
        with no_autocast(dy.device):  # autocast may be on around loss.backward()
            grads = ctx.strategy.backward(call, Kept(tuple(tensors), ctx.host), dy, needs)
        dbase = dy if need_base else None
        return None, grads.x, None, None, dbase, grads.lora_A, grads.lora_B, None, grads.weights


def start_output(call: Call) -> Tensor:
    """A fresh y [M T, out] to add the adapters to: x W^T + b, a copy of base, or zeros."""
    x, rows = call.x, call.top_k_index.shape[0]
    if call.base is not None:
        return call.base.clone()
    if call.weight is None:
        return x.new_zeros(rows, call.lora_B.shape[1])
    bias = None if call.bias is None else cast(call.bias, x.dtype)
    y = torch.nn.functional.linear(x, cast(call.weight, x.dtype), bias)
    return y if rows == x.shape[0] else y.repeat(rows // x.shape[0], 1)


def base_and_output(call: Call) -> tuple[Tensor | None, Tensor]:
    """(what to add the adapters to, an unwritten y [M T, out]), for kernels that write y at once.

    The frozen product is fresh, so that y may be its own memory; with M selections of one x it has
    T rows, and row p of y reads its row p mod T.
    """
    x, rows = call.x, call.top_k_index.shape[0]
    base = call.base
    if call.weight is not None:
        base = start_output(call._replace(top_k_index=call.top_k_index[: x.shape[0]]))
        if x.shape[0] == rows:
            return base, base
    return base, x.new_empty(rows, call.lora_B.shape[1])


def frozen_dx(call: Call, dy: Tensor) -> Tensor:
    """What the frozen linear sends to x, [T, in]: dy W, dy summed over selections that shared x."""
    x = call.x
    if call.weight is None:
        return torch.zeros_like(x)
    if dy.shape[0] != x.shape[0]:
        dy = dy.view(-1, x.shape[0], dy.shape[1]).sum(0)
    return dy @ call.weight.to(x.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without the call when it is: at one row, calls are what decoding costs."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


_NOTHING: AbstractContextManager[Any] = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Run in the dtypes at hand: the ops choose their own, and autocast would mix them again."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING

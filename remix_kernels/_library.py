"""The Triton backend as torch.library ops, for torch.compile: opaque, with fake and autograd.

Eager mode does not come this way: an op of the library costs about as much Python again as the
autograd Function over the same launchers. Here the backward pass makes the low-rank products anew
(one more read of x), since what a strategy keeps between passes has no shape a compiler could know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remix_kernels import ops
from remix_kernels._dispatch import resolve_strategy
from remix_kernels._routed import Call, Needs, Strategy, no_autocast


@torch.library.custom_op("remix_kernels::routed_fwd", mutates_args=())
def routed_fwd(
    strategy: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    number: float,
) -> Tensor:
    """y [M T, out] of a `Call`, whose weights are a tensor or else one number."""
    scale = number if top_k_weights is None else top_k_weights
    call = Call(x, weight, bias, base, lora_A, lora_B, top_k_index, scale)
    with no_autocast(x.device):
        return _strategy(strategy, call).run(call)


@routed_fwd.register_fake
def _(
    strategy: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    number: float,
) -> Tensor:
    return x.new_empty(top_k_index.shape[0], lora_B.shape[1])


@torch.library.custom_op("remix_kernels::routed_bwd", mutates_args=())
def routed_bwd(
    strategy: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    number: float,
    needs: list[bool],
) -> list[Tensor]:
    """dx, dlora_A, dlora_B, dweights; an empty tensor for each that is not needed."""
    scale = number if top_k_weights is None else top_k_weights
    call = Call(x, weight, None, None, lora_A, lora_B, top_k_index, scale)
    need = Needs(*needs)
    chosen = _strategy(strategy, call)
    with no_autocast(x.device):
        grads = chosen.backward(call, chosen.prepare(call, need.weights), dy, need)
    # Laid out as the fake says: lora_B's gradient may come transposed.
    return [
        x.new_empty(0) if grad is None or like is None else torch.empty_like(like).copy_(grad)
        for grad, like in zip(grads, (x, lora_A, lora_B, top_k_weights), strict=True)
    ]


@routed_bwd.register_fake
def _(
    strategy: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    number: float,
    needs: list[bool],
) -> list[Tensor]:
    likes = (x, lora_A, lora_B, top_k_weights)
    return [
        torch.empty_like(like) if need and like is not None else x.new_empty(0)
        for need, like in zip(needs, likes, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    strategy, x, weight, _, _, lora_A, lora_B, index, weights, number = inputs
    ctx.strategy, ctx.number = strategy, number
    ctx.save_for_backward(x, weight, lora_A, lora_B, index, weights)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, lora_A, lora_B, index, weights = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[1], needed[5], needed[6], needed[8]]
    grads = routed_bwd(
        ctx.strategy, dy, x, weight, lora_A, lora_B, index, weights, ctx.number, needs
    )
    dx, da, db, dw = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    dbase = dy if needed[4] else None
    return None, dx, None, None, dbase, da, db, None, dw, None


routed_fwd.register_autograd(_backward, setup_context=_setup)


def routed(call: Call, strategy: str) -> Tensor:
    """`Routed.apply` as a library op."""
    tensor = call.top_k_weights if isinstance(call.top_k_weights, Tensor) else None
    number = 0.0 if isinstance(call.top_k_weights, Tensor) else float(call.top_k_weights)
    return routed_fwd(strategy, *call[:7], tensor, number)


def _strategy(strategy: str, call: Call) -> Strategy:
    """Chosen when the op runs, by the shapes it then has."""
    name = resolve_strategy(
        strategy,
        call.top_k_index.shape[0],
        call.lora_A,
        call.lora_B,
        call.top_k_index.shape[1],
        call.x.dtype,
    )
    return ops.triton_strategies()[name]

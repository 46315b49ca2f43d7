"""How the router's gradient travels: two identity functions and one number between them.

The routed layer's output passes through `DeliverRouterGradient`, which holds the router's input,
logits and selection. After the forward pass the losses are known, and the advantages are written
into the shared state; the loss itself passes through `LossTap`. In the backward pass the tap hears
by what factor the loss was scaled (loss scale, accumulation, averaging over ranks) and each
layer's identity returns

    d router = grad_scale * sum_t advantage[t] * d log Q_t / d router

while the layer's own gradient goes through unchanged. Nothing is collected on the side during the
forward pass, so both kinds of activation checkpointing, DDP and FSDP see an ordinary parameter
gradient (ReMix section 3.2, estimator; delivery is ours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remix_kernels._routed import no_autocast
from remix_kernels.ops import selection_log_prob_bwd

if TYPE_CHECKING:
    from remix_model.routing import RoutingState


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class DeliverRouterGradient(torch.autograd.Function):
    """The identity on y that gives `router` its REINFORCE gradient; zeros when state is None."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        router: Tensor,
        logits: Tensor,
        index: Tensor,
        temperature: float,
        state: RoutingState | None,
    ) -> Tensor:
        ctx.state, ctx.temperature = state, temperature
        ctx.save_for_backward(x, router, logits, index)
        ctx.mark_dirty(y)  # nothing is written; unlike a view, y may be changed in place by others
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, router, logits, index = ctx.saved_tensors
        advantages = None if ctx.state is None else ctx.state.row_advantages(x.shape[:-1], x.device)
        if advantages is None:
            return dy, None, torch.zeros_like(router), None, None, None, None
        dx = None
        with no_autocast(dy.device):  # autocast may be on around loss.backward()
            rows = logits.view(-1, logits.shape[-1])
            chosen = index.view(-1, index.shape[-1])
            dlogits = selection_log_prob_bwd(rows, chosen, advantages)
            if ctx.temperature != 1.0:
                dlogits.div_(ctx.temperature)
            drouter = (dlogits.T @ x.reshape(-1, x.shape[-1]).float()).to(router.dtype)
            if ctx.needs_input_grad[1]:
                dx = (dlogits @ router.float()).view(x.shape).to(x.dtype)
        return dy, dx, drouter, None, None, None, None


class LossTap(torch.autograd.Function):
    """The identity on the loss: notes its gradient, and whose backward pass is running."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, state: RoutingState) -> Tensor:
        ctx.state = state
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.state.begin_backward(grad)
        return grad, None

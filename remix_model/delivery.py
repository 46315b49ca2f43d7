"""How the router's gradient travels: two identity functions and one number between them.

The routed layer's output passes through `DeliverRouterGradient`, which holds the router's input,
logits and selection. After the forward pass the losses are known, and the advantages are written
into the shared state; the loss itself passes through `LossTap`. In the backward pass the tap hears
by what factor the loss was scaled (loss scale, accumulation, averaging over ranks) and each
layer's identity returns

    d router = grad_scale * sum_t advantage[t] * d log Q_t / d router

(and, once, what forward-only selections have collected: eligibility.py) while the layer's own
gradient goes through unchanged. Nothing is collected on the side during the
forward pass, so both kinds of activation checkpointing, DDP and FSDP see an ordinary parameter
gradient (ReMix section 3.2, estimator; delivery is ours).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remix_kernels._routed import no_autocast

if TYPE_CHECKING:
    from remix_model.site import RoutingSite, Selection
    from remix_model.state import RoutingState


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class DeliverRouterGradient(torch.autograd.Function):
    """The identity on y that gives `router` its REINFORCE gradient; zeros when not sampled."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        router: Tensor,
        logits: Tensor,
        drawn: Tensor,
        site: RoutingSite,
        selection: Selection,
    ) -> Tensor:
        ctx.selection = selection.facts()
        ctx.site = site
        ctx.save_for_backward(x, router, logits, drawn)
        ctx.mark_dirty(y)  # nothing is written; unlike a view, y may be changed in place by others
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, router, logits, drawn = ctx.saved_tensors
        selection = replace(ctx.selection, drawn=drawn, logits=logits, x=x)
        drouter, dx = router_gradient(ctx.site, selection, router, ctx.needs_input_grad[1])
        return dy, dx, drouter, None, None, None, None


def router_gradient(
    site: RoutingSite, selection: Selection, router: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a router's parameter, and of its input, from one selection's advantages."""
    state, x, dx = selection.state, selection.x, None
    with no_autocast(router.device):  # autocast may be on around loss.backward()
        dlogits = None if state is None else state.dlogits(site, selection)
        if dlogits is None:
            drouter = torch.zeros_like(router)
        else:
            if selection.temperature != 1.0:
                dlogits = dlogits / selection.temperature
            rows = x.reshape(-1, x.shape[-1]).float()
            drouter, dx = site.router.gradient(dlogits, rows, router.float(), need_dx)
            dx = None if dx is None else dx.view(x.shape).to(x.dtype)
        collected = None if state is None else state.collected(site, drouter)
        if collected is not None:
            drouter = drouter + collected
    return drouter.to(router.dtype), dx


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

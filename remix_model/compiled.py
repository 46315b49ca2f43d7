"""Routing under torch.compile: what only a run knows, in ops that a compiler does not look into.

A compiler traces Python once and keeps its results. But the selections are others in every step,
and the advantages are not known when the backward pass is traced. So a layer that is compiled asks

    choose(x, router, site)                        ->  top_k_index, logits, state
    router_gradient(dy, x, router, ..., state)     ->  drouter, dx        (in the backward pass)

or, where weights are learned, and the graph has logits and weights of its own,

    choose_by_logits(logits, x, site)              ->  top_k_index, state
    regularizer_gradient(dlogits, ..., state)      ->  its part of dlogits    (likewise)

which call the layer's `RoutingSite`, and the `RoutingState` of that pass, when they run. Both go
through the graph as numbers in tensors on the CPU, so nothing about them is a constant: no step is
compiled anew, and layers may share a graph. `dy` is there so that the backward pass is not taken
for something that can be done before the loss is known.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from remix_model import delivery

if TYPE_CHECKING:
    from remix_model.site import RoutingSite
    from remix_model.state import RoutingState


class Numbered:
    """Living objects by number. None is 0; no number is used twice."""

    def __init__(self) -> None:
        """Start with none."""
        self._objects: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._next = count(1)

    def number(self, thing: Any) -> Tensor:
        """Its number, [] int64 on the CPU."""
        if thing is None:
            return torch.tensor(0, device="cpu")
        if thing not in self._numbers:
            self._numbers[thing] = next(self._next)
            self._objects[self._numbers[thing]] = thing
        return torch.tensor(self._numbers[thing], device="cpu")

    def find(self, number: Tensor) -> Any:
        """The object; None where it lives no more."""
        return self._objects.get(int(number))


SITES, STATES = Numbered(), Numbered()
NOT_SAMPLED = STATES.number(None)


def is_top_k_only(site: RoutingSite, training: bool) -> bool:
    """Whether nothing draws, forces, records, or may be recomputed: what a compiler guards on."""
    return (
        site.state is None
        and not site.router.random
        and site.forced is None
        and not site.records
        and site.replaying is None
        and site.last[training] is None
        and site.last_forced[training] is None
    )


# Seeded, so that two equal calls are not taken for one, and none is left out or repeated.
@torch.library.custom_op(
    "remix_model::choose", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def choose(
    x: Tensor, router: Tensor, site: Tensor, num_experts: int, top_k: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(top_k_index [..., k] int32, logits [..., n] fp32, number of the state: 0 if not sampled)."""
    selection = SITES.find(site).select_now(x, router, training)
    # Cloned: what the state keeps must not lie in memory that the compiled graph uses again.
    index = selection.index.to(torch.int32, copy=True)
    return index, selection.logits, STATES.number(selection.state)


@choose.register_fake
def _(
    x: Tensor, router: Tensor, site: Tensor, num_experts: int, top_k: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:-1]
    logits = x.new_empty((*lead, num_experts), dtype=torch.float32)
    return x.new_empty((*lead, top_k), dtype=torch.int32), logits, torch.empty_like(site)


@torch.library.custom_op("remix_model::router_gradient", mutates_args=())
def router_gradient(
    dy: Tensor,
    x: Tensor,
    router: Tensor,
    logits: Tensor,
    top_k_index: Tensor,
    state: Tensor,
    site: Tensor,
    training: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """(drouter [n, in], dx like x; empty if not needed)."""
    found: RoutingSite = SITES.find(site)
    sampled = STATES.find(state)
    if sampled is None and training:
        found.warn_untrained()
    selection = found.selection(top_k_index, logits, x, x, sampled)
    drouter, dx = delivery.router_gradient(found, selection, router, need_dx)
    return drouter, x.new_empty(0) if dx is None else dx


@router_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    router: Tensor,
    logits: Tensor,
    top_k_index: Tensor,
    state: Tensor,
    site: Tensor,
    training: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(router), torch.empty_like(x) if need_dx else x.new_empty(0)


class DeliverWhenRun(torch.autograd.Function):
    """`DeliverRouterGradient` for a compiler: tensors and facts, no objects."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        router: Tensor,
        logits: Tensor,
        top_k_index: Tensor,
        state: Tensor,
        site: Tensor,
        training: bool,
    ) -> Tensor:
        ctx.training = training
        ctx.save_for_backward(x, router, logits, top_k_index, state, site)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dx = ctx.needs_input_grad[1]
        drouter, dx = router_gradient(dy, *ctx.saved_tensors, ctx.training, need_dx)
        return dy, dx if need_dx else None, drouter, None, None, None, None, None


@torch.library.custom_op(
    "remix_model::choose_by_logits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def choose_by_logits(
    logits: Tensor, x: Tensor, site: Tensor, top_k: int, training: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    """(top_k_index [..., k] int32, number of the state: 0 if not sampled), of learned weights."""
    selection = SITES.find(site).choose_now(logits, x, training, trained)
    return selection.index.to(torch.int32, copy=True), STATES.number(selection.state)


@choose_by_logits.register_fake
def _(
    logits: Tensor, x: Tensor, site: Tensor, top_k: int, training: bool, trained: bool
) -> tuple[Tensor, Tensor]:
    index = logits.new_empty((*logits.shape[:-1], top_k), dtype=torch.int32)
    return index, torch.empty_like(site)


@torch.library.custom_op("remix_model::regularizer_gradient", mutates_args=())
def regularizer_gradient(
    dlogits: Tensor, logits: Tensor, top_k_index: Tensor, state: Tensor, site: Tensor
) -> Tensor:
    """What the terms beside the loss add to dlogits [..., n]; zeros where there are none."""
    found: RoutingSite = SITES.find(site)
    sampled: RoutingState | None = STATES.find(state)
    pull = None
    if sampled is not None and sampled.is_regularized(found):
        selection = found.selection(top_k_index, logits, logits, logits, sampled)
        pull = sampled.regularizer_gradient(found, selection)
    return torch.zeros_like(dlogits) if pull is None else pull.view_as(dlogits).to(dlogits)


@regularizer_gradient.register_fake
def _(dlogits: Tensor, logits: Tensor, top_k_index: Tensor, state: Tensor, site: Tensor) -> Tensor:
    return torch.empty_like(dlogits)


class RegularizeWhenRun(torch.autograd.Function):
    """`AddRegularizer` for a compiler: tensors and facts, no objects."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k_index: Tensor, state: Tensor, site: Tensor
    ) -> Tensor:
        ctx.save_for_backward(logits, top_k_index, state, site)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        return dlogits + regularizer_gradient(dlogits, *ctx.saved_tensors), None, None, None

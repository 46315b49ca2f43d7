"""Sites whose routers weigh the experts they choose: the weights carry the loss's gradient.

Nothing is drawn: in training as after it, a row takes the k largest, each times a weight that is a
function of its logits, and autograd does the rest. So a recomputation by activation checkpointing
needs no saved draw, and a plain backward pass trains the router. What only the loss's own backward
pass can know (its scale, which rows are padding) is the load-balancing term's: inside
`sample_routing` the logits pass through an identity that adds its gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remix_model.compiled import RegularizeWhenRun, choose_by_logits, is_top_k_only
from remix_model.delivery import in_backward
from remix_model.granularity import pool, spread_over
from remix_model.routers import Router
from remix_model.site import RoutingSite, Selection

if TYPE_CHECKING:
    from remix_model.state import RoutingState

NO_BALANCE = (
    "routers of type {kind!r} are being trained outside sample_routing: they learn from the loss, "
    "but the load-balancing term of weight {coef} is left out. Use ReMixTrainer or "
    "ReMixSFTTrainer, open sample_routing(model, num_selections=1, seed=0) around the forward "
    "pass, or set router_kwargs={{'load_balancing_coef': 0}} if that is what you want."
)


class LearnedSite(RoutingSite):
    """Chooses the experts of one layer's rows, and weighs them."""

    def __init__(
        self, router: Router, temperature: float = 1.0, *, detached: bool = True, **kwargs: Any
    ) -> None:
        """As RoutingSite; `detached` is a policy's, and the router's own option counts here."""
        detached = bool(router.kwargs.get("detach_input", False))
        super().__init__(router, temperature, detached=detached, **kwargs)

    def is_idle(self) -> bool:
        """Never: the short way of decoding knows constant weights only."""
        return False

    def policy_is_trained(self) -> bool:
        """There is no policy."""
        return False

    def _temperature(self, state: RoutingState | None) -> float:
        """Never the sampled policy's: weights are the same in training as after it."""
        return self.temperature

    def _select_compiled(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """Traced once: weights are the graph's, and an op chooses what they are for."""
        if self.per_sequence:
            return self._select_eagerly(x, router, training)
        is_warned_of = training and _is_trained(router) and self._balance() > 0
        if is_top_k_only(self, training) and not is_warned_of:
            return self._weigh(x, x, router, None, None)
        logits = self._logits(x, router, self.temperature)
        index, number = choose_by_logits(
            logits.detach(), x.detach(), self.number, self.top_k, training, _is_trained(router)
        )
        facts = Selection(index, index, logits.detach(), x.detach(), None, self.temperature, False)
        if logits.requires_grad:
            logits = RegularizeWhenRun.apply(logits, index, number, self.number)
        return self._with_weights(facts, self.router.weights(logits, index), x)

    def choose_now(self, logits: Tensor, x: Tensor, training: bool, trained: bool) -> Selection:
        """What a compiled pass has to use, as the run finds things; and who hears of it."""
        state, forced, _ = self._given(x, training)
        drawn = self._drawn(logits, state, forced)
        selection = self.selection(drawn, logits, x, x, state)
        if not in_backward():
            if trained and training and state is None:
                self._warn_of_balance()
            self.tell(self._with_weights(selection, self.router.weights(logits, drawn), x))
        return selection

    def select_now(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """`select` as the run finds things; x is detached where it should be."""
        if not in_backward():
            decided = self._decided()
            if decided is not None:
                self.replaying = self.last[training] = None
                return self._repeated(decided, x)
        state, forced, prompt = self._given(x, training)
        seen = pool(x, prompt, self.name) if self.per_sequence else x
        selection = self._weigh(seen, x, router, state, forced)
        if not in_backward():
            if training and state is None and _is_trained(router):
                self._warn_of_balance()
            self.tell(selection)
            if state is None and self.sequence_pass is not None:
                self.sequence_pass.note(self, (selection.drawn, selection.drawn_weights))
        return selection

    def _given(
        self, x: Tensor, training: bool
    ) -> tuple[RoutingState | None, Tensor | None, Tensor | None]:
        """(state, forced experts, prompt) of this pass, or of the one that it recomputes."""
        if not in_backward():
            self.replaying = None
            state = self.last[training] = self.state
            forced = self.last_forced[training] = self.forced
            prompt = self.last_prompt[training] = self._prompt(state)
            return state, forced, prompt
        self.check_whose()
        self.replayed = True
        state = self.replaying or self.last[training]
        if state is None:
            return None, self.last_forced[training], self.last_prompt[training]
        # What was forced then, whatever ran since.
        saved = [i for i in state.drawn_at(self) if self._is_of(i, x, state)]
        return state, self._only(saved) if saved else None, self._prompt(state)

    def _decided(self) -> tuple[Tensor, Tensor] | None:
        """While decoding a routed sequence: what the prefill chose, and how it weighed that."""
        if not self.per_sequence or self.state is not None or self.sequence_pass is None:
            return None
        return self.sequence_pass.decided(self)

    def _drawn(self, logits: Tensor, state: RoutingState | None, forced: Tensor | None) -> Tensor:
        """The forced experts, else the k largest."""
        if forced is None:
            return self._top_k(logits)
        return self._forced(forced, logits, None if state is None else state.folded_pass())

    def _weigh(
        self,
        seen: Tensor,
        x: Tensor,
        router: Tensor | None,
        state: RoutingState | None,
        forced: Tensor | None,
    ) -> Selection:
        """The selection of x's rows, from what the router sees."""
        logits = self._logits(seen, router, self._temperature(state))
        with torch.no_grad():
            drawn = self._drawn(logits, state, forced)
        facts = self.selection(drawn, logits.detach(), seen.detach(), x, state)
        if state is not None and logits.requires_grad and state.is_regularized(self):
            logits = AddRegularizer.apply(logits, drawn, self, facts)
        weights = self.router.weights(logits, drawn)
        return self._with_weights(facts, weights, x)

    def _with_weights(self, facts: Selection, weights: Tensor, x: Tensor) -> Selection:
        spread = spread_over(weights, x.shape[:-1]) if self.per_sequence else weights
        return replace(facts, weights=spread, drawn_weights=weights)

    def _repeated(self, decided: tuple[Tensor, Tensor], x: Tensor) -> Selection:
        """While decoding: the prefill's decision."""
        drawn, weights = decided
        return self._with_weights(self._decoded(drawn, x), weights, x)

    def deliver(
        self, y: Tensor, router: Tensor | None, selection: Selection, training: bool
    ) -> Tensor:
        """The weights bring the router its gradient."""
        return y

    def _balance(self) -> float:
        coef: float = self.router.kwargs.get("load_balancing_coef", 0.0)
        return coef

    def _warn_of_balance(self) -> None:
        coef = self._balance()
        if coef:
            self.warn_untrained(NO_BALANCE.format(kind=self.router.name, coef=coef))


def _is_trained(router: Tensor | None) -> bool:
    return router is not None and router.requires_grad and torch.is_grad_enabled()


class AddRegularizer(torch.autograd.Function):
    """The identity on logits, to whose gradient that of the terms beside the loss is added."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, drawn: Tensor, site: LearnedSite, selection: Selection
    ) -> Tensor:
        ctx.facts = selection.facts()
        ctx.site = site
        ctx.save_for_backward(logits, drawn)
        return logits.view_as(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        logits, drawn = ctx.saved_tensors
        facts = replace(ctx.facts, logits=logits, drawn=drawn)
        pull = facts.state.regularizer_gradient(ctx.site, facts)
        if pull is not None:
            dlogits = dlogits + pull.view_as(dlogits)
        return dlogits, None, None, None

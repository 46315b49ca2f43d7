"""`RoutingState`: one sampled pass, from the batch to the routers' gradient.

It repeats the batch, owns the seed and the drawn selections, turns losses into advantages, and
stays with the model after the context has closed, for the backward pass, until the next context
opens. `parts` cuts the M selections where memory wants it; `add` takes a part's losses; `loss`
closes the account.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from remix_kernels.ops import selection_log_prob_bwd
from remix_model.batch import FoldedPass, fold
from remix_model.delivery import LossTap
from remix_model.eligibility import Eligibility
from remix_model.held import HeldGradients
from remix_model.ledger import Ledger
from remix_model.options import SamplingOptions
from remix_model.parallel import SelectionGroup
from remix_model.parts import Part
from remix_model.random_state import get_random_state, random_state
from remix_model.regularize import regularizer_grad
from remix_model.site import RoutingSite, Selection


class RoutingState:
    """M selections of a batch of B sequences. Made by `sample_routing`."""

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, RoutingSite],
        options: SamplingOptions,
        seed: int,
        group: SelectionGroup,
    ) -> None:
        """Start with nothing drawn; see `sample_routing` for the arguments."""
        self.options = options
        self.group = group
        self.num_selections = options.num_selections
        self.grad_selections = group.grad_selections  # on this rank
        self.unordered = options.log_prob == "unordered"
        self.temperature = options.temperature
        self.seed = seed
        self.sites = list(sites.values())
        self.streams = {id(site): stream for stream, site in enumerate(self.sites)}
        self.folded: FoldedPass | None = None  # the pass that runs, or ran last
        self.selections: dict[int, list[Tensor]] = {}  # by stream, of the part that runs
        self.losses: Tensor | None = None  # [M, B], divided by N, for logging
        self.advantages: Tensor | None = None  # [c B, T or 1], of the part that has a graph
        self.part: Part | None = None
        self._awaiting = False  # a part was entered, and its losses are not known
        self._model = model
        plan = options.plan(
            detached=all(site.detached for site in self.sites),
            checkpointed=self.grad_selections < group.num_selections
            and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
            ranks=group.size,
        )
        self._plan = group.place(plan)
        self._eligibility: Eligibility | None = None
        self._held: HeldGradients | None = None
        self._ledger = Ledger(options, group)
        self._graph: Tensor | None = None  # what the last part's backward pass goes through
        self._num_items_scale: Tensor | float = 1.0
        self._grad_scale: Tensor | float = 1.0
        self._delivering = False
        self._delivered: set[int] = set()
        self._logit_sums: dict[str, Tensor] = {}  # by layer: a number if its router saw numbers
        self._grad_mode: bool | None = None

    # The batch --------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        """B; None before a batch is known."""
        return None if self.folded is None else self.folded.batch_size

    @property
    def pass_selections(self) -> int:
        """c, the selections folded into the pass that runs."""
        return self.num_selections if self.folded is None else self.folded.count

    @property
    def folded_batch_size(self) -> int:
        """c * B, the sequences of the folded batch."""
        return self.folded_pass().sequences

    def folded_pass(self) -> FoldedPass:
        """The pass that runs, or ran last.

        Raises:
            RuntimeError: None has been entered.
        """
        if self.folded is None:
            raise RuntimeError(
                "the batch size is not known yet: call routing.expand(batch) and run the model on "
                "what it returns"
            )
        return self.folded

    def expand(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Repeat a batch M times, selection-major: row m * B + b is input b under selection m.

        Args:
            batch: Tensors [B, ...] by name, other values pass through. `attention_mask` [B, T]
                tells real tokens from padding; without it all positions count.
                logprob_tokens="response" and sequence routing also need `labels`.

        Returns:
            A new dict with tensors [M * B, ...].

        Raises:
            ValueError: No tensor, batch sizes that differ, packed sequences, or labels missing.
            RuntimeError: The selections are to run in parts.
        """
        if len(self._plan) > 1:
            raise RuntimeError(
                f"grad_selections={self.options.grad_selections}, selection_chunk_size="
                f"{self.options.selection_chunk_size}: the selections run in {len(self._plan)} "
                "parts. Write `for part in routing.parts(batch): routing.add(losses of model("
                "**part), mask)`, then loss = routing.loss()"
            )
        return self._enter(self._plan[0], batch)

    def parts(self, batch: Mapping[str, Any], loss_scale: float = 1.0) -> Iterator[dict[str, Any]]:
        """Repeat a batch a part at a time; call `add` with the losses of each.

            for part in routing.parts(batch):
                routing.add(token_losses_of(model(**part)), mask_of(part))
            loss = routing.loss()

        Forward-only parts come first, and run without gradients. With a DDP model, gradients are
        only reduced for the last.

        Args:
            batch: As in `expand`.
            loss_scale: What the losses of parts that are backpropagated before the last are
                multiplied by meanwhile: fp16's loss scale.

        Yields:
            Dicts with tensors [c * B, ...], c the selections of the part.

        Raises:
            RuntimeError: `add` was not called for a part.
        """
        if self._held is not None:
            raise RuntimeError(
                "routing.parts was begun in this context before, and what ran then would count "
                "twice: open another context"
            )
        self._held = HeldGradients(
            (p for p in self._model.parameters() if p.requires_grad), loss_scale
        )
        self._grad_mode = torch.is_grad_enabled()
        # Where dropout's random numbers began: a part that is run again has to draw the same.
        noise: dict[int, list[Tensor]] = {}
        reruns = any(part.rerun for part in self._plan)
        try:
            for part in self._plan:
                torch.set_grad_enabled(self._grad_mode and part.grad)
                with ExitStack() as stack:
                    if part.rerun:
                        stack.enter_context(random_state(noise[part.first]))
                    elif reruns:
                        noise[part.first] = get_random_state()
                    if part.grad and not part.last and hasattr(self._model, "no_sync"):
                        stack.enter_context(self._model.no_sync())  # type: ignore[operator]
                    yield self._enter(part, batch)
                    if self._awaiting:
                        raise RuntimeError(
                            f"selections {part.first} to {part.first + part.count - 1} have no "
                            "losses: call routing.add once for every part"
                        )
        finally:
            self.close()

    def close(self) -> None:
        """The context is left, or the parts are through: gradients are as they were before."""
        if self._grad_mode is not None:
            torch.set_grad_enabled(self._grad_mode)
            self._grad_mode = None

    def _enter(self, part: Part, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.losses is not None:
            raise RuntimeError(
                "this context has one loss already: open another one for the next batch"
            )
        self.folded = folded = FoldedPass.of(
            batch,
            part,
            self.num_selections,
            response_only=self.options.logprob_tokens == "response",
            per_sequence=any(site.per_sequence for site in self.sites),
        )
        self.part = part
        self._awaiting = True
        if len(self._plan) > 1:
            self.selections = {}
        self.advantages = None
        self._logit_sums.clear()
        if self._eligibility is None:
            self._eligibility = Eligibility(folded.batch_size, self.options.credit_blocks)
            self.group.note(batch, self.seed)
        return fold(batch, folded.batch_size, part.count)

    # The losses -------------------------------------------------------------------------------

    def add(self, token_losses: Tensor, mask: Tensor | None = None) -> None:
        """The losses of the part that has just run.

        Args:
            token_losses: [c * B, T or T - 1], column t the loss predicted from position t; or [c *
                B], one loss a sequence.
            mask: Same shape as token_losses, nonzero where a loss counts. None: everywhere.

        Raises:
            ValueError: A shape does not fit the folded batch or the credit.
            NonFiniteError: A loss is nan or infinite; the message names the first layer whose
                router saw it.
            RuntimeError: No part is running.
        """
        part = self.part
        if part is None or not self._awaiting:
            raise RuntimeError(
                "there is no pass whose losses these could be: call routing.expand(batch), or "
                "loop over routing.parts(batch), and run the model on what they return"
            )
        losses = self._ledger.enter(part, token_losses, mask, self.folded_batch_size)
        detached = losses.detach()
        self._ledger.check_finite(part, detached, self._logit_sums)
        if part.collect:
            assert self._eligibility is not None
            self._eligibility.absorb(self._ledger.spread(detached))
        if part.last:
            self._graph = losses.sum() / self.grad_selections
        elif part.grad and losses.requires_grad:
            self._backward_now(part, losses.sum() / self.grad_selections)
        self._awaiting = False

    def loss(
        self,
        token_losses: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        """The loss to call backward on: LoRA gets the mean over selections, the router RLOO.

        Args:
            token_losses: As in `add`, of the one pass of `expand`; None when all parts were added.
            mask: As in `add`.
            num_items: The normaliser N: labelled tokens (or sequences) of the un-replicated batch,
                over the whole gradient accumulation. None: counted from the mask.

        Returns:
            Scalar: sum over counted losses / (N M). Its backward pass delivers both gradients,
            inside or after the context.

        Raises:
            ValueError: A shape does not fit the folded batch, or nothing counts (where num_items
                is counted on a GPU, the loss is 0 instead: looking would stall it).
            NonFiniteError: As in `add`.
            RuntimeError: The context has a loss already, or parts are missing.
        """
        if self.losses is not None:
            raise RuntimeError(
                "this context has one loss already, and the router is told one advantage for each "
                "selection: add the token losses up before routing.loss, or open another context"
            )
        if token_losses is not None:
            self.add(token_losses, mask)
        ledger, graph, part = self._ledger, self._graph, self.part
        self._graph = None  # or state and graph would keep each other alive
        if graph is None or ledger.labels is None or part is None:
            raise RuntimeError(
                f"{len(ledger)} of {self.num_selections} selections have losses: call routing.add "
                "for every part of routing.parts(batch), or give routing.loss the losses of "
                "routing.expand(batch)"
            )
        items = ledger.labels if num_items is None else num_items
        on_device = torch.is_tensor(items) and items.device.type != "cpu"
        if not on_device and float(items) <= 0:  # on a device that would be a synchronisation
            raise ValueError(f"num_items={float(items)}: no loss counts; is everything masked?")
        self._num_items_scale = 1.0 if num_items is None else ledger.unit / num_items
        with torch.no_grad():
            self.losses = ledger.sequences() * self._num_items_scale
            self.advantages = ledger.advantages(part) * self._num_items_scale
            mean = self.losses.sum() / self.num_selections
        loss = graph * self._num_items_scale
        if len(self._plan) > 1 or self.group.size > 1:  # the value of all, the gradient of some
            loss = loss + (mean - loss.detach())
        for site in self.sites:
            site.forget(self)
        return LossTap.apply(loss, self)

    def _backward_now(self, part: Part, loss: Tensor) -> None:
        if self._held is None:
            raise RuntimeError("a part of routing.parts was added outside its loop")
        if part.rerun:
            with torch.no_grad():
                self.advantages = self._ledger.advantages(part)
        self._held.backward(LossTap.apply(loss, self))
        self.advantages = None

    # The backward pass -------------------------------------------------------------------------

    def begin_backward(self, grad_scale: Tensor) -> None:
        """From here to the end of this backward pass, recomputations replay this state."""
        self._grad_scale = grad_scale.detach()
        self._delivering = True
        self._delivered.clear()
        for site in self.sites:
            site.begin_backward(self, torch._C._current_graph_task_id())
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        assert self.part is not None
        if self._held is not None and self.part.last:
            self._held.begin(self._grad_scale * self._num_items_scale)

    def _end_backward(self) -> None:
        self._delivering = False
        if self._held is not None:  # after the callbacks that are queued: FSDP2 waits for gradients
            torch.autograd.Variable._execution_engine.queue_callback(self._held.end)
        for site in self.sites:
            site.end_backward()

    def abort_backward(self) -> None:
        """No backward pass runs any more: what one that raised has left is taken away."""
        self._delivering = False
        if self._held is not None:
            self._held.drop_hooks()

    def drawn_at(self, site: RoutingSite) -> list[Tensor]:
        """The selections that a site drew in this state, one a forward pass."""
        stream = self.streams.get(id(site))
        return [] if stream is None else self.selections.get(stream, [])

    def note(self, site: RoutingSite, selection: Selection) -> None:
        """A site has drawn. `selection` holds what its score needs."""
        self._logit_sums.setdefault(site.name, selection.logits.sum())
        if site.router.learned and site.forced is None:  # nothing was drawn
            return
        stream = self.streams[id(site)]
        self.selections.setdefault(stream, []).append(selection.drawn)
        if self.part is None or not self.part.collect or not site.policy_is_trained():
            return
        assert self._eligibility is not None
        lead = selection.drawn.shape[:-1]
        weights = selection.logits.new_ones(lead.numel())
        counted = self._counted(selection)
        if counted is not None:
            weights = weights * counted
        dlogits = self._score(selection, weights).div_(selection.temperature)
        rows = (self.folded_batch_size, -1)
        self._eligibility.collect(
            stream,
            dlogits.view(*rows, dlogits.shape[-1]),
            selection.x.detach().reshape(*rows, selection.x.shape[-1]),
        )

    def dlogits(self, site: RoutingSite, selection: Selection) -> Tensor | None:
        """The gradient of a selection's logits, flattened to [rows, n]; None outside a backward.

        It is of z over the temperature, as `selection.logits` are.
        """
        if not self._delivering:
            return None
        total = self.regularizer_gradient(site, selection)
        if self.advantages is not None:
            counted = self._counted(selection)
            weights = self._row_advantages(selection) * self._grad_scale
            weights = weights if counted is None else weights * counted.to(weights)
            score = self._score(selection, weights.to(selection.logits.device))
            total = score if total is None else score + total
        return total

    def regularizer_gradient(self, site: RoutingSite, selection: Selection) -> Tensor | None:
        """The part of `dlogits` that comes from the terms beside the loss."""
        entropy_coef, load_balancing_coef = self._coefs(site)
        if not self._delivering or not (entropy_coef or load_balancing_coef):
            return None
        assert self.part is not None
        counted = self._counted(selection)
        scale = self._grad_scale * self._num_items_scale
        share = scale * self.part.count / self.grad_selections / len(self.sites)
        rows = (self.part.count, -1)
        pull = regularizer_grad(
            selection.logits.reshape(*rows, selection.logits.shape[-1]),
            selection.drawn.reshape(*rows, selection.drawn.shape[-1]),
            None if counted is None else counted.view(rows),
            entropy_coef,
            load_balancing_coef,
        ).flatten(0, 1)
        return pull * torch.as_tensor(share).to(pull)

    def is_regularized(self, site: RoutingSite) -> bool:
        """Whether a site's router is trained on terms beside the loss."""
        return any(self._coefs(site))

    def _coefs(self, site: RoutingSite) -> tuple[float, float]:
        """Of entropy and load: what was asked for, else what the type of router brings along."""
        own: float = site.router.kwargs.get("load_balancing_coef", 0.0)
        return self.options.router_entropy_coef, self.options.load_balancing_coef or own

    def collected(self, site: RoutingSite, like: Tensor) -> Tensor | None:
        """The router's gradient of the selections without a graph; once in a backward pass."""
        part, stream = self.part, self.streams.get(id(site))
        if not self._delivering or part is None or not part.last or stream is None:
            return None
        baseline = self._ledger.baseline
        if self._eligibility is None or baseline is None or stream in self._delivered:
            return None
        self._delivered.add(stream)
        total = self._eligibility.gradient(stream, baseline, self._ledger.scale)
        if total is None:
            return None
        scale = torch.as_tensor(self._grad_scale * self._num_items_scale)
        return (total * scale.to(total)).to(like.device)

    def _score(self, selection: Selection, weights: Tensor) -> Tensor:
        """weights [rows] times d log Q / d logits [rows, n]."""
        logits, drawn = selection.logits, selection.drawn
        return selection_log_prob_bwd(
            logits.reshape(-1, logits.shape[-1]),
            drawn.reshape(-1, drawn.shape[-1]),
            weights,
            unordered=self.unordered,
        )

    def _counted(self, selection: Selection) -> Tensor | None:
        """[rows] of a layer: whether a decision counts; None: all do."""
        if selection.per_sequence:
            return None
        folded = self.folded_pass()
        folded.positions(selection.drawn.shape[:-1])
        return None if folded.counted is None else folded.counted.to(selection.logits.device)

    def _row_advantages(self, selection: Selection) -> Tensor:
        """[rows] of a layer."""
        assert self.advantages is not None
        if selection.per_sequence:
            return self.advantages[:, 0]
        return self.folded_pass().rows_of(self.advantages, selection.drawn.shape[:-1])

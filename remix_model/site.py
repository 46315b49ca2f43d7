"""What one routed layer knows about routing: the site where experts are chosen.

A site is a plain object beside the layer's parameters. Contexts (`sample_routing`,
`force_selection`, `record_routing`) reach every site of a model through `find_sites`; the layer
asks its own site `select(x, ...)` for the experts of each row and passes its output through
`deliver`.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_kernels import RoutedShape, sample_top_k
from remix_kernels._routed import cast, no_autocast
from remix_model.compiled import NOT_SAMPLED, SITES, DeliverWhenRun, choose, is_top_k_only
from remix_model.delivery import DeliverRouterGradient, in_backward
from remix_model.forced import spread_forced
from remix_model.granularity import SequencePass, pool, spread_over
from remix_model.nonfinite import check_chosen
from remix_model.random_state import mix_seed
from remix_model.replay import Replayed
from remix_model.routers import Router

if TYPE_CHECKING:
    from remix_model.batch import FoldedPass
    from remix_model.sharing import SharedSelection
    from remix_model.state import RoutingState
    from remix_model.stats import SiteRecord

UNTRAINED_ROUTER = (
    "a ReMix model is being trained outside sample_routing: the adapters learn, the router does "
    "not (its gradient is zero). Use ReMixTrainer or ReMixSFTTrainer, open sample_routing around "
    "the forward pass, or freeze the routers if that is what you want."
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The experts of a layer's rows, and what the router's gradient will need."""

    index: Tensor  # [..., k] int32 or int64, for every row
    drawn: Tensor  # [..., k] for every decision: the same, or [B, k] where sequences are routed
    logits: Tensor  # [..., n] fp32 for every decision, divided by the temperature
    x: Tensor  # [..., in] for every decision
    state: RoutingState | None  # None: not sampled
    temperature: float
    per_sequence: bool
    number: Tensor | None = None  # compiled: of the state, which only the run knows
    # Learned, before LoRA's scaling: [..., k] fp32 for every row, and for every decision.
    weights: Tensor | None = None
    drawn_weights: Tensor | None = None

    def facts(self) -> Selection:
        """Without its tensors, which autograd has to save itself."""
        empty = self.drawn.new_empty(0)
        return replace(self, index=empty, drawn=empty, logits=empty, x=empty)


class RoutingSite(Replayed):
    """Chooses the experts of one layer's rows: drawn, forced, replayed, or the top k."""

    def __init__(
        self,
        router: Router,
        temperature: float = 1.0,
        *,
        detached: bool = True,
        per_sequence: bool = False,
    ) -> None:
        """Describe the pool.

        Args:
            router: How experts are scored; knows n and k.
            temperature: The policy's.
            detached: Whether the router's gradient stops at the router.
            per_sequence: One decision for a sequence rather than one for each row.
        """
        super().__init__()
        self.router = router
        self.num_experts = router.num_experts
        self.top_k = router.top_k  # more in a dense start
        self.whole_blocks = router.whole_blocks
        self.temperature = temperature
        self.detached = detached
        self.per_sequence = per_sequence
        self.sequence_pass: SequencePass | None = None
        self.shared: SharedSelection | None = None  # with the other linears of a block
        self.name = ""
        self.stream = 0
        self.state: RoutingState | None = None  # inside sample_routing
        self.forced: Tensor | None = None
        self.records: list[SiteRecord] = []
        self.recorded: SiteRecord | None = None  # by the last record_routing
        self.router_weight: Tensor | None = None  # the parameter, to ask whether it is trained
        self.warned: list[bool] = [False]  # shared by the sites of one model
        self.number = SITES.number(self)  # by which a compiled graph finds it

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingSite:
        """A copy of the layer starts with no context and no saved selections."""
        copied = type(self)(
            self.router,
            self.temperature,
            detached=self.detached,
            per_sequence=self.per_sequence,
        )
        copied.warned = memo.setdefault(-id(self.warned), [False])  # one flag for the copies too
        copied.sequence_pass = deepcopy(self.sequence_pass, memo)
        copied.shared = deepcopy(self.shared, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled likewise."""
        kept = {name: getattr(self, name) for name in ("warned", "sequence_pass", "shared")}
        kept |= {"detached": self.detached, "per_sequence": self.per_sequence}
        return type(self), (self.router, self.temperature), kept

    def is_idle(self) -> bool:
        """Whether a pass is the plain top k: nothing draws, forces, records, shares, recomputes."""
        return (
            self.state is None
            and self.forced is None
            and not self.records
            and self.router.linear
            and self.temperature == 1.0
            and not self.per_sequence
            and self.shared is None
            and not in_backward()
        )

    def policy_is_trained(self) -> bool:
        """Whether the layer's router takes a gradient by RLOO."""
        return self.router_weight is not None and self.router_weight.requires_grad

    def select(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """The experts of every row of x.

        Args:
            x: [..., in].
            router: The router's parameter, [n, in] for most types; None where it has none.
            training: The layer's mode, under which the pass is remembered for recomputation.

        Raises:
            ValueError: x has another width, or does not fit the folded batch or a forced index.
            RuntimeError: Recomputed, and it cannot be told which pass this repeats.
        """
        wanted = None if router is None else self.router.parameter_shape(x.shape[-1])
        if router is not None and (wanted is None or tuple(wanted) != tuple(router.shape)):
            raise ValueError(
                f"{self.name or 'a routed layer'} got x {list(x.shape)}, of another width than its "
                f"router's parameter, {list(router.shape)}, was made for"
            )
        if self.detached:
            x = x.detach()
        if torch.compiler.is_compiling():
            selection = self._select_compiled(x, router, training)
        else:
            self.router_weight = router
            selection = self.select_now(x, router, training)
        if self.shared is not None:
            self.shared.put(selection)
        return selection

    def _select_compiled(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """Traced once: what depends on more than x is left to an op, or to Python."""
        if self.per_sequence or router is None:
            return self._select_eagerly(x, router, training)
        if is_top_k_only(self, training):
            with torch.no_grad():
                logits = self._logits(x, router, self.temperature)
                index = self._top_k(logits)
            number = NOT_SAMPLED if training else None
        elif not self.router.linear:  # whose gradient is autograd's, which an op is beneath
            return self._select_eagerly(x, router, training)
        else:
            index, logits, number = choose(
                x.detach(), router.detach(), self.number, self.num_experts, self.top_k, training
            )
        return Selection(index, index, logits, x, None, self.temperature, False, number)

    @torch.compiler.disable
    def _select_eagerly(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        return self.select_now(x, router, training)

    def select_now(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """`select` as the run finds things; x is detached where it should be."""
        if in_backward():
            return self._recompute(x, router, training)
        self.replaying = None  # a forward pass outside a backward pass: none is running
        state = self.last[training] = self.state
        if self.per_sequence and state is None and self.sequence_pass is not None:
            decided = self.sequence_pass.decided(self)
            if decided is not None:
                return self._decoded(decided, x)
        prompt = self._prompt(state)
        self.last_prompt[training] = prompt
        seen, logits = self._read(x, router, state, prompt)
        with torch.no_grad():
            if state is None:
                drawn = self._choose(logits)
                self.last_forced[training] = None if self.forced is None else drawn
            else:
                drawn = self._draw(logits, state)
            selection = self.selection(drawn, logits, seen, x, state)
            if state is None and self.sequence_pass is not None:
                self.sequence_pass.note(self, drawn)
            self.tell(selection)
        return selection

    def tell(self, selection: Selection) -> None:
        """A pass has chosen, which is no recomputation: the state and the records hear of it."""
        state = selection.state
        if state is not None:
            state.note(self, selection)
        again = state is not None and state.part is not None and state.part.rerun
        for record in [] if again else self.records:
            record.add(selection)

    def _prompt(self, state: RoutingState | None) -> Tensor | None:
        if not self.per_sequence:
            return None
        if state is not None:
            return state.folded_pass().prompt
        return None if self.sequence_pass is None else self.sequence_pass.prompt()

    def _read(
        self, x: Tensor, router: Tensor | None, state: RoutingState | None, prompt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the router reads and its logits, one row for a decision."""
        seen = pool(x, prompt, self.name) if self.per_sequence else x
        with torch.no_grad():
            return seen, self._logits(seen, router, self._temperature(state))

    def _temperature(self, state: RoutingState | None) -> float:
        return self.temperature if state is None else self.temperature * state.temperature

    def selection(
        self, drawn: Tensor, logits: Tensor, seen: Tensor, x: Tensor, state: RoutingState | None
    ) -> Selection:
        """What was chosen from `seen`, for the rows of x."""
        index = spread_over(drawn, x.shape[:-1]) if self.per_sequence else drawn
        temperature = self._temperature(state)
        return Selection(index, drawn, logits, seen, state, temperature, self.per_sequence)

    def _decoded(self, decided: Tensor, x: Tensor) -> Selection:
        """While decoding: the prefill's decision."""
        logits = x.new_zeros(decided.shape[0], self.num_experts, dtype=torch.float32)
        seen = x.new_zeros(decided.shape[0], x.shape[-1])
        return self.selection(decided, logits, seen, x, None)

    def deliver(
        self, y: Tensor, router: Tensor | None, selection: Selection, training: bool
    ) -> Tensor:
        """Pass the layer's output through the identity that will give the router its gradient."""
        if router is None or not (router.requires_grad and torch.is_grad_enabled()):
            return y
        if selection.number is not None:
            return DeliverWhenRun.apply(
                y,
                selection.x,
                router,
                selection.logits,
                selection.drawn,
                selection.number,
                self.number,
                training,
            )
        if selection.state is None:
            if not training:
                return y
            self.warn_untrained()
        return self._deliver(y, router, selection)

    # A compiler would run DeliverRouterGradient's backward pass once, before there are any
    # advantages, and keep the zeros that it gave.
    @torch.compiler.disable
    def _deliver(self, y: Tensor, router: Tensor, selection: Selection) -> Tensor:
        return DeliverRouterGradient.apply(
            y, selection.x, router, selection.logits, selection.drawn, self, selection
        )

    def warn_untrained(self, message: str = UNTRAINED_ROUTER) -> None:
        """Once for a model."""
        if not self.warned[0]:
            self.warned[0] = True
            warnings.warn(message, stacklevel=4)

    def _logits(self, x: Tensor, router: Tensor | None, temperature: float) -> Tensor:
        """z / temperature in fp32, whatever the dtypes and whatever autocast says."""
        weight: Any = None if router is None else cast(router, torch.float32)
        with no_autocast(x.device):
            logits = self.router.logits(cast(x, torch.float32), weight)
        return logits if temperature == 1.0 else logits / temperature

    def _choose(self, logits: Tensor) -> Tensor:
        """Without sampling: the forced experts, else the k largest logits (ReMix eq. 6)."""
        if self.forced is not None:
            return self._forced(self.forced, logits, None)
        if self.router.random:
            seed = int(torch.randint(2**62, (), device="cpu"))
            return sample_top_k(logits, self.top_k, seed=seed, check=False)
        return self._top_k(logits)

    def _forced(self, forced: Tensor, logits: Tensor, folded: FoldedPass | None) -> Tensor:
        forced = forced.to(device=logits.device, dtype=torch.int32)
        if self.per_sequence and forced.dim() == 3 and forced.shape[1] == 1:
            forced = forced.squeeze(1)
        shape = torch.Size((*logits.shape[:-1], self.top_k))
        return spread_forced(self.name or "this layer", forced, shape, folded)

    def _top_k(self, logits: Tensor) -> Tensor:
        largest, index = logits.topk(self.top_k, dim=-1)
        check_chosen(largest, self.name)
        return index

    def _draw(self, logits: Tensor, state: RoutingState) -> Tensor:
        """While sampling: the forced experts, else a draw from this module's own stream.

        A row's counter is its place in the batch folded M times, so the draws do not depend on
        the parts in which the selections run.
        """
        lead = logits.shape[:-1]
        folded = state.folded_pass()
        decisions = 1 if self.per_sequence else folded.positions(lead)
        if self.forced is not None:
            return self._forced(self.forced, logits, folded)
        call = len(state.selections.get(self.stream, ()))
        seed = mix_seed(state.seed, self.stream, call)
        offset = folded.first_sequence * decisions
        # Not looked at here: the losses' check says in which layer numbers stopped being finite.
        index = sample_top_k(logits, self.top_k, seed=seed, offset=offset, check=False)
        if folded.sampled is not None and not self.per_sequence:
            drawn = folded.sampled.to(logits.device).view(*lead, 1)
            largest = logits.topk(self.top_k, dim=-1).indices
            index = torch.where(drawn, index, largest.to(index.dtype))
        return index

    def _recompute(self, x: Tensor, router: Tensor | None, training: bool) -> Selection:
        """What the forward pass that is being recomputed chose."""
        self.check_whose()
        # A state that has its loss says so when its backward pass begins: `replaying`. Another one
        # (the user's own surrogate) is taken to be running. Where the rows are not those of the
        # draw, an unsampled pass is repeated.
        last = self.last.get(training)
        for state in (self.replaying, last if last is None or last.advantages is None else None):
            drawn = [] if state is None else state.drawn_at(self)
            saved = [index for index in drawn if self._is_of(index, x, state)]
            if saved:
                self.replayed = True
                seen, logits = self._read(x, router, state, self._prompt(state))
                return self.selection(self._only(saved), logits, seen, x, state)
        seen, logits = self._read(x, router, None, self.last_prompt.get(training))
        index = self.last_forced.get(training)
        if index is None:
            # Drawn anew where that is random: checkpointing has put torch's generator back.
            index = self._choose(logits) if self.router.random else self._top_k(logits)
        elif index.shape[:-1] != logits.shape[:-1]:
            raise RuntimeError(
                f"{self.name or 'a routed layer'} is recomputed by activation checkpointing for "
                f"{list(x.shape[:-1])} rows, and the last forced selection had "
                f"{list(index.shape[:-1])}: call backward on a loss before the next forward pass"
            )
        return self.selection(index, logits, seen, x, None)


class RoutedModule:
    """Mixed into every module that has routing sites: how the contexts find them."""

    def active_sites(self) -> dict[str, tuple[RoutingSite, Tensor | None]]:
        """(site, router parameter) of every active pool of adapters, by adapter name."""
        raise NotImplementedError(f"{type(self).__name__} must say which sites it has")

    def routed_shapes(self) -> list[RoutedShape]:
        """The shape of every active pool, for `remix_kernels.warmup`."""
        raise NotImplementedError(f"{type(self).__name__} must say which shapes it has")


def find_sites(model: nn.Module) -> dict[str, RoutingSite]:
    """Every routing site by module name (and `.adapter`, when a module has several active).

    Raises:
        ValueError: There is none.
    """
    sites: dict[str, RoutingSite] = {}
    for name, module in model.named_modules():
        if not isinstance(module, RoutedModule):
            continue
        active = module.active_sites()
        for adapter, (site, router) in active.items():
            site.router_weight = router
            sites[name if len(active) == 1 else f"{name}.{adapter}"] = site
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no routed layer; wrap it with get_peft_model(model, "
            "ReMixConfig(...)) or put RoutedLoRALinear modules into it"
        )
    return sites

"""The sampling context: who draws, who remembers, who is told how good the draw was.

`sample_routing` opens a `RoutingState` and hands it to every routed layer's `RoutingSite`. The
state folds the batch (M selections, one forward pass), owns the seed, the saved selections and the
advantages. It stays with the model after the context has closed, for the backward pass, until the
next context opens. Outside a context every layer takes the k largest logits (ReMix section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remix_model.credit import CREDITS
from remix_model.delivery import LossTap
from remix_model.site import RoutingSite, check_decoder, find_sites

LOGPROB_TOKENS = ("all", "response")
LOG_PROBS = ("ordered",)
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class RoutingState:
    """One sampled pass: M selections of a batch of B sequences. Made by `sample_routing`."""

    def __init__(self, num_selections: int, credit: str, logprob_tokens: str, seed: int) -> None:
        """Start with nothing drawn; see `sample_routing` for the arguments."""
        self.num_selections = num_selections
        self.credit = credit
        self.logprob_tokens = logprob_tokens
        self.seed = seed
        self.batch_size: int | None = None
        self.valid: Tensor | None = None  # [M B, T] bool: real tokens
        self.sampled: Tensor | None = None  # [M B, T] bool: positions that draw; None: all of them
        self.selections: dict[int, list[Tensor]] = {}
        self.advantages: Tensor | None = None  # [M B, T or 1], fp32
        self.losses: Tensor | None = None  # [M, B], fp32, for logging
        self.sites: list[RoutingSite] = []
        self.streams: dict[int, int] = {}  # by id of the site, which self.sites keeps alive
        self._grad_scale: Tensor | float = 1.0
        self._delivering = False

    @property
    def folded_batch_size(self) -> int:
        """M * B, the sequences of the folded batch."""
        if self.batch_size is None:
            raise RuntimeError(
                "the batch size is not known yet: call routing.expand(batch) and run the model on "
                "what it returns"
            )
        return self.num_selections * self.batch_size

    def expand(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Repeat a batch M times, selection-major: row m * B + b is input b under selection m.

        Args:
            batch: Tensors [B, ...] by name, other values pass through. `attention_mask` [B, T]
                tells real tokens from padding; without it all positions count.
                logprob_tokens="response" also needs `labels`.

        Returns:
            A new dict with tensors [M * B, ...].

        Raises:
            ValueError: No tensor, batch sizes that differ, packed sequences, or labels missing.
        """
        _refuse_packed(batch)
        sizes = {
            key: value.shape[0]
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.dim() > 0
        }
        if 0 in sizes.values():
            raise ValueError(f"the batch is empty: {sizes}; leave it out")
        if not sizes:
            raise ValueError(f"the batch holds no tensor [B, ...]; its keys are {sorted(batch)}")
        batch_size = sizes.get("input_ids", max(sizes.values()))
        odd = {key: size for key, size in sizes.items() if size not in (batch_size, 1)}
        if odd:
            raise ValueError(f"tensors of one batch differ in batch size {batch_size}: {odd}")
        self.batch_size = batch_size
        repeat = self.num_selections
        folded = {
            key: torch.cat([value] * repeat) if sizes.get(key) == batch_size else value
            for key, value in batch.items()
        }
        mask = folded.get("attention_mask")
        self.valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.sampled = None
        if self.logprob_tokens == "response":
            self.sampled = _predicting_positions(folded.get("labels"))
        return folded

    def loss(
        self,
        token_losses: Tensor,
        mask: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        """The loss to call backward on: LoRA gets the mean over selections, the router RLOO.

        Args:
            token_losses: [M * B, T or T - 1], column t the loss predicted from position t; or [M *
                B], one loss a sequence.
            mask: Same shape as token_losses, nonzero where a loss counts. None: everywhere.
            num_items: The normaliser N: labelled tokens (or sequences) of the un-replicated batch,
                over the whole gradient accumulation. None: counted from the mask.

        Returns:
            Scalar: sum over counted losses / (N M). Its backward pass delivers both gradients,
            inside or after the context.

        Raises:
            ValueError: A shape does not fit the folded batch, or nothing counts (where num_items
                is counted on a GPU, the loss is nan instead: looking would stall it).
            RuntimeError: The context has a loss already.
        """
        rows, num_selections = self.folded_batch_size, self.num_selections
        if self.advantages is not None:
            raise RuntimeError(
                "this context has one loss already, and the router is told one advantage for each "
                "selection: add the token losses up before routing.loss, or open another context"
            )
        if token_losses.dim() not in (1, 2) or token_losses.shape[0] != rows:
            raise ValueError(
                f"token_losses is {list(token_losses.shape)}; it must be [{rows}, T] or [{rows}]: "
                f"{num_selections} selections of {rows // num_selections} inputs"
            )
        if mask is not None and mask.shape != token_losses.shape:
            raise ValueError(
                f"mask is {list(mask.shape)} and token_losses {list(token_losses.shape)}; they "
                "must agree"
            )
        if num_items is None:
            count = token_losses.numel() if mask is None else mask.count_nonzero()
            num_items = count / num_selections
        on_device = torch.is_tensor(num_items) and num_items.device.type != "cpu"
        if not on_device and float(num_items) <= 0:  # on a device that would be a synchronisation
            raise ValueError(f"num_items={num_items}: no loss counts; is everything masked?")
        counted = token_losses if mask is None else token_losses.masked_fill(mask == 0, 0.0)
        if counted.dtype != torch.float64:
            counted = counted.float()
        losses = (counted / num_items).view(num_selections, rows // num_selections, -1)
        with torch.no_grad():
            detached = losses.detach()
            self.losses = detached.sum(-1)
            self.advantages = CREDITS[self.credit](detached).reshape(rows, -1)
        self._grad_scale = 1.0
        return LossTap.apply(losses.sum() / num_selections, self)

    def begin_backward(self, grad_scale: Tensor) -> None:
        """From here to the end of this backward pass, recomputations replay this state."""
        self._grad_scale = grad_scale.detach()
        self._delivering = True
        for site in self.sites:
            site.begin_backward(self, torch._C._current_graph_task_id())
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._delivering = False
        for site in self.sites:
            site.end_backward()

    def drawn_at(self, site: RoutingSite) -> list[Tensor]:
        """The selections that a site drew in this state, one a forward pass."""
        stream = self.streams.get(id(site))
        return [] if stream is None else self.selections.get(stream, [])

    def row_advantages(self, lead: torch.Size, device: torch.device) -> Tensor | None:
        """grad_scale * advantage of every row of a layer, flattened; None outside its backward.

        Args:
            lead: Leading dimensions of the layer's input: [M B, T] or [M B T] or [M B].
            device: Where the layer is; models may be spread over several.
        """
        if self.advantages is None or not self._delivering:
            return None
        per_sequence = self.positions(lead)
        rows = self.advantages.expand(-1, per_sequence)
        for counted in (self.valid, self.sampled):
            if counted is not None:
                rows = rows * counted.to(rows.device)
        return (rows * self._grad_scale).reshape(-1).to(device)

    def positions(self, lead: torch.Size) -> int:
        """Routed rows a sequence has in a layer whose input is [*lead, in].

        Raises:
            ValueError: The rows are not those of the folded batch.
        """
        rows, sequences = lead.numel(), self.folded_batch_size
        width = None if self.valid is None else self.valid.shape[1]
        if self.sampled is not None:
            width = self.sampled.shape[1]
        per_sequence = rows // sequences
        if rows % sequences or (width is not None and per_sequence != width):
            expected = "..." if width is None else str(width)
            raise ValueError(
                f"a routed layer got {list(lead)} rows while sampling; the folded batch has "
                f"{sequences} sequences of {expected} positions: run the model on what "
                "routing.expand(batch) returned, without a cache"
            )
        return per_sequence


@contextmanager
def sample_routing(
    model: nn.Module,
    num_selections: int = 4,
    *,
    credit: str = "sequence",
    log_prob: str = "ordered",
    logprob_tokens: str = "all",
    grad_selections: int | None = None,
    selection_chunk_size: int | None = None,
    seed: int,
) -> Iterator[RoutingState]:
    """Draw the routed layers' selections instead of taking the top k; train routers by RLOO.

        with sample_routing(model, num_selections=4, seed=step) as routing:
            batch = routing.expand(batch)
            loss = routing.loss(token_losses(model(**batch)), mask)
        loss.backward()

    Args:
        model: Any module with routed layers in it.
        num_selections: M, the independent selections of each input. At least 2 if a router is
            trained.
        credit: "sequence", the paper's.
        log_prob: "ordered", the paper's.
        logprob_tokens: "all" positions draw, or those of the "response" only (the prompt is then
            routed top-k).
        grad_selections: Forward-only selections; not available in this version, leave None.
        selection_chunk_size: Chunked selections; not available in this version, leave None.
        seed: 64-bit integer; every module's draw mixes its own stream from it, by its place in
            `model`. Use a new one every step, and for every part of a model that has a context of
            its own.

    Yields:
        The `RoutingState` with `expand` and `loss`.

    Raises:
        ValueError: An argument is out of range or unknown, the model has no routed layer, or M < 2
            with a trainable router.
        RuntimeError: The model is already inside such a context.

    Source: ReMix (arXiv 2603.10160) section 3.2.
    """
    sites = find_sites(model)
    check_decoder(model)
    check_sampling(num_selections, credit, log_prob, logprob_tokens)
    for name, value in (
        ("grad_selections", grad_selections),
        ("selection_chunk_size", selection_chunk_size),
    ):
        if value is not None and value != num_selections:
            raise ValueError(f"{name}={value} is not available in this version; leave it None")
    trained = next((name for name, site in sites.items() if site.router_is_trained()), None)
    if num_selections < 2 and trained is not None:
        raise ValueError(
            f"num_selections={num_selections}, but the router of {trained} is trained: RLOO's "
            "baseline needs num_selections >= 2 (or freeze the routers with requires_grad_(False))"
        )
    state = RoutingState(num_selections, credit, logprob_tokens, seed)
    state.sites = list(sites.values())
    for stream, (name, site) in enumerate(sites.items()):
        if site.state is not None:
            raise RuntimeError(
                f"{name} is already inside a sample_routing context; close that one first"
            )
        site.stream = state.streams[id(site)] = stream
        site.name = name
    for site in state.sites:
        site.state = state
    try:
        yield state
    finally:
        for site in state.sites:
            site.state = None


@contextmanager
def force_selection(model: nn.Module, selections: Mapping[str, Tensor]) -> Iterator[None]:
    """Use given experts in some routed layers; inside `sample_routing` they are scored like draws.

    Args:
        model: Any module with routed layers in it.
        selections: Integer top_k_index by module name (as `model.named_modules()` gives it),
            broadcastable to the layer's input rows: [k], [T, k], [B, T, k] or [M * B, T, k].

    Raises:
        ValueError: A name is not a routed layer, or an index is out of range, repeated or of the
            wrong k.
    """
    sites = find_sites(model)
    unknown = sorted(set(selections) - set(sites))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a routed layer of this model; they are "
            f"{', '.join(list(sites)[:4])}, ..."
        )
    for name, index in selections.items():
        sites[name].check_forced(name, index)
    previous = {name: sites[name].forced for name in selections}
    for name, index in selections.items():
        sites[name].forced = index
    try:
        yield
    finally:
        for name, before in previous.items():
            sites[name].forced = before


def check_sampling(
    num_selections: int, credit: str, log_prob: str, logprob_tokens: str, prefix: str = ""
) -> None:
    """Raise ValueError for a value that is out of range or unknown; `prefix` goes before names."""
    whole = isinstance(num_selections, int) and not isinstance(num_selections, bool)
    if not whole or num_selections < 1:
        raise ValueError(
            f"{prefix}num_selections={num_selections!r}; it must be a whole number, at least 1 "
            "(2 to train a router)"
        )
    for name, value, known in (
        ("credit", credit, tuple(CREDITS)),
        ("log_prob", log_prob, LOG_PROBS),
        ("logprob_tokens", logprob_tokens, LOGPROB_TOKENS),
    ):
        if value not in known:
            raise ValueError(
                f"{prefix}{name}={value!r} is unknown; choose one of {', '.join(known)}"
            )


def _refuse_packed(batch: Mapping[str, Any]) -> None:
    """Packed rows hold several inputs: one advantage would credit each with the others' loss."""
    key = next((key for key in _PACKED_KEYS if batch.get(key) is not None), None)
    position_ids = batch.get("position_ids")
    if key is None and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        restarts = position_ids[:, 1:] <= position_ids[:, :-1]
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
        if bool(restarts.any()):
            key = "position_ids that start again within a row"
    if key is not None:
        raise ValueError(
            f"the batch is packed (it has {key}): several inputs share a row, which sampling "
            "cannot credit apart; set packing=False and padding_free=False"
        )


def _predicting_positions(labels: Any) -> Tensor:
    """[M B, T] bool: positions from which a labelled token is predicted."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "logprob_tokens='response' needs labels [B, T] in the batch given to routing.expand"
        )
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    return positions

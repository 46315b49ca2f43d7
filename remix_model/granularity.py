"""Routing by sequence: experts chosen once, from the mean of the prompt's hidden states.

A layer sees rows, not prompts. `SequencePass` tells the sites of one model what the forward pass
around them is: which positions are the prompt (before the first label; else the whole prefill), and
which cache it fills or reads. Decisions are kept with the cache, so that decoding repeats those of
its own prefill whatever else ran in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from remix_model.batch import prompt_positions, real_positions

if TYPE_CHECKING:
    from remix_model.site import RoutingSite


class SequencePass:
    """What the forward pass that runs tells the sites of a model that route by sequence."""

    def __init__(self) -> None:
        """Nothing runs."""
        self.prompt: Tensor | None = None  # [B, T] bool; None: unknown, all positions count
        self.given: Tensor | None = None  # by token_losses, which takes the labels out of the batch
        self._cache: Any = None
        self._reads = False
        self._decisions: dict[int, Tensor] = {}
        self._kept: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> SequencePass:
        """One for the copied model, with no decisions."""
        return memo.setdefault(id(self), SequencePass())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled likewise."""
        return SequencePass, ()

    def watch(self, model: nn.Module) -> None:
        """Hear of every forward pass of a transformers model."""
        model.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        batch = {**bound, **bound.get("kwargs", {})}
        self._cache = batch.get("past_key_values")
        self._reads = self._cache is not None and int(self._cache.get_seq_length()) > 0
        self._decisions = {}
        self.prompt = None if self._reads else self._find_prompt(batch)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the decisions go with the cache, which the model may have made itself."""
        cache = self._cache
        if cache is None and output is not None:
            cache = getattr(output, "past_key_values", None)
        if cache is not None and not self._reads:
            self._kept[cache] = self._decisions
        self._cache, self._reads, self._decisions, self.prompt = None, False, {}, None

    def note(self, site: RoutingSite, drawn: Tensor) -> None:
        """A site has decided, [B, k]."""
        self._decisions[id(site)] = drawn

    def decided(self, site: RoutingSite) -> Tensor | None:
        """The decision at this cache's prefill, [B, k]; None when this pass is not decoding."""
        if not self._reads:
            return None
        kept = self._kept.get(self._cache, {}).get(id(site))
        if kept is None:
            raise RuntimeError(
                f"{site.name or 'a routed layer'} chooses its experts at prefill, and this cache "
                "was not filled by this model: run the prompt through it first"
            )
        return kept

    def _find_prompt(self, batch: Mapping[str, Any]) -> Tensor | None:
        ids = batch.get("input_ids")
        ids = batch.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            return None
        rows, length = ids.shape[:2]
        if self.given is not None and self.given.shape == (rows, length):
            return self.given
        if isinstance(batch.get("labels"), Tensor):
            return prompt_positions(batch)
        real = real_positions(batch)
        if real is None or real.shape[1] < length:
            return torch.ones(rows, length, dtype=torch.bool, device=ids.device)
        return real[:, -length:]


@contextmanager
def given_prompt(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `batch`'s labels tell where prompts end, though the model is not given them."""
    passes = [getattr(module, "sequence_pass", None) for module in model.modules()]
    found: dict[int, SequencePass] = {id(one): one for one in passes if one is not None}
    prompt = prompt_positions(batch) if found else None
    for sequence_pass in found.values():
        sequence_pass.given = prompt
    try:
        yield
    finally:
        for sequence_pass in found.values():
            sequence_pass.given = None


def pool(x: Tensor, prompt: Tensor | None, name: str) -> Tensor:
    """The mean of the prompt's rows.

    Args:
        x: [B, T, in], or its rows [B T, in] where prompt tells B and T.
        prompt: [B, T] bool; None: all positions.
        name: Of the layer, for errors.

    Returns:
        [B, in], fp32 (fp64 for fp64).

    Raises:
        ValueError: x is not the rows of prompt.
    """
    if prompt is None:
        if x.dim() != 3:
            raise ValueError(
                f"{name or 'a routed layer'} routes by sequence and got x {list(x.shape)}; it must "
                "be [B, T, in]"
            )
        prompt = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if x.shape[:-1].numel() != prompt.numel():
        raise ValueError(
            f"{name or 'a routed layer'} routes by sequence and got x {list(x.shape)}; the batch "
            f"is {list(prompt.shape)}: run the model on what routing.expand(batch) returned"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = prompt.to(x.device, dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return torch.bmm(weights.unsqueeze(1), x.reshape(*prompt.shape, -1).to(dtype)).squeeze(1)


def spread_over(drawn: Tensor, lead: torch.Size) -> Tensor:
    """Decisions [B, k] for every row of an input [*lead, in]: [*lead, k]."""
    rows = drawn.shape[0]
    if lead.numel() % max(rows, 1):
        raise ValueError(f"{list(lead)} rows are not those of {rows} sequences")
    repeated = drawn.unsqueeze(1).expand(rows, lead.numel() // max(rows, 1), drawn.shape[-1])
    return repeated.reshape(*lead, drawn.shape[-1])

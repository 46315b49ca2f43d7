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

import torch
from torch import Tensor, nn

from remix_kernels._routed import no_autocast
from remix_model.batch import prompt_positions, real_positions

if TYPE_CHECKING:
    from remix_model.site import RoutingSite


Groups = tuple[tuple[int, ...], int]  # which groups of rows, of how many


class SequencePass:
    """What the forward pass that runs tells the sites of a model that route by sequence."""

    def __init__(self) -> None:
        """Nothing runs."""
        # Who knows the prompt, in the order in which they are asked; the model's own batch is last.
        self.generating: Tensor | None = None  # [B, T] bool: what generate() was given
        self.given: Mapping[str, Any] | None = None  # by token_losses, which keeps labels back
        self._batch: Mapping[str, Any] | None = None
        self._prompt: Tensor | None = None  # found in one of them, when a site first asked
        self._cache: Any = None
        self._reads = False
        self._decisions: dict[tuple[int, Groups | None], Any] = {}
        self.groups: Groups | None = None
        self._signature: inspect.Signature | None = None

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
        if hasattr(type(model), "generate"):
            model.generate = Generate(model, self)  # type: ignore[assignment]

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if self._signature is None:
            self._signature = inspect.signature(module.forward)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        self._batch = {**bound, **bound.get("kwargs", {})}
        self._cache = self._batch.get("past_key_values")
        self._reads = self._cache is not None and int(self._cache.get_seq_length()) > 0
        self._decisions, self._prompt = {}, None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the decisions go with the cache, which the model may have made itself.

        They are an attribute of it, and so are copied when it is.
        """
        cache = self._cache
        if cache is None and output is not None:
            cache = getattr(output, "past_key_values", None)
        if cache is not None and not self._reads:
            cache.remix_decisions = (id(self), self._decisions)
        self._batch, self._cache, self._reads = None, None, False
        self._decisions, self._prompt = {}, None

    def note(self, site: RoutingSite, decision: Any) -> None:
        """A site has decided: [B, k], and whatever belongs to it."""
        self._decisions[id(site), self.groups] = decision

    def decided(self, site: RoutingSite) -> Any:
        """The decision at this cache's prefill; None when this pass is not decoding."""
        if not self._reads:
            return None
        none: tuple[int, dict[tuple[int, Groups | None], Any]] = (0, {})
        owner, decisions = getattr(self._cache, "remix_decisions", none)
        key = (id(site), self.groups)
        if owner != id(self) or key not in decisions:
            raise RuntimeError(
                f"{site.name or 'a routed layer'} chooses its experts at prefill, and this cache "
                "was not filled by this model: run the prompt through it first"
            )
        return decisions[key]

    def prompt(self) -> Tensor | None:
        """[B, T] bool, the real tokens of the prompt; None: unknown, all positions count.

        Raises:
            ValueError: A row has no prompt, or it cannot be told which tokens are real.
        """
        if self._prompt is None and self._batch is not None:
            self._prompt = self._find_prompt(self._batch)
        if self._prompt is None or self.groups is None:
            return self._prompt
        chosen, count = self.groups
        return self._prompt.unflatten(0, (count, -1))[list(chosen)].flatten(0, 1)

    def _find_prompt(self, batch: Mapping[str, Any]) -> Tensor | None:
        ids = batch.get("input_ids")
        ids = batch.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            return None
        rows, length = ids.shape[:2]
        if self.generating is not None:
            return _first_columns(self.generating, rows, length)
        labels = batch.get("labels")
        if self.given is not None:
            return prompt_positions(self.given)
        if isinstance(labels, Tensor) and labels.dim() == 2:
            return prompt_positions(batch)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, which does not say which tokens are real; "
                "routing_granularity='sequence' needs [B, T]"
            )
        real = real_positions(batch)
        if real is None or real.shape[1] < length:
            return torch.ones(rows, length, dtype=torch.bool, device=ids.device)
        return real[:, -length:]


@contextmanager
def only_groups(
    sequence_pass: SequencePass | None, chosen: list[int], count: int
) -> Iterator[None]:
    """Inside, layers see only these groups of the batch's rows, out of `count` equal ones."""
    if sequence_pass is not None:
        sequence_pass.groups = (tuple(chosen), count)
    try:
        yield
    finally:
        if sequence_pass is not None:
            sequence_pass.groups = None


def _first_columns(prompt: Tensor, rows: int, length: int) -> Tensor:
    """A prompt [B, T] in a pass of [rows, length]: beams repeat rows; what follows is no prompt."""
    if length < prompt.shape[1]:
        raise ValueError(
            f"a pass of {length} tokens begins a prompt of {prompt.shape[1]}: prefill_chunk_size "
            "does not go with routing_granularity='sequence', which reads the whole prompt at once"
        )
    if rows % prompt.shape[0]:
        return torch.ones(rows, length, dtype=torch.bool, device=prompt.device)
    prompt = prompt.repeat_interleave(rows // prompt.shape[0], 0)
    return nn.functional.pad(prompt, (0, length - prompt.shape[1]))


@contextmanager
def given_prompt(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Inside, `batch`'s labels tell where prompts end, though the model is not given them."""
    passes = [getattr(module, "sequence_pass", None) for module in model.modules()]
    found: dict[int, SequencePass] = {id(one): one for one in passes if one is not None}
    for sequence_pass in found.values():
        sequence_pass.given = batch
    try:
        yield
    finally:
        for sequence_pass in found.values():
            sequence_pass.given = None


class Generate:
    """Stands before a model's generate(): its passes begin with the prompt, and go beyond it."""

    def __init__(self, model: nn.Module, sequence_pass: SequencePass) -> None:
        """An object rather than a function, so that copies of the model have one of their own."""
        self.model = model
        self.sequence_pass = sequence_pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        kind: Any = type(self.model)
        before = self.sequence_pass.generating
        self.sequence_pass.generating = _prompt_of(self.model, args, kwargs)
        try:
            return kind.generate(self.model, *args, **kwargs)
        finally:
            self.sequence_pass.generating = before


def _prompt_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """[B, T] bool, the real tokens that generate() is given, as it tells them; None: none."""
    names = ("inputs", "input_ids", "inputs_embeds")
    given = (*args[:1], *(kwargs.get(name) for name in names))
    ids = next((value for value in given if value is not None), None)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    if not isinstance(ids, Tensor):
        return None
    own = model.generation_config
    pad, eos = (kwargs.get(name, getattr(own, name)) for name in ("pad_token_id", "eos_token_id"))
    if ids.dim() == 2 and pad is not None and pad not in torch.as_tensor(eos or []).view(-1):
        return ids != pad
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)


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
    with no_autocast(x.device):
        return torch.bmm(weights.unsqueeze(1), x.reshape(*prompt.shape, -1).to(dtype)).squeeze(1)


def spread_over(drawn: Tensor, lead: torch.Size) -> Tensor:
    """Decisions [B, k] for every row of an input [*lead, in]: [*lead, k]."""
    rows = drawn.shape[0]
    if lead.numel() % max(rows, 1):
        raise ValueError(f"{list(lead)} rows are not those of {rows} sequences")
    repeated = drawn.unsqueeze(1).expand(rows, lead.numel() // max(rows, 1), drawn.shape[-1])
    return repeated.reshape(*lead, drawn.shape[-1])

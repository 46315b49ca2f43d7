"""What `sample_routing` reads from a batch, and how it repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from remix_model.parts import Part

PROMPT_MASK = "prompt_mask"
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class FoldedPass:
    """c of the M selections of B inputs, folded into one pass of c B sequences."""

    batch_size: int  # B
    count: int  # c
    first: int  # the first of the c selections
    num_selections: int  # M
    # [c B, T] bool: real tokens, positions that draw, prompts; None: all.
    valid: Tensor | None = None
    sampled: Tensor | None = None
    prompt: Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        part: Part,
        num_selections: int,
        *,
        response_only: bool,
        per_sequence: bool,
    ) -> FoldedPass:
        """What a part makes of a batch.

        Args:
            batch: Tensors [B, ...].
            part: Which selections.
            num_selections: M.
            response_only: Whether only positions that predict a label draw.
            per_sequence: Whether prompts are read.

        Raises:
            ValueError: As `batch_size_of`; labels or prompts are missing.
        """
        batch_size = batch_size_of(batch)
        masks = (
            real_positions(batch),
            predicting_positions(batch) if response_only else None,
            prompt_positions(batch) if per_sequence else None,
        )
        repeated = (None if mask is None else mask.repeat(part.count, 1) for mask in masks)
        return cls(batch_size, part.count, part.first, num_selections, *repeated)

    @property
    def sequences(self) -> int:
        """c * B."""
        return self.count * self.batch_size

    @property
    def first_sequence(self) -> int:
        """Where the pass begins in the batch folded M times."""
        return self.first * self.batch_size

    @property
    def all_sequences(self) -> int:
        """M * B."""
        return self.num_selections * self.batch_size

    @cached_property
    def counted(self) -> Tensor | None:
        """[c B * T] bool: positions whose decisions are credited; None: all."""
        counted = self.valid
        if self.sampled is not None:
            counted = self.sampled if counted is None else counted & self.sampled
        return None if counted is None else counted.reshape(-1)

    def positions(self, lead: torch.Size) -> int:
        """Routed rows a sequence has in a layer whose input is [*lead, in].

        Raises:
            ValueError: The rows are not those of the folded batch.
        """
        rows = lead.numel()
        mask = self.valid if self.sampled is None else self.sampled
        width = None if mask is None else mask.shape[1]
        positions = rows // self.sequences
        if rows % self.sequences or (width is not None and positions != width):
            expected = "..." if width is None else str(width)
            raise ValueError(
                f"a routed layer got {list(lead)} rows while sampling; the folded batch has "
                f"{self.sequences} sequences of {expected} positions: run the model on what "
                "routing.expand(batch) returned, without a cache"
            )
        return positions

    def rows_of(self, advantages: Tensor, lead: torch.Size) -> Tensor:
        """The advantage of every routed row of a layer whose input is [*lead, in].

        Args:
            advantages: [c B, W]; W is 1, the layer's positions, or one less.
            lead: As in `positions`.

        Raises:
            ValueError: W is another number.
        """
        width, positions = advantages.shape[1], self.positions(lead)
        if width == 1:
            return advantages.expand(-1, positions).reshape(-1)
        if width not in (positions, positions - 1):
            raise ValueError(
                f"credit='causal' needs a loss for each of the layer's {positions} positions (the "
                f"last may be left out); token_losses had {width}"
            )
        return torch.nn.functional.pad(advantages, (0, positions - width)).reshape(-1)


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """B, the sequences in a batch.

    Raises:
        ValueError: No tensor, none of B rows, batch sizes that differ, or packed sequences.
    """
    refuse_packed(batch)
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
    return batch_size


def fold(batch: Mapping[str, Any], batch_size: int, count: int) -> dict[str, Any]:
    """Tensors [B, ...] repeated `count` times, selection-major; other values as they are."""
    return {
        key: torch.cat([value] * count)
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_size
        else value
        for key, value in batch.items()
        if key != PROMPT_MASK
    }


def real_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """[B, T] bool from a two-dimensional attention mask; None: all positions are real."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def predicting_positions(batch: Mapping[str, Any]) -> Tensor:
    """[B, T] bool: positions from which a labelled token is predicted."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "logprob_tokens='response' needs labels [B, T] in the batch given to routing.expand"
        )
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    return positions


def prompt_positions(batch: Mapping[str, Any]) -> Tensor:
    """[B, T] bool: the real tokens before the first label, which sequence routing reads.

    Raises:
        ValueError: Neither `prompt_mask` nor `labels`, or a row has no prompt.
    """
    given, labels = batch.get(PROMPT_MASK), batch.get("labels")
    if isinstance(given, Tensor):
        prompt = given.bool()
    elif isinstance(labels, Tensor) and labels.dim() == 2:
        prompt = (labels != -100).cumsum(1) == 0
    else:
        raise ValueError(
            "routing_granularity='sequence' needs labels [B, T] (or prompt_mask [B, T]) in the "
            "batch: experts are chosen from the tokens before the first label"
        )
    real = real_positions(batch)
    if real is not None:
        prompt = prompt & real
    empty = (~prompt.any(1)).nonzero().flatten()
    if empty.numel():
        raise ValueError(
            f"row {int(empty[0])} has no prompt: its first real token is labelled, and "
            "routing_granularity='sequence' chooses experts from the tokens before the first "
            "label; label the response only, or route by token"
        )
    return prompt


def refuse_packed(batch: Mapping[str, Any]) -> None:
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

"""Per-token losses of a causal language model, with logits only where a label is.

The language-model head and its softmax are a third of a small model's step; most positions of a
prompt have no label. A hook on the head hands it only the labelled rows, so whatever a model does
to its logits afterwards (soft caps, scales) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from remix_model.architecture import check_decoder, is_compiled, prompt_positions, unwrapped
from remix_model.batch import PROMPT_MASK
from remix_model.granularity import given_prompt
from remix_model.site import RoutedModule

# skip_logits is how the Trainer asks a liger model for a loss in place of logits.
_NOT_THE_MODELS = ("labels", PROMPT_MASK, "skip_logits")


def token_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every next token.

    Args:
        model: A transformers causal language model, bare or wrapped by PEFT, DDP or FSDP.
        batch: What the model takes, with `labels` [B, T]; -100 is not counted.

    Returns:
        (losses [B, T - 1] fp32, mask [B, T - 1] bool); column t is the loss predicted from
        position t, zero where the mask is.

    Raises:
        ValueError: No labels, a sequence longer than the model's positions, or an encoder-decoder.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError("the batch needs labels [B, T] to compute a loss")
    check_decoder(model)
    virtual, in_front = prompt_positions(model)
    _check_length(model, labels.shape[1] + virtual)
    inputs = {key: value for key, value in batch.items() if key not in _NOT_THE_MODELS}
    inputs.setdefault("use_cache", False)
    targets = labels[:, 1:]
    mask = targets != -100
    with given_prompt(model, batch):
        if any(isinstance(module, RoutedModule) for module in _head(model).modules()):
            # A routed head draws for every position of the folded batch, so it must see them all.
            logits = model(**inputs).logits[:, :-1][mask].unsqueeze(0)
        else:
            with logits_at(model, nn.functional.pad(mask, (in_front, 0))):
                logits = model(**inputs).logits
    losses = logits.new_zeros(mask.shape, dtype=torch.float32)
    flat = nn.functional.cross_entropy(logits[0].float(), targets[mask], reduction="none")
    return losses.masked_scatter(mask, flat), mask


@contextmanager
def logits_at(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside, the head computes logits [1, positions, vocabulary] at the masked positions.

    Args:
        model: As in `token_losses`.
        mask: [B, T - 1] or [B, T] bool, positions counted from the first.

    Raises:
        ValueError: The model does not say which module is its head.
    """
    head = _head(model)
    if is_compiled(model) and "forward" not in head.__dict__:
        with _labelled_only(head, mask):
            yield
        return

    def keep_labelled(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[:, : mask.shape[1]][mask].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(keep_labelled)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _labelled_only(head: Any, mask: Tensor) -> Iterator[None]:
    """`logits_at` of a compiled head, which no longer looks at its hooks, but at its class.

    The rows are counted here, so that the compiled graph has no shape that depends on data.
    """
    cls: Any = type(head)
    head.remix_labelled = mask.nonzero()  # [rows, 2]
    head.__class__ = _with_labelled_rows(cls)
    try:
        yield
    finally:
        head.__class__ = cls
        del head.remix_labelled


@cache  # one class for good: torch.compile would compile again for every new one
def _with_labelled_rows(cls: Any) -> Any:
    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.remix_labelled[:, 0] * hidden.shape[1] + self.remix_labelled[:, 1]
        labelled = hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0)
        return cls.forward(self, labelled, *args, **kwargs)

    # A class of this module: what belongs to one of torch.nn compiles anew for every other shape.
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__})


def _head(model: nn.Module) -> nn.Module:
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings; token_losses needs a causal "
            "language model"
        )
    return head


def _check_length(model: nn.Module, length: int) -> None:
    limit = getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the model's {limit} positions; shorten "
            "max_length"
        )

"""Selections that the user forces: whether they are any, and a layer's rows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from remix_model.batch import FoldedPass


def check_forced(name: str, index: Tensor, num_experts: int, top_k: int) -> None:
    """Raise unless `index` names `top_k` distinct experts in every row.

    Args:
        name: The layer's, for the message.
        index: [..., top_k] integer.
        num_experts: n.
        top_k: k.

    Raises:
        TypeError: Not a tensor.
        ValueError: Its shape, its dtype, an expert out of range or named twice in one row.
    """
    if not isinstance(index, Tensor):
        raise TypeError(
            f"the selection for {name} is a {type(index).__name__}; it must be a tensor"
        )
    if index.is_floating_point() or index.dim() < 1 or index.shape[-1] != top_k:
        raise ValueError(
            f"the selection for {name} is {list(index.shape)} {index.dtype}; it must be integer "
            f"[..., {top_k}]"
        )
    if index.numel() == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= num_experts:
        raise ValueError(
            f"the selection for {name} holds expert {int(index.min())} to {int(index.max())}; "
            f"experts are numbered 0 to {num_experts - 1}"
        )
    ordered = index.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError(f"the selection for {name} names an expert twice in one row")


def spread_forced(name: str, index: Tensor, shape: torch.Size, folded: FoldedPass | None) -> Tensor:
    """The forced experts of every decision.

    Args:
        name: The layer's, for the message.
        index: What broadcasts to `shape`; or its first dimension divides shape's, and it is
            repeated; or it holds all M B sequences, and the pass that runs takes its own.
        shape: (..., k), of the decisions.
        folded: The pass that runs; None outside sampling.

    Raises:
        ValueError: It does not fit.
    """
    forced = index
    try:
        if forced.dim() == len(shape) and forced.shape[0] not in (1, shape[0]):
            if folded is not None and forced.shape[0] == folded.all_sequences:
                forced = forced[folded.first_sequence :][: shape[0]]
            forced = forced.repeat(shape[0] // forced.shape[0], *[1] * (forced.dim() - 1))
        return forced.expand(shape).contiguous()
    except RuntimeError:
        raise ValueError(
            f"the selection for {name} is {list(index.shape)}; it does not broadcast to the "
            f"layer's rows, {list(shape)}"
        ) from None

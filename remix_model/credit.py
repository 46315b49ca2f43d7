"""From the losses of M selections to advantages: which losses a routing decision answers for.

A credit is a linear map from per-token losses [..., T], column t the loss predicted from position
t, to returns: the losses that the decision taken at a position is charged with. Advantages are the
returns' deviations from their mean over the M selections of the same input,

    advantage[m, b, s] = (R[m, b, s] - mean_m R[m, b, s]) / (M - 1)

and multiply `d log Q` of the decisions at position s. To add a credit: write the function, and name
it in CREDITS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ADVANTAGE_NORMS = ("none", "input", "batch")


def leave_one_out(returns: Tensor) -> Tensor:
    """(R_m - mean_m R) / (M - 1) over dimension 0; zeros for M = 1 (ReMix section 3.2)."""
    spread = returns - returns[:1]  # exactly 0 where all selections have the same loss
    return (spread - spread.mean(0, keepdim=True)) / max(returns.shape[0] - 1, 1)


def sequence_returns(losses: Tensor) -> Tensor:
    """Every position is charged with the whole loss of its sequence: the paper's form.

    Args:
        losses: [..., T].

    Returns:
        [..., 1].
    """
    return losses.sum(-1, keepdim=True)


def causal_returns(losses: Tensor) -> Tensor:
    """Position s is charged with the losses predicted from s on: R_s = sum_{t >= s} loss_t.

    In a causal model what is chosen at s changes no loss predicted before s, so these have no
    covariance with its score, and leaving them out removes only noise.

    Args:
        losses: [..., T].

    Returns:
        [..., T].
    """
    return losses.flip(-1).cumsum(-1).flip(-1)


CREDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence": sequence_returns,
    "causal": causal_returns,
}


def advantage_scale(losses: Tensor, norm: str) -> Tensor | float:
    """What normalisation multiplies the advantages of each input by.

        "none"   1: unbiased for the gradient of the expected loss
        "input"  1 / (B std_m L[m, b]): every input pulls as hard, whatever its losses' spread.
                 Biased: it descends a sum over inputs that weighs each by its own spread
        "batch"  1 / (B rms_b std_m L[m, b]): one factor for the batch. Its direction is only biased
                 as far as the spread and the gradient vary together from batch to batch

    Spreads below the rounding of the losses count as none at all: the advantages are then 0.

    Args:
        losses: [M, B], of whole sequences.
        norm: One of ADVANTAGE_NORMS.

    Returns:
        [B, 1], or 1.0.
    """
    if norm == "none":
        return 1.0
    variance = (losses - losses[:1]).var(0, correction=0)
    if norm == "batch":
        variance = variance.mean().expand_as(variance)
    rounding = losses.abs().mean() * 8 * torch.finfo(losses.dtype).eps
    spread = variance.sqrt()
    scale = torch.where(spread > rounding, 1.0 / spread, torch.zeros_like(spread))
    return scale.unsqueeze(-1) / losses.shape[1]

"""From the losses of M selections to advantages: which loss a selection is credited with.

A credit turns per-token losses [M, B, T] (already divided by the normaliser N) into advantages, the
numbers that multiply `d log Q` of each routed position. To add one: write the function, and name it
in CREDITS.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def leave_one_out(returns: Tensor) -> Tensor:
    """(R_m - mean_m R) / (M - 1) over dimension 0; zeros for M = 1 (ReMix section 3.2)."""
    spread = returns - returns[:1]  # exactly 0 where all selections have the same loss
    return (spread - spread.mean(0, keepdim=True)) / max(returns.shape[0] - 1, 1)


def sequence_credit(losses: Tensor) -> Tensor:
    """Every position is credited with the whole loss of its sequence: the paper's form.

    Args:
        losses: [M, B, T], masked and divided by N.

    Returns:
        [M, B, 1].
    """
    return leave_one_out(losses.sum(-1, keepdim=True))


CREDITS: dict[str, Callable[[Tensor], Tensor]] = {"sequence": sequence_credit}

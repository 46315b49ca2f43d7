"""Experts that are whole feed-forward blocks, y = sum_j w_j FFN_ij(x); the block stays as it is.

The block's own code runs once, on k times as many sequences: its first linears (gate and up) give
every row out k times, once with each chosen expert's LoRA, whatever lies between works row by row,
and the last linear (down) brings them together. Only adapters are computed k times there and the
hidden values; the frozen weights see every row once,

    gate, up   W x + s B_i A_i x for the k experts i          [B, ...] -> [k B, ...]
    down       W (sum_j w_j h_j) + s sum_j w_j B_ij A_ij h_j  [k B, ...] -> [B, ...]

since W is linear and the weights add up to 1 (so a bias counts once).

Source: Li et al. 2024, arXiv 2404.15159, section 3.2; the sharing is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from remix_kernels import routed_lora
from remix_model.sharing import FollowingSite

if TYPE_CHECKING:
    from remix_model.layer import Pool


def in_block(
    pool: Pool, base: Callable[[Tensor], Tensor], x: Tensor, dropout: nn.Module, training: bool
) -> Tensor:
    """One linear of such a block.

    Args:
        pool: Its adapters; the site is the block's, or follows it.
        base: The frozen linear.
        x: [B, ..., in]; for the block's last linear [k B, ..., in], expert-major.
        dropout: On the adapters' input.
        training: The layer's mode.

    Returns:
        [k B, ..., out]; the block's last linear's [B, ..., out].
    """
    site = pool.site
    selection = site.select(x, pool.router, training)
    k = site.top_k
    index = selection.index.movedim(-1, 0).unsqueeze(-1)  # [k, B, ..., 1]
    assert selection.weights is not None
    if not (isinstance(site, FollowingSite) and site.is_last_of_block()):
        y = base(x)
        return (y + _updates(pool, dropout(x).to(y.dtype), index, pool.scaling)).flatten(0, 1)
    weights = selection.weights.movedim(-1, 0).unsqueeze(-1)  # [k, B, ..., 1]
    hidden = x.unflatten(0, (k, -1))
    y = base((hidden * weights.to(x.dtype)).sum(0))
    return y + _updates(pool, dropout(hidden).to(y.dtype), index, weights * pool.scaling).sum(0)


def _updates(pool: Pool, x: Tensor, index: Tensor, weights: Tensor | float) -> Tensor:
    """What the k experts add: x [B, ..., in] or [k, B, ..., in] -> [k, B, ..., out]."""
    return routed_lora(
        x,
        pool.lora_A,
        pool.lora_B,
        index,
        weights,
        backend=pool.backend,
        strategy=pool.strategy,
        check=False,
    )

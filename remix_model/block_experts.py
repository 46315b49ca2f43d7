"""Experts that are whole feed-forward blocks, y = sum_j w_j FFN_ij(x); the block stays as it is.

The block's own code runs once, on k times as many sequences: its first linears (gate and up) give
every row out k times, once with each chosen expert's LoRA, whatever lies between works row by row,
and the last linear (down) brings them together. Only adapters are computed k times there and the
hidden values; the frozen weights see every row once,

    gate, up   W x + s B_i A_i x for the k experts i          [B, ...] -> [k B, ...]
    down       W (sum_j w_j h_j) + sum_i B_i l_i              [k B, ...] -> [B, ...]
               l_i = s w_j A_i h_j where i = i_j, else 0

since W and B are linear. The weights add up to 1, so a bias counts once.

Source: Li et al. 2024, arXiv 2404.15159, section 3.2; the sharing is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_kernels import routed_linear, routed_lora
from remix_model.sharing import FollowingSite

if TYPE_CHECKING:
    from remix_model.layer import Pool

FEW_ROWS = 16  # of which each chosen B is met by itself


def in_block(
    pool: Pool,
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    dropout: nn.Module | None,
    plain: nn.Linear | None,
    training: bool,
) -> Tensor:
    """One linear of such a block.

    Args:
        pool: Its adapters; the site is the block's, or follows it.
        base: The frozen linear.
        x: [B, ..., in]; for the block's last linear [k B, ..., in], expert-major.
        dropout: On the adapters' input; None where it does nothing.
        plain: The frozen linear if it is nothing but that, so that one op may run both.
        training: The layer's mode.

    Returns:
        [k B, ..., out]; the block's last linear's [B, ..., out].

    Raises:
        ValueError: x is one row without a batch, or has other rows than the block's first linear.
        RuntimeError: The block's first linear has not run before it.
    """
    site = pool.site
    if x.dim() < 2:
        raise ValueError(
            f"{site.name} got x {list(x.shape)}; experts that are whole blocks need [B, ..., in]: "
            "x.unsqueeze(0)"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    selection = site.select(x, pool.router, training)
    index = selection.index.movedim(-1, 0).unsqueeze(-1)  # [k, B, ..., 1]
    if isinstance(site, FollowingSite) and site.is_last_of_block():
        assert selection.weights is not None
        weights = selection.weights.movedim(-1, 0).unsqueeze(-1)  # [k, B, ..., 1]
        return _together(pool, base, x.unflatten(0, (site.top_k, -1)), dropout, index, weights)
    adapters = (pool.lora_A, pool.lora_B, index, pool.scaling)
    if plain is not None and dropout is None:
        y = routed_linear(x, plain.weight, plain.bias, *adapters, **_how(pool))
        return y.flatten(0, 1)
    y = base(x)
    dropped = x if dropout is None else dropout(x)
    return (y + routed_lora(dropped.to(y.dtype), *adapters, **_how(pool))).flatten(0, 1)


def _how(pool: Pool) -> dict[str, Any]:
    """Options of the ops, for experts that a site has chosen."""
    return {"backend": pool.backend, "strategy": pool.strategy, "check": False}


def _together(
    pool: Pool,
    base: Callable[[Tensor], Tensor],
    hidden: Tensor,
    dropout: nn.Module | None,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """The last linear: hidden [k, B, ..., in], index and weights [k, B, ..., 1]."""
    mixed, hidden = _WeightedSum.apply(hidden, weights)
    y = base(mixed)
    hidden = (hidden if dropout is None else dropout(hidden)).to(y.dtype)
    chosen = (index, weights * pool.scaling)
    k, (n, out_features, r) = len(index), pool.lora_B.shape
    if weights[0].numel() < FEW_ROWS or 2 * k * n * r > (k - 1) * out_features:
        return y + routed_lora(hidden, pool.lora_A, pool.lora_B, *chosen, **_how(pool)).sum(0)
    # Each slot's A h goes to its expert's place among n r numbers, which are then added over slots:
    # B, and everything as wide as its output, is met once a row.
    places = torch.eye(n * r, dtype=y.dtype, device=y.device).view(n, r, n * r).transpose(1, 2)
    low = routed_lora(hidden, pool.lora_A, places, *chosen, **_how(pool)).sum(0)
    packed_b = pool.lora_B.to(y.dtype).transpose(1, 2).flatten(0, 1)  # [n r, out]
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), packed_b).view(y.shape)


class _WeightedSum(torch.autograd.Function):
    """(sum_j w_j h_j, h) of h [k, ..., d] and w [k, ..., 1]: h is read once.

    Whoever reads h too takes it from here, so that its gradient comes by and is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weights)
        scale = weights.to(hidden.dtype)
        y = hidden[0] * scale[0]
        for slot in range(1, hidden.shape[0]):
            y.addcmul_(hidden[slot], scale[slot])
        return y, hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dhidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weights = ctx.saved_tensors
        dweights = None
        if ctx.needs_input_grad[1]:
            parts = [(slot * dy).sum(-1, keepdim=True, dtype=weights.dtype) for slot in hidden]
            dweights = torch.stack(parts)
        if not ctx.needs_input_grad[0]:
            return None, dweights
        # In place: dhidden is what the adapters' op, or dropout, has just made for us alone. A
        # compiled graph may not change its inputs, and fuses the addition anyway.
        add = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
        return add(dhidden, dy, weights.to(dy.dtype)), dweights

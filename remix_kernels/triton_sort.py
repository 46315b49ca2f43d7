"""(row, slot) pairs sorted by expert, on the device and without a sort: counting, then scattering.

Group g = expert * top_k + slot owns the sorted positions offsets[g] : offsets[g + 1]. Within a
group pairs keep their order, so that sums over them are the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from remix_kernels._launch import launch
from remix_kernels._triton import padded

_SORT_BLOCK = 128  # pairs a program of the sort ranks


class Pairs(NamedTuple):
    """(row, slot) pairs sorted by (expert, slot), on the device."""

    order: Tensor  # [P k] int32: position p top_k + j in the index
    offsets: Tensor  # [n top_k + 1] int32


@triton.jit
def _groups(index_ptr, offs, mask, TOP_K: tl.constexpr, NO_GROUP: tl.constexpr):
    """expert * top_k + slot of the pairs at flat positions `offs`."""
    expert = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int32)
    return tl.where(mask, expert * TOP_K + (offs % TOP_K).to(tl.int32), NO_GROUP)


@triton.jit
def _grouped_sort_count_kernel(
    index_ptr,  # [PAIRS]
    counts_ptr,  # [blocks, GROUPS] int32, out
    PAIRS,
    GROUPS,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_G
    offs = block * BLOCK + tl.arange(0, BLOCK)
    group = _groups(index_ptr, offs, offs < PAIRS, TOP_K, -1)
    offs_g = first + tl.arange(0, BLOCK_G)
    counts = tl.sum((group[:, None] == offs_g[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * GROUPS + offs_g, counts, mask=offs_g < GROUPS)


@triton.jit
def _grouped_sort_scatter_kernel(
    index_ptr,  # [PAIRS]
    starts_ptr,  # [blocks, GROUPS] int32: sorted position of the block's first pair of a group
    order_ptr,  # [PAIRS] int32, out
    PAIRS,
    GROUPS,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    offs = block * BLOCK + lane
    mask = offs < PAIRS
    group = _groups(index_ptr, offs, mask, TOP_K, -1)
    earlier = (group[:, None] == group[None, :]) & (lane[None, :] < lane[:, None])
    place = tl.sum(earlier.to(tl.int32), axis=1)
    start = tl.load(starts_ptr + block * GROUPS + group, mask=mask, other=0)
    tl.store(order_ptr + start + place, offs.to(tl.int32), mask=mask)


def sort_pairs(index: Tensor, n: int) -> Pairs:
    """index [P, k] -> its pairs sorted by (expert, slot), stable; all on the device."""
    top_k, pairs = index.shape[1], index.numel()
    groups, blocks = n * top_k, triton.cdiv(pairs, _SORT_BLOCK)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    counts = torch.empty(blocks, groups, dtype=torch.int32, device=index.device)
    block_g = min(64, padded(groups))
    sizes = {"PAIRS": pairs, "GROUPS": groups, "TOP_K": top_k}
    launch(
        _grouped_sort_count_kernel,
        (blocks, triton.cdiv(groups, block_g)),
        index_ptr=index,
        counts_ptr=counts,
        **sizes,
        BLOCK=_SORT_BLOCK,
        BLOCK_G=block_g,
    )
    # By group, then by block: where each block's pairs of each group go.
    ends = counts.T.reshape(-1).cumsum(0, dtype=torch.int32)
    starts = (ends.view(groups, blocks) - counts.T).T.contiguous()
    offsets = torch.zeros(groups + 1, dtype=torch.int32, device=index.device)
    offsets[1:] = ends.view(groups, blocks)[:, -1]
    launch(
        _grouped_sort_scatter_kernel,
        (blocks,),
        index_ptr=index,
        starts_ptr=starts,
        order_ptr=order,
        **sizes,
        BLOCK=_SORT_BLOCK,
    )
    return Pairs(order, offsets)


def tile_ends(pairs: Pairs, top_k: int, size: int, *, by_slot: bool) -> Tensor:
    """Tiles of `size` pairs of all experts up to each one: [slots, n], or [1, n] over slots."""
    bounds = pairs.offsets if by_slot else pairs.offsets[::top_k]
    tiles = (bounds.diff() + (size - 1)) // size
    return tiles.view(-1, top_k if by_slot else 1).T.cumsum(1, dtype=torch.int32).contiguous()

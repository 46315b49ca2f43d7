"""One decoded token: the shortest way through a routed layer.

A decoded token meets every layer once, and the caches are cold: what Python does in a layer costs
as much as what the processor computes. So this way asks the fewest questions that tell whether it
is enough, the likeliest to fail first, and reads the chosen experts in place.
"""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_kernels._costs import Costs, costs
from remix_kernels._dispatch import resolve_strategy
from remix_model.nonfinite import check_chosen

if TYPE_CHECKING:
    from remix_model.layer import Pool


def is_plain(base: nn.Module) -> bool:
    """Whether base(x) is x W^T + b and no more: no other class, no hooks, nothing watching."""
    return (
        type(base) is nn.Linear
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and not base._backward_hooks
        and not base._backward_pre_hooks
        and "forward" not in base.__dict__  # as accelerate's offloading replaces it
        and type(base._parameters["weight"]) in (nn.Parameter, Tensor)  # not torchao's own kinds
        and base._parameters["weight"].is_floating_point()  # type: ignore[union-attr]
    )


def decode_row(x: Tensor, base: nn.Linear, pool: Pool, training: bool) -> Tensor | None:
    """base(x) plus the top k adapters of the one row of x, without gradients.

    Args:
        x: One row, [..., in].
        base: The frozen linear, plain.
        pool: The adapters.
        training: The layer's mode.

    Returns:
        [..., out]; None where this way is not enough: anything draws, forces or records, another
        dtype or device, a backend or strategy that reads its experts differently.
    """
    site, lora_A, lora_B, router = pool[:4]
    weight: Any = base._parameters["weight"]
    fp32 = torch.float32
    if torch.compiler.is_compiling() or not (
        site.is_idle()
        and x.dtype is fp32
        and weight.dtype is fp32
        and lora_A.dtype is fp32
        and lora_B.dtype is fp32
        and router.dtype is fp32
        and x.is_cpu
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and _reads_chosen(pool, site.top_k)
    ):
        return None
    site.note_top_k(training)
    y = nn.functional.linear(x, weight, base._parameters["bias"])
    row, out, scaling = x.view(-1), y.view(-1), pool.scaling
    largest, index = router.mv(row).topk(site.top_k)
    if not math.isfinite(sum(largest.tolist())):
        check_chosen(largest, site.name)
    for i in index.tolist():
        out.addmv_(lora_B[i], lora_A[i].mv(row), alpha=scaling)
    return y


def _reads_chosen(pool: Pool, top_k: int) -> bool:
    """Whether the PyTorch backend would take the gather strategy."""
    if pool.backend != "torch" and (pool.backend != "auto" or "REMIX_BACKEND" in os.environ):
        return False
    n, out_features, r = pool.lora_B.shape
    return _gathers_one(pool.strategy, pool.lora_A.shape[2], out_features, n, r, top_k, costs())


@functools.lru_cache(maxsize=4096)
def _gathers_one(
    strategy: str, in_features: int, out_features: int, n: int, r: int, top_k: int, _: Costs
) -> bool:
    lora_A = torch.empty(n, r, in_features, device="meta")
    lora_B = torch.empty(n, out_features, r, device="meta")
    return resolve_strategy(strategy, 1, lora_A, lora_B, top_k, torch.float32) == "gather"

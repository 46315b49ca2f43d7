"""HydraLoRA: one A for all, n heads B_i, mixed by a dense softmax.

    y = W x + s sum_i softmax(P x)_i B_i A x

Source: Tian et al. 2024, arXiv 2404.19245, section 3.
"""

from __future__ import annotations

from typing import ClassVar

from remix_model.routers.base import Router, register_router


@register_router("hydralora")
class HydraLoRARouter(Router):
    """All heads for every row; top_k is num_experts."""

    dense: ClassVar[bool] = True
    shared_a: ClassVar[bool] = True

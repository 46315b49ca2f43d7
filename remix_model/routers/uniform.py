"""Uniform: every row takes k experts at random, in training and after it; nothing is learned.

What a router has to beat. The draws outside `sample_routing` come from torch's own generator, as
dropout's do: `torch.manual_seed` repeats them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from remix_model.routers.base import Router, register_router


@register_router("uniform")
class UniformRouter(Router):
    """logits = 0."""

    learned = False
    random: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}

    def parameter_shape(self, in_features: int) -> None:
        """It has none."""

    def logits(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """[..., in] -> [..., n] zeros."""
        return x.new_zeros((*x.shape[:-1], self.num_experts))

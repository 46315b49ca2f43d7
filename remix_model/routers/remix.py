"""ReMix: a linear policy; its experts weigh the same, and RLOO trains it (sections 3.1, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from remix_model.routers.base import Router, register_router


@register_router("remix")
class ReMixRouter(Router):
    """logits = P x."""

    learned = False
    linear: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}

    def gradient(
        self, dlogits: Tensor, x: Tensor, weight: Tensor, need_dx: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dP = dlogits^T x, dx = dlogits P."""
        return dlogits.T @ x, dlogits @ weight if need_dx else None

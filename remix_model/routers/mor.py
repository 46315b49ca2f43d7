"""Mixture of Routers: sub-routers choose together, a main router weighs their votes.

    g = softmax(W_main x)    s = sum_i g_i softmax(W_i x)    the k largest of s, renormalised

s is a distribution over the experts, so it may also be a policy: router_kwargs={"train": "rloo"}
gives the chosen experts ReMix's constant weight and trains s by RLOO. The formula is read off the
abstract of arXiv 2503.23362; the number of sub-routers is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remix_model.routers.base import Router, register_router

TRAINS = ("weights", "rloo")


@register_router("mor")
class MoRRouter(Router):
    """The parameter is [N + N n, in]: the main router above N sub-routers."""

    options: ClassVar[Mapping[str, Any]] = {**Router.options, "num_routers": 2, "train": "weights"}

    def check(self) -> None:
        """Raise ValueError for an option that is out of range."""
        super().check()
        count, train = self.kwargs["num_routers"], self.kwargs["train"]
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1024:
            raise ValueError(f"router_kwargs: num_routers={count!r} must be from 1 to 1024")
        if train not in TRAINS:
            raise ValueError(
                f"router_kwargs: train={train!r} is unknown; choose one of {', '.join(TRAINS)}"
            )
        self.learned = train == "weights"

    def parameter_shape(self, in_features: int) -> tuple[int, ...]:
        """[N + N n, in]."""
        return (self.kwargs["num_routers"] * (1 + self.num_experts), in_features)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """log s, [..., n]."""
        count = self.kwargs["num_routers"]
        main, votes = nn.functional.linear(x, weight).split((count, count * self.num_experts), -1)
        votes = votes.unflatten(-1, (count, self.num_experts)).log_softmax(-1)
        return torch.logsumexp(main.log_softmax(-1).unsqueeze(-1) + votes, -2)

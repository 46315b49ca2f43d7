"""Which parameters learn at which rate, and from which step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


def give_group(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], **options: float
) -> None:
    """Move parameters to an optimizer group of their own; none are fine."""
    if not parameters:
        return
    moved = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    # An empty group has no state in a sharded checkpoint, and would come back without its rate.
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": parameters, **options})


class RouterWait(TrainerCallback):
    """Leaves the routers out of the optimizer's first steps."""

    def __init__(self, steps: int, router_ids: Callable[[], set[int]]) -> None:
        """Take how many steps they wait, and what finds them: parameters' ids."""
        self.steps = steps
        self.router_ids = router_ids

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Take the routers' gradients away; zeros would count as steps of Adam's averages."""
        if state.global_step >= self.steps:
            return
        routers = self.router_ids()
        for parameter in model.parameters():
            if id(parameter) in routers:
                parameter.grad = None

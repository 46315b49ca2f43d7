"""A dense start: all n experts at first, then fewer, until tokens take the k of their pool.

While a row takes t of the experts rather than k, each weighs omega k / t. So what the layer adds is
the same on average over evenly drawn subsets, whatever t: with t = n it is that average, and every
expert learns from every token. The routers learn meanwhile, from subsets of t; of n there is one.

Ours; the paper trains with k throughout.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from remix_model.site import find_sites


def experts_at(step: int, steps: int, num_experts: int, top_k: int) -> int:
    """How many experts a row takes in a step: n in the first, k from `steps` on, linear between."""
    if step >= steps:
        return top_k
    return num_experts - (num_experts - top_k) * step // steps


def take(model: nn.Module, step: int, steps: int) -> None:
    """Have every site of a model take as many experts as a step of a dense start wants."""
    for site in find_sites(model).values():
        site.top_k = experts_at(step, steps, site.num_experts, site.router.top_k)


class DenseStart(TrainerCallback):
    """Inside a training step more experts are taken; evaluation and saves have the k largest."""

    def __init__(self, steps: int) -> None:
        """Take how many steps it lasts."""
        self.steps = steps

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """As many as this step wants."""
        take(model, state.global_step, self.steps)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """As many as ever after."""
        take(model, self.steps, self.steps)

"""The autograd boundary of every log-probability of a selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """One way to compute a log-probability, with its gradient in closed form."""

    forward: Callable[[Tensor, Tensor], Tensor]  # logits [T, n], index [T, k] -> [T]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]  # and grad [T] -> dlogits [T, n]


class LogProb(torch.autograd.Function):
    """log-probability [T] of index [T, k] under logits [T, n], differentiable once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, score: Score) -> Tensor:
        index = index.contiguous()
        ctx.save_for_backward(logits, index)
        ctx.score = score
        return score.forward(logits, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, index = ctx.saved_tensors
        return ctx.score.backward(logits, index, grad), None, None

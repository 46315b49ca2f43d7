"""Gradients of parts that were backpropagated before the loss was complete.

`routing.add` may call backward on a part at once, to let go of its graph. By what factor the user
will scale the loss (loss scale, accumulation, averaging over ranks) is not known then, so the
parameters' gradients are taken aside, and the loss's own backward pass hands them to the
parameters: times that factor, and before DDP reduces them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HeldGradients:
    """Sums of gradients beside the parameters' own."""

    def __init__(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Args are the trained parameters, and what losses are multiplied by (a loss scale)."""
        self._parameters = list(parameters)
        self._sums: dict[int, Tensor] = {}
        self.scale = scale
        self._missing: dict[int, Tensor] = {}
        self._factor = torch.ones(())
        self._hooks: list[RemovableHandle] = []

    def backward(self, loss: Tensor) -> None:
        """Backpropagate loss times the scale; parameters keep the gradients that they had.

        Raises:
            RuntimeError: No gradient arrived.
        """
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            with torch.enable_grad():
                (loss * self.scale).backward()
            if all(parameter.grad is None for parameter in self._parameters):
                raise RuntimeError(
                    "a part of routing.parts left no gradient: FSDP2 holds them back after "
                    "set_requires_gradient_sync(False), where they would be added to others. With "
                    "selection_chunk_size reduce them every time (accelerate: sync_each_batch=True)"
                )
            for i, parameter in enumerate(self._parameters):
                if parameter.grad is None:
                    continue
                if i in self._sums:
                    self._sums[i].add_(parameter.grad)
                else:
                    self._sums[i] = parameter.grad
        finally:
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = grad

    def begin(self, factor: Tensor) -> None:
        """A backward pass has begun: parameters will get their held gradients, times a factor.

        By a hook on each parameter, which runs where its gradient arrives: before DDP reduces it,
        and once, whatever segments re-entrant checkpointing cuts the pass into.
        """
        self.drop_hooks()
        factor = factor / self.scale
        self._missing = dict(self._sums)
        self._factor = factor
        self._hooks = [
            self._parameters[i].register_hook(lambda grad, i=i: self._add(grad, i))
            for i in self._sums
        ]

    def end(self) -> None:
        """The backward pass is over. Parameters that it did not reach get theirs now."""
        missing = list(self._missing)
        for i in missing:
            parameter = self._parameters[i]
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._add(own, i)
        self.drop_hooks()

    def drop_hooks(self) -> None:
        """Nothing is handed over any more; the sums stay, for another backward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._missing = [], {}

    def _add(self, grad: Tensor, i: int) -> Tensor:
        held = self._missing.pop(i, None)
        if held is None:
            return grad
        return grad + (held * self._factor.to(held.device)).to(grad.dtype)

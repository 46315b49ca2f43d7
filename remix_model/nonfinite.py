"""Where numbers stop being finite: routers refuse to choose by them, and their origin is found."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from remix_model.errors import NonFiniteError


def check_chosen(largest: Tensor, name: str) -> None:
    """Refuse to route by logits that are no numbers: experts chosen by nan mean nothing.

    Looked at on a processor, where it costs no synchronisation; elsewhere under REMIX_STRICT=1.

    Args:
        largest: [..., k], the chosen logits; nan counts as the largest of all.
        name: Of the layer, for the message.

    Raises:
        NonFiniteError: One is nan.
    """
    if torch.compiler.is_compiling() or largest.numel() == 0:
        return
    if largest.device.type != "cpu" and os.environ.get("REMIX_STRICT") != "1":
        return
    if not math.isfinite(largest.sum()):
        raise NonFiniteError(
            f"the router of {name or 'a layer'} made logits that are not finite: look at "
            "the layer's input, or at the router's weights"
        )


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Look at what every module returns, for as long as the context is open.

    Looking waits for the device after every module: for a pass that is repeated to find out.

    Args:
        model: Its modules are watched.

    Yields:
        Sentences about the modules with outputs that are not finite, in the order in which they
        returned: the first one is where it began.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(map(_is_finite, tree_leaves(output))):
                found.append(_describe(name, module))

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _describe(name: str, module: nn.Module) -> str:
    weights = [key for key, value in module.named_parameters(name) if not _is_finite(value)]
    cause = f", and so are numbers in {weights[0]}" if weights else ""
    return f"the first module whose output is not finite is {name} ({type(module).__name__}){cause}"

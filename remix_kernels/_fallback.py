"""A kernel that fails on someone's GPU must not stop their training: one warning, then PyTorch.

REMIX_STRICT=1 raises instead, as tests and benchmarks want it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from remix_kernels._launch import KernelError
from remix_kernels._routed import Call, Grads, Kept, Needs, Strategy

_warned: set[str] = set()


def or_else(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    """first, or second where a kernel of first's fails."""

    def run(*args: Any) -> Any:
        try:
            return first(*args)
        except KernelError as error:
            _note(error)
            return second(*args)

    return run


def guarded(kernels: Strategy, torch_twin: Strategy) -> Strategy:
    """The Triton strategy, each of its passes backed by the PyTorch one."""

    def prepare(call: Call, learned: bool) -> Kept:
        try:
            return kernels.prepare(call, learned)
        except KernelError as error:
            _note(error)
            return Kept(host="torch")

    def forward(call: Call, kept: Kept) -> Tensor:
        if kept.host != "torch":
            try:
                return kernels.forward(call, kept)
            except KernelError as error:
                _note(error)
        return torch_twin.run(call)

    def backward(call: Call, kept: Kept, dy: Tensor, need: Needs) -> Grads:
        if kept.host != "torch":
            try:
                return kernels.backward(call, kept, dy, need)
            except KernelError as error:
                _note(error)
        return torch_twin.backward(call, torch_twin.prepare(call, need.weights), dy, need)

    return Strategy(prepare, forward, backward)


def _note(error: KernelError) -> None:
    if os.environ.get("REMIX_STRICT") == "1":
        raise error
    if str(error) not in _warned:
        _warned.add(str(error))
        warnings.warn(
            f"a Triton kernel failed and PyTorch takes its place: {error}. Please report it; "
            "REMIX_STRICT=1 shows the whole error",
            stacklevel=4,
        )

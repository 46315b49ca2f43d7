"""Where every Triton kernel is launched: on its tensors' device, by name, and observably.

A kernel that cannot be compiled or launched on someone's GPU raises `KernelError`, which
`_fallback.py` turns into one warning and the PyTorch backend. `observe` shows launches to a
listener: ahead-of-time compilation records them instead of running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

Grid = tuple[int, ...]
Observer = Callable[[Any, Grid, dict[str, Any]], bool]  # -> whether to run the kernel as well

_observers: list[Observer] = []


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched; the message names it and the reason."""


def launch(kernel: Any, grid: Grid, **arguments: Any) -> None:
    """Run `kernel` over `grid` (skipped when empty), on the device of its tensors.

    Raises:
        KernelError: It did not compile or launch.
    """
    if 0 in grid:
        return
    wanted = [observer(kernel, grid, arguments) for observer in _observers]
    if not all(wanted):
        return
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    try:
        with _on(tensor.device):
            kernel[grid](**arguments)
    except (triton.TritonError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelError(f"{kernel.fn.__name__}: {reason[0]}") from error


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Show `observer` every launch inside the context."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)

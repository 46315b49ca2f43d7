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

from remix_kernels import _autotune
from remix_kernels._autotune import Config, Grid

Observer = Callable[[Any, Grid, dict[str, Any]], bool]  # -> whether to run the kernel as well

_observers: list[Observer] = []


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched; the message names it and the reason."""


def launch(
    kernel: Any,
    grid: Grid | Callable[[Config], Grid],
    config: Config | None = None,
    fixed: tuple[str, ...] = (),
    /,
    **arguments: Any,
) -> None:
    """Run `kernel` over `grid` (skipped when empty), on the device of its tensors.

    Args:
        kernel: A jitted function.
        grid: Programs a dimension, or a function of the configuration that says so.
        config: Block sizes, warps and stages; REMIX_AUTOTUNE=1 may choose others.
        fixed: Names in config that others rely on: not searched.
        arguments: The kernel's, by name.

    Raises:
        KernelError: It did not compile or launch.
    """
    config = config or {}
    programs = grid(config) if callable(grid) else grid
    if 0 in programs:
        return
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    if callable(grid) and _autotune.enabled(tensor.device):
        with _on(tensor.device):
            config = _autotune.best(kernel, grid, config, fixed, arguments)
        programs = grid(config)
    wanted = [observer(kernel, programs, {**arguments, **config}) for observer in _observers]
    if not all(wanted):
        return
    try:
        with _on(tensor.device):
            kernel[programs](**arguments, **config)
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

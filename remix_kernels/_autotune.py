"""REMIX_AUTOTUNE=1: look for better block sizes than the shipped ones, once, and remember them.

Off by default: a search takes seconds a kernel and shape, and every kernel has a configuration that
works (`_configs.py`). With it, the first launch of a kernel at a shape tries the neighbours of the
shipped configuration, one parameter after another, on copies of its arguments (some kernels add to
what they are given), and keeps the fastest. Row counts are rounded up to powers of two first, so
that a new batch size does not search again. What was found is kept in

    $REMIX_CACHE_DIR/autotune/<device>-triton<version>.json        (default: ~/.cache/remix)

A file that cannot be read is searched for anew; one that cannot be written costs a warning. Another
configuration may round differently: results are the same on every run of one machine, not on two.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Config = dict[str, int]
Grid = tuple[int, ...]

_ROWS = {"T", "P", "BASE_ROWS", "X_ROWS", "V_ROWS"}  # counts of rows: rounded up
_IGNORED = ("stride", "scale", "slot", "plane_rows")  # do not say how much work there is
_CHOICES = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}
_LEAST, _MOST = 16, 256  # a block; tensor cores want 16


def enabled(device: torch.device) -> bool:
    """Whether launches on this device look for their configuration."""
    return os.environ.get("REMIX_AUTOTUNE") == "1" and device.type == "cuda"


def best(
    kernel: Any,
    grid: Callable[[Config], Grid],
    config: Config,
    fixed: tuple[str, ...],
    arguments: dict[str, Any],
) -> Config:
    """The fastest configuration known for this launch, after a search where there is none.

    Args:
        kernel: A jitted function.
        grid: Programs a dimension, from a configuration.
        config: The shipped configuration: where the search starts, and the answer while a CUDA
            graph is being captured.
        fixed: Names in config that must stay.
        arguments: The kernel's, by name.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    path = cache_file(device)
    known, key = _load(path), key_of(kernel, config, fixed, arguments)
    found = known.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return config
        try:
            found = _search(kernel, grid, config, fixed, arguments)
        except torch.OutOfMemoryError:  # no room for the copies: at this size, as shipped
            return config
        known[key] = found
        _save(path, key, found)
    return {**config, **found}


def key_of(kernel: Any, config: Config, fixed: tuple[str, ...], arguments: dict[str, Any]) -> str:
    """What two launches share that may share a configuration."""
    parts = [kernel.fn.__name__]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append(f"{name}:{str(value.dtype).removeprefix('torch.')}")
        elif name.startswith("stride"):
            parts += [name] if value == 1 else []
        elif name.startswith(_IGNORED):
            continue
        elif name in _ROWS:
            parts.append(f"{name}={triton.next_power_of_2(max(value, 1))}")
        else:
            parts.append(f"{name}={value}")
    return " ".join([*parts, *(f"{name}={config[name]}" for name in fixed)])


def neighbours(config: Config, name: str) -> Iterator[Config]:
    """Configurations that differ from `config` in one parameter."""
    value = config[name]
    if name in _CHOICES:
        yield from ({**config, name: choice} for choice in _CHOICES[name] if choice != value)
    elif name.startswith("BLOCK"):
        sizes = (value // 2, value * 2)
        yield from ({**config, name: size} for size in sizes if _LEAST <= size <= _MOST)


def _search(
    kernel: Any,
    grid: Callable[[Config], Grid],
    config: Config,
    fixed: tuple[str, ...],
    arguments: dict[str, Any],
) -> Config:
    """Better each parameter in turn, from the shipped configuration."""
    started, copies = time.perf_counter(), _copies(arguments)
    shipped = fastest = _measure(kernel, grid(config), {**copies, **config})
    chosen, tried = config, 1
    for name in config:
        if name in fixed:
            continue
        for other in list(neighbours(chosen, name)):
            taken = _measure(kernel, grid(other), {**copies, **other})
            tried += 1
            if taken < fastest:
                fastest, chosen = taken, other
    print(
        f"remix: tuned {kernel.fn.__name__}: {tried} configurations in "
        f"{time.perf_counter() - started:.1f} s, {shipped / fastest:.2f} x as fast as shipped",
        file=sys.stderr,
        flush=True,
    )
    return chosen


def _measure(kernel: Any, programs: Grid, arguments: dict[str, Any]) -> float:
    """Milliseconds of one launch, infinite where it cannot run."""
    from triton.testing import do_bench

    try:
        return float(
            do_bench(lambda: kernel[programs](**arguments), warmup=10, rep=40, return_mode="median")
        )
    except (triton.TritonError, RuntimeError, NotImplementedError):  # too large for this device
        return float("inf")


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every tensor in memory of its own, sharing it where they shared it."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        fresh.set_(
            storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        return fresh

    with torch.no_grad():
        return {
            name: copy(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }


def cache_file(device: torch.device) -> Path:
    """Where this device's configurations are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("REMIX_CACHE_DIR") or Path(cache) / "remix")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return folder / "autotune" / f"{slug}-triton{triton.__version__}.json"


@lru_cache(maxsize=16)
def _load(path: Path) -> dict[str, Config]:
    """What the file says, kept for this process; nothing where it does not say it properly."""
    return _read(path)


def _read(path: Path) -> dict[str, Config]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {str(n): int(v) for n, v in c.items()} for key, c in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _save(path: Path, key: str, config: Config) -> None:
    """Add one entry to the file as it is now: other processes search too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(path), key: config}, indent=1)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"REMIX_AUTOTUNE: {path} is not written ({error})", stacklevel=2)

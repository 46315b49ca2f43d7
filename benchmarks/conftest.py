"""Microbenchmarks for pytest-benchmark: `pytest benchmarks --benchmark-only`.

On this machine's GPU in bf16 where there is one, else on two threads in fp32. To compare commits:
--benchmark-save NAME at one, --benchmark-compare at the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.common import environment, prepare_cpu


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """Where to run."""
    prepare_cpu()
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    """What to run in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.fixture
def timed(benchmark: Any, device: str) -> Callable[[Callable[[], object]], None]:
    """Time a function until the GPU has done it; with the row's origin beside it."""
    benchmark.extra_info.update(environment())

    def time(run: Callable[[], object]) -> None:
        def whole() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        run()
        benchmark(whole)

    return time

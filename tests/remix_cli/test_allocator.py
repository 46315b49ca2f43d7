"""The allocator keeps freed memory where it is asked to, and leaves other settings alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from remix_cli.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_is_faulted_in_once() -> None:
    def faults(mode: str) -> int:
        run = [sys.executable, "-c", SCRIPT, mode]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, default = faults("keep"), faults("default")
    assert kept < default / 4, (kept, default)


@pytest.mark.parametrize(
    "setting",
    [{"MALLOC_MMAP_THRESHOLD_": "1048576"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}],
)
def test_the_environment_goes_first(setting: dict[str, str]) -> None:
    script = "from remix_cli.allocator import keep_freed_memory as keep; print(keep())"
    run = [sys.executable, "-c", script]
    done = subprocess.run(
        run, capture_output=True, text=True, check=True, env={**os.environ, **setting}
    )
    assert done.stdout.strip() == "False"

"""The allocator keeps freed memory where it is asked to, and leaves other settings alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from remix_cli.allocator import keep_freed_memory

def faults():
    for _ in range(10):
        torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_is_faulted_in_once() -> None:
    run = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
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

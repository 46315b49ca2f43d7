"""The C library's allocator, told to keep what it has: for training on a processor."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor, as torch does for a GPU's.

    By default every large tensor is mapped anew and given back when freed; each of its pages is
    then faulted in again at the next step, which on virtual machines costs as much as the
    arithmetic. The peak rises by some per cent, and memory goes back to the system at exit only.

    Returns:
        Whether it was done: not where the C library is another, and not where MALLOC_MMAP_MAX_ and
        its like, or GLIBC_TUNABLES, say how glibc's allocator should behave. (One that was
        preloaded in its place does not listen.)
    """
    chosen = any(name.startswith(("MALLOC_MMAP", "MALLOC_T")) for name in os.environ)
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))

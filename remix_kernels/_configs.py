"""One block configuration per (kernel, architecture, shape bucket), and which GEMM runs.

A bucket is the element size, the columns or rank (to the next power of two) and whether rows are
aligned; in the grouped strategy also how many pairs an expert has on average. The dense strategy's
is never the number of rows: with our own GEMM a row's result is the same bits in any batch.

The numbers were chosen by ahead-of-time compilation (registers, spills, shared memory:
`python -m benchmarks.compile_report`), not by timing: no GPU has measured them yet. An architecture
that is not listed gets those of sm_80.
"""

from __future__ import annotations

import functools
import os

import torch
import triton

from remix_kernels._triton import INTERPRET, padded

Config = dict[str, int]
CUBLAS_ABOVE = 512  # columns, by the roofline of an H100; not measured


def arch(device: torch.device) -> str:
    """sm_80, sm_90, sm_100, gfx942, ... or "interpreter"."""
    if device.type != "cuda":
        return "interpreter" if INTERPRET else "sm_80"
    return _arch_of(device.index or 0)


@functools.lru_cache(maxsize=16)
def _arch_of(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{10 * major + minor}"


def own_gemm() -> bool:
    """Whether routed_linear's frozen product runs in our K-extended kernel rather than in cuBLAS.

    REMIX_GEMM=triton asks for it: then a row's result does not depend on the other rows of the
    batch, bit for bit. cuBLAS is the default until a GPU has shown where ours is faster.
    """
    choice = os.environ.get("REMIX_GEMM", "torch")
    if choice not in ("torch", "triton"):
        raise ValueError(f"REMIX_GEMM={choice!r} is unknown; choose torch or triton")
    return choice == "triton"


def adds_in_cublas(columns: int) -> bool:
    """Whether y += H B runs in cuBLAS: where it is arithmetic that takes the time, not memory.

    2 R FLOPs for each element of y that is read and written: from a few hundred columns on.
    """
    return columns > CUBLAS_ABOVE and not own_gemm()


def shrink(where: str, itemsize: int, columns: int, *, heavy: bool = False) -> Config:
    """A few columns of a long product: x A^T, dy B.

    Heavy on registers are a sum over selections, and rows that take an address a number.
    """
    if where == "interpreter":
        return {"BLOCK_M": 32, "BLOCK_R": min(32, padded(columns)), "BLOCK_K": 32}
    most = 32 if itemsize == 4 else 64 if where.startswith("gfx") else 128  # 64 KiB there
    block_r = min(most, padded(columns))
    return {
        "BLOCK_M": 64,
        "BLOCK_R": block_r,
        "BLOCK_K": 32 if itemsize == 4 else 64,
        "num_warps": 8 if block_r > 64 or heavy else 4,
        "num_stages": 3,
    }


def expand(where: str, itemsize: int, inner: int, *, fused: bool, aligned: bool) -> Config:
    """A tile of y: the low-rank columns, after the frozen GEMM's where that is fused.

    Rows of y that are not aligned to 16 bytes take an address a number, and so smaller tiles.
    """
    if where == "interpreter":
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 16, "GROUP_M": 2}
    block_r = min(32 if itemsize == 4 else 64, padded(inner))
    if itemsize == 4 or not aligned:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4}
    elif fused and where in ("sm_90", "sm_100"):
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8}
    stages = 2 if where.startswith("gfx") else 3  # 64 KiB there, and adapters may be fp32
    return {**tile, "BLOCK_R": block_r, "GROUP_M": 8, "num_stages": stages}


def gram(where: str, itemsize: int, columns: int, *, aligned: bool) -> Config:
    """A few rows of a product over T: dA, dB."""
    if where == "interpreter":
        return {"BLOCK_R": min(32, padded(columns)), "BLOCK_N": 32, "BLOCK_M": 32}
    block_r = min(64 if itemsize == 4 else 128, padded(columns))  # v is read once a block of rows
    return {
        "BLOCK_R": block_r,
        "BLOCK_N": 128 if aligned else 64,
        "BLOCK_M": 32,
        "num_warps": 8 if block_r > 64 else 4,
        "num_stages": 3,
    }


def one_pass(where: str, itemsize: int, *, aligned: bool) -> Config:
    """A block of rows of dy, at up to 32 columns of the pool: dH and dB."""
    if where == "interpreter":
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_R": 32}
    if itemsize == 4 or not aligned or where.startswith("gfx"):
        return {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_R": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_R": 32, "num_warps": 8, "num_stages": 3}


def column_chunk(where: str) -> int:
    """Columns of dy that one program of the one-pass kernel takes."""
    return 64 if where == "interpreter" else 2048


def plane_rows(where: str) -> int:
    """Rows that one program of the Gram kernel sums."""
    return 64 if where == "interpreter" else 4096


def grouped_shrink(where: str, itemsize: int, rank: int, pairs_each: int) -> Config:
    """One expert's pairs times its A (or B); each has about `pairs_each` of them."""
    if where == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 32}
    block_m = _tile_rows(where, itemsize, rank, pairs_each, most=128)
    return {
        "BLOCK_M": block_m,
        "BLOCK_R": min(32 if itemsize == 4 else 128, padded(rank)),
        "BLOCK_K": 32 if itemsize == 4 else 64,
        "num_warps": 4 if block_m == 64 else 8,
        "num_stages": 3,
    }


def grouped_expand(
    where: str, itemsize: int, rank: int, pairs_each: int, *, aligned: bool
) -> Config:
    """One expert's rank-sized pairs to tiles of y; each has about `pairs_each` in a slot."""
    if where == "interpreter":
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 16, "COLUMN_BLOCKS": 2}
    block_m = _tile_rows(where, itemsize, rank, pairs_each, most=256) if aligned else 64
    block_n = 128 if itemsize == 2 and aligned and block_m < 256 else 64  # 256 x 128 spill
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_R": min(32 if itemsize == 4 else 64, padded(rank)),
        "COLUMN_BLOCKS": 512 // block_n,  # of one program, which keeps its H
        "num_warps": 4 if block_m == 64 else 8,
        "num_stages": 2,
    }


def _tile_rows(where: str, itemsize: int, rank: int, pairs_each: int, most: int) -> int:
    """Rows of a tile of one expert's pairs: an expert's weights are read once a tile."""
    if rank < 32 or itemsize == 4 or where.startswith("gfx"):
        return 64
    return max(64, min(most, triton.next_power_of_2(pairs_each)))


def grouped_gram(where: str, itemsize: int, rank: int) -> Config:
    """One expert's chunk of pairs to rank rows of dA or dB."""
    if where == "interpreter":
        return {"BLOCK_R": 16, "BLOCK_N": 32, "BLOCK_M": 16, "CHUNK": 32}
    return {
        "BLOCK_R": min(64, padded(rank)),
        "BLOCK_N": 128,
        "BLOCK_M": 32,
        "CHUNK": 4096,
        "num_warps": 4,
        "num_stages": 3,
    }


def aligned(y: torch.Tensor) -> bool:
    """Whether every row of y begins at 16 bytes."""
    return y.shape[1] * y.element_size() % 16 == 0


def gather_shrink(where: str, rank: int) -> Config:
    """A few ranks of one expert for one row."""
    if where == "interpreter":
        return {"BLOCK_R": 2, "BLOCK_K": 32}
    return {"BLOCK_R": min(4, triton.next_power_of_2(rank)), "BLOCK_K": 512, "num_warps": 4}


def gather_expand(where: str, rank: int) -> Config:
    """A tile of one row of y."""
    if where == "interpreter":
        return {"BLOCK_N": 32, "BLOCK_R": 4}
    return {"BLOCK_N": 256, "BLOCK_R": min(16, triton.next_power_of_2(rank)), "num_warps": 4}

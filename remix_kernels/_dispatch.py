"""The one place that picks a backend and a strategy, with the cost model that it picks by.

Strategy. Per call and per row, in multiply-adds (T rows, n experts of rank r, k chosen):

    dense    3 n r (in + out)            forward 1, backward 2
    grouped  3 k r (in + out)            plus k passes over x, y, dy, dx, and a fixed cost an expert
    gather   k r (in + out)              plus a fixed cost a (row, slot): decoding only

The model turns these into seconds by the constants of `_costs.py`, with the bytes of x and y that
are moved and the bytes of the adapters that are read: it is linear in the constants, so that
`remix bench --calibrate` can fit them to any machine. On a GPU a roofline decides instead:
`gpu_costs_s`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import Tensor

from remix_kernels._costs import SHIPPED, Costs, costs

BACKENDS = ("auto", "torch", "triton", "reference")
STRATEGIES = ("auto", "dense", "grouped", "gather")

_GPU_FLOP_PER_S = 6.0e14  # an H100's 16-bit tensor cores, as GEMMs reach them
_GPU_BYTES_PER_S = 3.0e12
_GPU_LAUNCH_S = 3.0e-6


def resolve_backend(backend: str, x: Tensor) -> str:
    """The backend to run: an explicit one, else REMIX_BACKEND, else Triton on a GPU, else torch.

    Raises:
        ValueError: The name is unknown, or the backend is not available for x.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("REMIX_BACKEND", "auto"), "REMIX_BACKEND"
        if backend == "auto":
            on_gpu = x.device.type == "cuda" and why_no_triton(x) is None
            return "triton" if on_gpu else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        reason = why_no_triton(x)
        if reason is not None:
            raise ValueError(f"{source}='triton' is not available: {reason}")
    return backend


def why_no_triton(x: Tensor) -> str | None:
    """Why the kernels cannot run on x, with what would help; None where they can."""
    reason = _why_no_triton_here(x.device.type)
    if reason is None and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, the kernels take fp32, fp16 and bf16; use backend='torch'"
    return reason


def _why_no_triton_here(device: str) -> str | None:
    reason = _why_no_triton_installed()
    if reason is not None or device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return reason
    return (
        f"x is on {device}, where Triton does not compile; use backend='torch', or set "
        "TRITON_INTERPRET=1 before Python starts to run the kernels in the (slow) interpreter"
    )


@functools.cache
def _why_no_triton_installed() -> str | None:
    try:
        import triton
    except ImportError:
        return (
            "the package triton is not installed; run `pip install 'triton>=3.6'` (Linux), or use "
            "backend='torch', which runs on every device"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is too old; upgrade to 3.6, or use backend='torch'"
    return None


def check_strategy(strategy: str) -> None:
    """Raise ValueError for an unknown name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")


def resolve_strategy(
    strategy: str, rows: int, lora_A: Tensor, lora_B: Tensor, top_k: int, dtype: torch.dtype
) -> str:
    """The strategy to run: an explicit one, else the cheapest by the cost model.

    Args:
        strategy: One of STRATEGIES.
        rows: Routed rows, all selections counted.
        lora_A: [n or 1, r, in].
        lora_B: [n, out, r].
        top_k: Experts a row.
        dtype: Of x.
    """
    if strategy != "auto":
        check_strategy(strategy)
        return strategy
    n, out, r = lora_B.shape
    if torch.compiler.is_compiling():
        return "dense"  # the only one without shapes that depend on the data
    shape = (rows, lora_A.shape[2], out, n, top_k, r, dtype.itemsize)
    if lora_B.device.type in ("cpu", "meta"):
        return _cheapest(strategy_costs_s, shape, costs())
    return _cheapest(gpu_costs_s, (*shape, torch.is_grad_enabled()))


@functools.lru_cache(maxsize=4096)
def _cheapest(
    model: Callable[..., dict[str, float]], shape: tuple[int, ...], *constants: Costs
) -> str:
    found = model(*shape, *constants)
    return min(found, key=found.__getitem__)


def strategy_work(
    rows: int, in_features: int, out_features: int, n: int, top_k: int, r: int, itemsize: int
) -> dict[str, Costs]:
    """Units of work over the frozen linear of one forward and backward pass, by strategy."""
    width = in_features + out_features
    busy_experts, pairs = min(n, rows * top_k), rows * top_k
    expert_bytes = float(r * width * itemsize)
    flops_dense, flops_chosen = 6.0 * rows * n * r * width, 6.0 * pairs * r * width
    pair_bytes = 3.0 * pairs * width * itemsize
    return {
        "dense": Costs(flops_dense, n * expert_bytes, 0.0, 1.0, 0.0, 0.0),
        "grouped": Costs(
            flops_chosen, busy_experts * expert_bytes, pair_bytes, 1.0, busy_experts, 0.0
        ),
        "gather": Costs(flops_chosen, pairs * expert_bytes, pair_bytes, 0.0, 0.0, pairs),
    }


def strategy_costs_s(
    rows: int,
    in_features: int,
    out_features: int,
    n: int,
    top_k: int,
    r: int,
    itemsize: int,
    constants: Costs = SHIPPED,
) -> dict[str, float]:
    """Modelled seconds over the frozen linear of one forward and backward pass, by strategy."""
    work = strategy_work(rows, in_features, out_features, n, top_k, r, itemsize)
    prices = astuple(constants)
    return {
        name: sum(units * price for units, price in zip(astuple(done), prices, strict=True))
        for name, done in work.items()
    }


def gpu_costs_s(
    rows: int,
    in_features: int,
    out_features: int,
    n: int,
    top_k: int,
    r: int,
    itemsize: int,
    training: bool,
) -> dict[str, float]:
    """Seconds over the frozen linear by the roofline of each kernel on an H100, by strategy.

    A kernel takes the longer of its FLOPs and its bytes (the formulas of the Triton files), and at
    least a launch. Only ratios decide, and they differ little between accelerators; no GPU has
    measured them yet. Gather has no backward pass of its own.
    """
    wide, k_r = n * r, top_k * max(16, r)
    T, s = rows, itemsize

    def kernels(*work: tuple[float, float]) -> float:
        flops = _GPU_FLOP_PER_S * min(1.0, 2.0 / s)
        return sum(max(f / flops, b / _GPU_BYTES_PER_S, _GPU_LAUNCH_S) for f, b in work)

    def dense(width: int, moved: float) -> tuple[float, float]:
        return 2.0 * T * wide * width, s * (moved * T * width + wide * width + 2.0 * T * wide)

    def grouped(width: int, moved: float) -> tuple[float, float]:
        return 2.0 * T * k_r * width, s * (moved * top_k * T * width + wide * width)

    d, o = in_features, out_features
    found = {
        "dense": kernels(dense(d, 1), dense(o, 2)),
        "grouped": kernels(*[(0.0, 0.0)] * 8, grouped(d, 1), grouped(o, 2)),
    }
    if not training:
        read = s * T * top_k * r
        found["gather"] = kernels((0.0, read * d), (0.0, read * o))
        return found
    found["dense"] += kernels(dense(o, 1), dense(o, 1), dense(d, 1), dense(d, 2))
    found["grouped"] += kernels(grouped(o, 1), grouped(o, 1), grouped(d, 1), grouped(d, 2))
    return found

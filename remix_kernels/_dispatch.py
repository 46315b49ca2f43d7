"""The one place that picks a backend and a strategy, with the cost model that it picks by.

Strategy. Per call and per row, in multiply-adds (T rows, n experts of rank r, k chosen):

    dense    3 n r (in + out)            forward 1, backward 2
    grouped  3 k r (in + out)            plus k passes over x, y, dy, dx, and a fixed cost an expert
    gather   k r (in + out)              plus a fixed cost a (row, slot): decoding only

The model turns these into seconds by the constants below, with the bytes of x and y that are moved
and the bytes of the adapters that are read. The constants were set by hand from timings on two
cores (fp32; `python -m benchmarks.bench_layer --strategies` and decoding shapes); their ratios, not
their sizes, decide. On an accelerator the roofline of docs/design.md decides instead.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "reference")
STRATEGIES = ("auto", "dense", "grouped", "gather")

_FLOP_PER_S = 1.0e11
_BYTES_PER_S = 1.0e10
_DENSE_CALL_S = 6.0e-5
_EXPERT_CALL_S = 2.5e-5  # a non-empty expert, grouped: index_select, two GEMMs, index_add
_SLOT_CALL_S = 1.5e-5  # a (row, slot), gather: two matrix-vector products


def resolve_backend(backend: str, x: Tensor) -> str:
    """The backend to run: an explicit one, else REMIX_BACKEND, else torch.

    Raises:
        ValueError: The name is unknown, or the backend is not available.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("REMIX_BACKEND", "auto"), "REMIX_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise ValueError(
            f"{source}='triton' is not available in this version of remix_kernels (x is on "
            f"{x.device}); use backend='torch', which runs on every device"
        )
    return "torch" if backend == "auto" else backend


def check_strategy(strategy: str) -> None:
    """Raise ValueError for an unknown name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")


def resolve_strategy(strategy: str, rows: int, lora_A: Tensor, lora_B: Tensor, top_k: int) -> str:
    """The strategy to run: an explicit one, else the cheapest by the cost model.

    Args:
        strategy: One of STRATEGIES.
        rows: Routed rows, all selections counted.
        lora_A: [n or 1, r, in].
        lora_B: [n, out, r].
        top_k: Experts a row.
    """
    if strategy != "auto":
        check_strategy(strategy)
        return strategy
    n, out, r = lora_B.shape
    if torch.compiler.is_compiling():
        return "dense"  # the only one without shapes that depend on the data
    if lora_B.device.type not in ("cpu", "meta"):
        # The roofline's crossover, forward and backward: see docs/design.md.
        return "dense" if n * r <= 400 * top_k else "grouped"
    return _cheapest(rows, lora_A.shape[2], out, n, top_k, r, lora_B.element_size())


@functools.lru_cache(maxsize=4096)
def _cheapest(*shape: int) -> str:
    costs = strategy_costs_s(*shape)
    return min(costs, key=costs.__getitem__)


def strategy_costs_s(
    rows: int, in_features: int, out_features: int, n: int, top_k: int, r: int, itemsize: int
) -> dict[str, float]:
    """Modelled seconds over the frozen linear of one forward and backward pass, by strategy."""
    width = in_features + out_features
    busy_experts = min(n, rows * top_k)
    expert_read_s = r * width * itemsize / _BYTES_PER_S
    flops_dense = 6.0 * rows * n * r * width
    flops_grouped = 6.0 * rows * top_k * r * width
    return {
        "dense": flops_dense / _FLOP_PER_S + _DENSE_CALL_S + n * expert_read_s,
        "grouped": (
            flops_grouped / _FLOP_PER_S
            + 3.0 * rows * top_k * width * itemsize / _BYTES_PER_S
            + busy_experts * (_EXPERT_CALL_S + expert_read_s)
            + _DENSE_CALL_S
        ),
        "gather": (
            flops_grouped / _FLOP_PER_S
            + 3.0 * rows * top_k * width * itemsize / _BYTES_PER_S
            + rows * top_k * (_SLOT_CALL_S + expert_read_s)
        ),
    }

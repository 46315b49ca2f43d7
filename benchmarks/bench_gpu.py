"""One adapted linear on a GPU: our strategies against what a user would otherwise run.

    the peers of benchmarks/layers/peers.py, Axolotl's ScatterMoE kernels among them where axolotl
    is installed, and
    dense_own       dense with the frozen product in our K-extended GEMM; plain_own: that GEMM with
                    no adapter, forward only, which dense_own is held to
    torch_dense     the PyTorch backend, eager

and decoding of 1 to 32 rows in a CUDA graph: frozen, remix, gather, dense.

Unit: ms, by CUDA events, medians of interleaved rounds; MiB allocated at the peak over what was
there before. Results are checked against fp64 before anything is timed. Without a GPU it says so
and measures nothing.

    python -m benchmarks.bench_gpu [--rounds 20] [--no-save]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.common import Timing, interleaved, write_rows
from benchmarks.layers.cells import Cell
from benchmarks.layers.peers import PEERS, Forward, Unable, runnable
from benchmarks.layers.problem import Problem
from remix_kernels import triton_products

CELLS = (
    Cell("Llama-3-8B up", 16384, n=8, r=8, k=4),
    Cell("Llama-3-8B down", 16384, n=8, r=8, k=4),
    Cell("Llama-3-8B up", 16384, n=8, r=16, k=2),
    Cell("Llama-3-8B up", 16384, n=32, r=16, k=2),
    Cell("Llama-3-8B up", 16384, n=64, r=64, k=2),
    Cell("Llama-3.2-1B up", 4096, n=8, r=8, k=4),
)
DECODE = tuple(Cell("Llama-3-8B up", rows, n=8, r=8, k=4, backward=False) for rows in (1, 4, 32))


def dense_own(problem: Problem) -> Forward:
    """The dense strategy; `gemm_of` says in whose GEMM."""
    return lambda: problem.remix(backend="triton", strategy="dense")


def plain_own(problem: Problem) -> Forward:
    """x W^T in our GEMM: the K-extended kernel with no columns to extend by."""
    if problem.cell.backward:
        raise Unable("forward only")

    def forward() -> Tensor:
        x = problem.x.detach()
        y, nothing = x.new_empty(len(x), problem.cell.out_features), x.new_empty(len(x), 0)
        triton_products.expand(
            nothing, problem.lora_B[:1].detach(), y, x=x, weight=problem.linear.weight
        )
        return y

    return forward


def torch_dense(problem: Problem) -> Forward:
    """The PyTorch backend."""
    return lambda: problem.remix(backend="torch", strategy="dense")


VARIANTS: dict[str, Callable[[Problem], Forward]] = {
    **{name: peer for name, peer in PEERS.items() if name not in ("gather", "einsum")},
    "dense_own": dense_own,
    "plain_own": plain_own,
    "torch_dense": torch_dense,
}


@contextmanager
def gemm_of(name: str) -> Iterator[None]:
    """Where the variant is named so: the frozen product in our kernel, in both passes."""
    if name != "dense_own":
        yield
        return
    os.environ["REMIX_GEMM"] = "triton"
    try:
        yield
    finally:
        del os.environ["REMIX_GEMM"]


def time_ms(run: Callable[[], object]) -> float:
    """One run between two CUDA events, on an idle GPU with a flushed L2."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Rows of one cell: forward, forward + backward, peak memory."""
    rows = []
    for backward in (False, True):
        which = replace(cell, backward=backward)
        problem = Problem(which, "cuda", torch.bfloat16)
        runs = {}
        for name, peer in VARIANTS.items():
            with gemm_of(name):
                forwards, reasons = runnable(problem, {name: peer})
            for forward in forwards.values():
                runs[name] = under(name, problem.run(forward))
            for reason in reasons.values():
                print(f"  {name}: not measured ({reason})")
        peaks = {name: _peak_mib(run) for name, run in runs.items()}
        rows += _rows(str(which), _times(runs, rounds), peaks)
    return rows


def measure_decode(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Rows of one decoding cell, each variant replayed as a CUDA graph."""
    problem = Problem(cell, "cuda", torch.bfloat16)
    names = ("frozen", "remix", "gather", "dense")
    forwards, reasons = runnable(problem, {name: PEERS[name] for name in names})
    print(*(f"  {name}: not measured ({reason})" for name, reason in reasons.items()), sep="\n")
    graphs = {}
    for name, forward in forwards.items():
        with torch.no_grad():
            forward()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
        graphs[name] = graph.replay
    return _rows(f"{cell}-graph", _times(graphs, rounds), {})


def under(name: str, run: Callable[[], None]) -> Callable[[], None]:
    """`run`, with the frozen product where the variant wants it."""

    def whole() -> None:
        with gemm_of(name):
            run()

    return whole


def _times(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timing]:
    return interleaved(runs, rounds, warmup=0, clock=time_ms)


def _rows(name: str, times: dict[str, Timing], peaks: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for variant, timing in times.items():
        row = {
            "cell": name,
            "variant": variant,
            "time_ms": f"{timing.median_ms:.4f}",
            "p20_ms": f"{timing.quantile_ms(0.2):.4f}",
            "p80_ms": f"{timing.quantile_ms(0.8):.4f}",
            "over_frozen": f"{timing.ratio_to(times['frozen']):.3f}",
            "peak_mib": f"{peaks[variant]:.1f}" if variant in peaks else "",
        }
        rows.append(row)
        print(f"  {name} {variant:15s} {row['time_ms']:>9s} ms  x {row['over_frozen']}")
    return rows


def _peak_mib(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Measure every case; without a GPU say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    os.environ["REMIX_STRICT"] = "1"  # a kernel that fails is no reason to time PyTorch
    if not torch.cuda.is_available():
        print("not measured on a GPU: torch sees no CUDA device")
        return
    where = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    for cell, run in [(c, measure) for c in CELLS] + [(c, measure_decode) for c in DECODE]:
        print(f"\n{cell}", flush=True)
        rows = [{**where, **row} for row in run(cell, args.rounds)]
        torch.cuda.empty_cache()
        if not args.no_save:  # cell by cell: a time limit loses one
            write_rows("gpu", rows)


if __name__ == "__main__":
    main()

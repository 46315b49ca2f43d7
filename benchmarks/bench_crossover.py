"""Where grouped overtakes dense on this machine's processor, and what the cost model says.

For k = 1, 2, 4 the pool grows (R = n r columns) until grouped, which computes only what was chosen,
is faster than dense, which computes everything at GEMM speed. Each row times both strategies of
routed_linear, forward + backward, side by side, and names what `auto` takes; `regret` is its time
over the faster one's.

    python -m benchmarks.bench_crossover [--rounds 7] [--no-save]
"""

from __future__ import annotations

import argparse

from benchmarks.common import interleaved, prepare_cpu, write_rows
from benchmarks.layers.cells import Cell
from benchmarks.layers.problem import Problem
from remix_kernels._dispatch import resolve_strategy, strategy_costs_s

WIDTHS = (("SmolLM2-135M up", 1024), ("Llama-3.2-1B q", 512))  # shape, T
POOLS = ((8, 8), (8, 16), (16, 16), (32, 16), (64, 16))  # (n, r)


def main() -> None:
    """Measure every case, print a line each, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    rows: list[dict[str, object]] = []
    for shape, tokens in WIDTHS:
        for k in (1, 2, 4):
            for n, r in POOLS:
                rows.append(measure(Cell(shape, tokens, n, r, k), args.rounds))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if not args.no_save:
        print(f"\nwritten to {write_rows('crossover', rows)}")


def measure(case: Cell, rounds: int) -> dict[str, object]:
    """One row."""
    problem = Problem(case)
    steps = {
        name: problem.run(lambda name=name: problem.remix(strategy=name))
        for name in ("dense", "grouped")
    }
    times = interleaved(steps, rounds)
    measured = times["grouped"].ratio_to(times["dense"])
    sizes = (case.rows, case.in_features, case.out_features, case.n, case.k, case.r)
    costs = strategy_costs_s(*sizes, itemsize=4)
    auto = resolve_strategy(
        "auto", case.rows, problem.lora_A, problem.lora_B, case.k, problem.x.dtype
    )
    faster = "grouped" if measured < 1 else "dense"
    return {
        "case": str(case),
        "R": case.n * case.r,
        "dense_ms": f"{times['dense'].median_ms:.2f}",
        "grouped_ms": f"{times['grouped'].median_ms:.2f}",
        "grouped_over_dense": f"{measured:.2f}",
        "modelled_adapters": f"{costs['grouped'] / costs['dense']:.2f}",
        "auto": auto,
        "regret": "1.00" if auto == faster else f"{max(measured, 1 / measured):.2f}",
    }


if __name__ == "__main__":
    main()

"""One adapted linear: routed_linear against what a user would otherwise run, cell by cell.

`benchmarks/layers/cells.py` has the shapes, `peers.py` what is compared. Each variant is checked
against fp64 before anything is timed; then all take turns, with cold caches. Unit: ms of the cell's
passes (fp32, two threads), ratios round by round, and MiB that torch allocates at the peak.
Choosing experts (router logits, sampling) is no part of it.

    python -m benchmarks.bench_layer                     the default cells
    python -m benchmarks.bench_layer --full              the whole grid; goes on where it stopped
    python -m benchmarks.bench_layer --compare rows.csv  the cells of those rows; fails where one of
                                                         our ratios has grown beyond the noise
    options: --cells NAME-PART ... --peers NAME ... --seconds 3 --rounds 30 --no-save
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from pathlib import Path

import psutil

from benchmarks.common import (
    RESULTS,
    Timing,
    environment,
    interleaved,
    peak_bytes,
    prepare_cpu,
    quantile,
    write_rows,
)
from benchmarks.layers.cells import DEFAULT, Cell, every_cell
from benchmarks.layers.peers import PEERS, runnable
from benchmarks.layers.problem import Problem
from remix_kernels._dispatch import resolve_strategy

COMPILED = (
    "T1-n8-r8-k2-M1-uniform-infer",
    "T1024-n8-r8-k2-M1-uniform",
    "T1024-n32-r16-k2-M1-uniform",
)
OURS = ("remix", "dense", "grouped", "gather")
GROWTH = 1.10  # of a ratio, that is more than rounding of the code


def measure(cell: Cell, peers: list[str], rounds: int, seconds: float) -> list[dict[str, object]]:
    """Rows of one cell, a variant each; those that cannot run say why."""
    problem = Problem(cell)
    forwards, reasons = runnable(problem, {name: PEERS[name] for name in peers})
    runs = {name: problem.run(forward) for name, forward in forwards.items()}
    times = interleaved(runs, rounds, warmup=0, cold=True, seconds=seconds)
    top = (cell.rows, problem.lora_A, problem.lora_B, cell.k, problem.x.dtype)
    auto = resolve_strategy("auto", *top)
    sizes = {
        "cell": str(cell),
        "shape": cell.shape,
        "T": cell.tokens,
        "n": cell.n,
        "r": cell.r,
        "k": cell.k,
        "M": cell.m,
        "routing": cell.routing,
        "passes": "train" if cell.backward else "infer",
        "auto": auto,
    }
    rows: list[dict[str, object]] = []
    for name in peers:
        if name not in times:
            rows.append({**sizes, "variant": name, **_nothing(reasons[name])})
            continue
        timing, over = times[name], times[name].ratios_to(times["frozen"])
        rows.append(
            {
                **sizes,
                "variant": name,
                "time_ms": f"{timing.median_ms:.4f}",
                "p20_ms": f"{timing.quantile_ms(0.2):.4f}",
                "p80_ms": f"{timing.quantile_ms(0.8):.4f}",
                "over_frozen": f"{quantile(over, 0.5):.4f}",
                "over_p20": f"{quantile(over, 0.2):.4f}",
                "over_p80": f"{quantile(over, 0.8):.4f}",
                "over_lora_kr": _ratio(timing, times.get("lora_kr")),
                "peak_mib": f"{peak_bytes(runs[name], warm=True) / 2**20:.2f}",
                "rounds": len(timing.times_ms),
                "why_not": "",
            }
        )
    return rows


def _ratio(timing: Timing, other: Timing | None) -> str:
    return "" if other is None else f"{timing.ratio_to(other):.4f}"


def _nothing(reason: str) -> dict[str, object]:
    names = ("time_ms", "p20_ms", "p80_ms", "over_frozen", "over_p20", "over_p80", "over_lora_kr")
    return {**dict.fromkeys((*names, "peak_mib", "rounds"), ""), "why_not": reason}


def fits(cell: Cell) -> bool:
    """Whether a cell's tensors, a dozen of y among them, leave half of the memory free."""
    widest = max(cell.in_features, cell.out_features)
    weights = 3 * cell.in_features * cell.out_features + 4 * cell.n * cell.r * 2 * widest
    needed = 4 * (12 * cell.rows * widest + weights + 4 * cell.rows * cell.n * cell.r)
    return needed < psutil.virtual_memory().available / 2


def show(rows: list[dict[str, object]], done: int, of: int) -> None:
    """One cell's rows, on a line each."""
    print(f"\n[{done}/{of}] {rows[0]['cell']}  auto = {rows[0]['auto']}")
    for row in rows:
        if row["why_not"]:
            print(f"  {row['variant']:15s} not measured: {row['why_not']}")
        else:
            print(
                f"  {row['variant']:15s} {row['time_ms']:>10} ms   x frozen {row['over_frozen']:>7}"
                f"   x lora_kr {row['over_lora_kr']:>7}   peak {row['peak_mib']} MiB"
            )
    sys.stdout.flush()


def compare(path: Path, rounds: int, seconds: float) -> int:
    """Measure the cells of earlier rows again: 1 if one of our ratios has grown, else 0.

    It has if its median is a tenth higher and its fastest fifth is slower than the slowest fifth
    was; then the cell is measured once more, four times as long, and has to say so again.
    """
    before = {(row["cell"], row["variant"]): row for row in _read(path) if row["over_frozen"]}
    cells = {str(cell): cell for cell in (*DEFAULT, *every_cell())}
    names = list(dict.fromkeys(name for name, _ in before if name in cells))
    if not names:
        raise SystemExit(f"{path} has rows of no cell that is known here")
    grown = []
    for done, name in enumerate(names, 1):
        ours = [v for v in OURS if (name, v) in before]
        for patience in (1, 4):
            peers = ["frozen", *ours]
            rows = measure(cells[name], peers, patience * rounds, patience * seconds)
            worse = [row for row in rows if _has_grown(row, before.get((name, row["variant"])))]
            if not worse:
                break
        show(rows, done, len(names))
        grown += worse
    print(f"\n{len(names)} cells compared with {path}")
    for row in grown:
        was = before[name_of(row)]
        print(
            f"  slower: {row['cell']} {row['variant']}: {row['over_frozen']} x frozen, it was "
            f"{was['over_frozen']} ({was['over_p20']} to {was['over_p80']})"
        )
    return 1 if grown else 0


def name_of(row: dict[str, object]) -> tuple[str, str]:
    """(cell, variant)."""
    return str(row["cell"]), str(row["variant"])


def _has_grown(row: dict[str, object], was: dict[str, str] | None) -> bool:
    if was is None or row["variant"] == "frozen" or not row["over_frozen"]:
        return False
    grown = float(str(row["over_frozen"])) > GROWTH * float(was["over_frozen"])
    return grown and float(str(row["over_p20"])) > float(was["over_p80"])


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measure the chosen cells, append the rows cell by cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the whole grid: days")
    parser.add_argument("--compare", type=Path, metavar="ROWS")
    parser.add_argument("--cells", nargs="+", default=(), help="only those whose name has one")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds, a cell")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    if args.compare is not None:
        raise SystemExit(compare(args.compare, args.rounds, args.seconds))
    cells = every_cell() if args.full else list(DEFAULT)
    cells = [c for c in cells if not args.cells or any(part in str(c) for part in args.cells)]
    if not cells:
        raise SystemExit(f"no cell is named like {' or '.join(args.cells)}")
    name = "grid_full" if args.full else "grid"
    path, here = RESULTS / f"{name}.csv", environment()
    known = _read(path) if args.full and path.exists() else []
    done = {row["cell"] for row in known if row["device"] == here["device"]}
    peers = list(dict.fromkeys(("frozen", *args.peers)))
    for number, cell in enumerate(cells, 1):
        if str(cell) in done:
            continue
        if not fits(cell):
            print(f"\n[{number}/{len(cells)}] {cell}: not measured, too large for the memory")
            continue
        compiled = not args.full and any(part in str(cell) for part in COMPILED)
        chosen = [p for p in peers if p != "dense_compiled" or compiled]
        rows = measure(cell, chosen, args.rounds, args.seconds)
        show(rows, number, len(cells))
        gc.collect()
        if not args.no_save:
            write_rows(name, rows)
    if not args.no_save:
        print(f"\nrows are in {path}")


if __name__ == "__main__":
    main()

"""The measurements that the shipped cost model's constants are fitted to.

What `remix bench --calibrate` measures, kept as rows: each strategy's time above the frozen
linear's, at shapes that differ in one size each. Prints the constants to ship, and for each shape
what `auto` takes with the shipped and with the fitted ones. Unit: s.

    python -m benchmarks.bench_calibration [--seconds 4] [--no-save]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.common import prepare_cpu, rows_of, write_rows
from remix_kernels._costs import SHIPPED, Costs
from remix_kernels.calibrate import Measured, fit, measure, regret

SIZES = ("rows", "in", "out", "n", "k", "r")


def measured_rows() -> list[Measured]:
    """The last committed measurements."""
    found = rows_of("calibration", *SIZES, "passes", "strategy")
    return [
        Measured(
            tuple(int(row[size]) for size in SIZES),  # type: ignore[arg-type]
            row["passes"] == "train",
            row["strategy"],
            float(row["frozen_s"]),
            float(row["over_s"]),
        )
        for row in found
    ]


def show(title: str, measured: Sequence[Measured], constants: Costs) -> None:
    """The constants, and where the model takes a strategy that is not the fastest."""
    choices = regret(measured, constants)
    print(f"\n{title}: worst choice {max(c for _, _, c in choices):.3f} of the fastest")
    for name, value in asdict(constants).items():
        print(f"  {name} = {value:.3g}")
    for taken, best, ratio in choices:
        if ratio > 1.02:
            print(f"  {taken.shape} takes {taken.strategy}, {best} is faster: {ratio:.2f}")


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    measured = list(measure(args.seconds, progress=lambda what: print(what, flush=True)))
    rows: list[dict[str, object]] = [
        {
            **dict(zip(SIZES, m.shape, strict=True)),
            "passes": "train" if m.backward else "infer",
            "strategy": m.strategy,
            "frozen_s": f"{m.frozen_s:.4g}",
            "over_s": f"{m.over_s:.4g}",
        }
        for m in measured
    ]
    show("shipped", measured, SHIPPED)
    show("fitted to this", measured, fit(measured))
    if not args.no_save:
        print(f"\nwritten to {write_rows('calibration', rows)}")


if __name__ == "__main__":
    main()

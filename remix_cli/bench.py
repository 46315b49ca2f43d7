"""`remix bench`: what adapters cost on this machine, and the cost model's constants for it."""

from __future__ import annotations

import argparse
import datetime
import platform
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from remix_cli.allocator import keep_freed_memory
from remix_cli.display import console, print_facts, print_table
from remix_kernels._costs import SHIPPED, calibration_file, costs, write_calibration
from remix_kernels.calibrate import DECODING, TRAINING, Measured, fit, measure, regret


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix bench --help`."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds}; it must be positive")
    path = calibration_file()
    if args.calibrate and path is None:
        raise ValueError(
            "REMIX_CALIBRATION=shipped says that no calibration is to be used: unset it, or name "
            "the file to write"
        )
    keep_freed_memory()
    total = len(TRAINING) + len(DECODING)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=total)

        def progress(what: str) -> None:
            bar.update(task, advance=1, description=what)

        measured = list(measure(args.seconds, progress=progress))
    constants = fit(measured) if args.calibrate else costs()
    choices = regret(measured, constants)
    _print_times(measured, choices)
    worst = max(ratio for _, _, ratio in choices)
    before = max(ratio for _, _, ratio in regret(measured, SHIPPED))
    facts: dict[str, object] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "worst_choice_over_fastest": round(worst, 3),
    }
    print_facts(
        "Choice of strategy", [*facts.items(), ("with the shipped constants", f"{before:.3f}")]
    )
    if not args.calibrate:
        console.print("`remix bench --calibrate` fits the cost model to this machine")
        return
    assert path is not None
    write_calibration(path, constants, facts)
    console.print(f"the constants are in {path}; delete it to go back to the shipped ones")


def _print_times(measured: list[Measured], choices: list[tuple[Measured, str, float]]) -> None:
    """A row for each shape: every strategy over the frozen linear, and what `auto` takes."""
    table = Table()
    table.add_column("rows in out n k r", no_wrap=True)
    table.add_column("pass")
    for heading in ("frozen ms", "dense", "grouped", "gather", "auto"):
        table.add_column(heading, justify="right")
    for taken, _, _ in choices:
        ours = [m for m in measured if (m.shape, m.backward) == (taken.shape, taken.backward)]
        over = {m.strategy: f"{1.0 + m.over_s / m.frozen_s:.2f}" for m in ours}
        table.add_row(
            " ".join(map(str, taken.shape)),
            "train" if taken.backward else "forward",
            f"{ours[0].frozen_s * 1e3:.3f}",
            *(over.get(name, "-") for name in ("dense", "grouped", "gather")),
            taken.strategy,
        )
    print_table("Time over the frozen linear's", table)

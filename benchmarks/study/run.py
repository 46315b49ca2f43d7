"""Run the study, cell by cell: `python -m benchmarks.study.run --work DIR`.

Every cell is a process; when it has ended, its row is in results/study.csv. Start it again after
anything, and it goes on with the first cell that has no row: only running cells are lost. A cell
that fails leaves its log in DIR and is tried again by the next call.

    python -m benchmarks.study.run --list                 what is missing, and a guess of the time
    python -m benchmarks.study.run --work DIR --hours 8   begins no cell after that
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.cell import write_spec
from benchmarks.study.data import data_root, write_splits
from benchmarks.study.plan import FIRST, PARTS, Cell, missing
from benchmarks.study.rows import TABLE, add_row, read_rows

REPOSITORY = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or list, what is missing; 1 if a cell failed."""
    parts = list(dict.fromkeys(part for part, *_ in PARTS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for runs and logs, outside the project")
    parser.add_argument("--data", help="folder of data sets; default: $REMIX_TEST_DATA")
    parser.add_argument("--parts", nargs="+", default=[], choices=parts, help="default: all")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no cell later")
    parser.add_argument(
        "--workers", type=int, default=1, help="cells at a time, which share the cores"
    )
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    args = parser.parse_args(argv)
    if args.list:
        list_missing(missing(read_rows(), args.parts, guess=FIRST[1]))
        return 0
    if args.work is None:
        parser.error("--work is needed: a folder for runs and logs, outside the project")
    if args.workers < 1:
        parser.error(f"--workers {args.workers} must be 1 or more")
    work = args.work.expanduser().resolve()
    if work.is_relative_to(REPOSITORY):
        parser.error(f"--work {work} is inside the project: data sets must not get in there")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            parser.error(f"another run of the study works in {work}: wait, or give another --work")
        find = lambda rows: missing(rows, args.parts)  # noqa: E731
        end_with_cells()
        failed = run_study(
            find, work, data_root(args.data), seconds=args.hours * 3600, workers=args.workers
        )
    for name in failed:
        print(f"failed: {name}, see {work / 'cells' / name / 'log.txt'}")
    return int(bool(failed))


def end_with_cells() -> None:
    """Let SIGTERM end the study as Ctrl-C does: cells first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def list_missing(cells: Sequence[Cell]) -> None:
    """Print the cells and how long they may take."""
    for cell in cells:
        print(f"{cell.seconds / 60:6.1f} min  {cell.name}")
    hours = sum(cell.seconds for cell in cells) / 3600
    print(f"{len(cells)} cells, about {hours:.1f} hours on two cores (a guess). Searches may grow.")


class Run:
    """One cell's process."""

    def __init__(
        self, cell: Cell, folder: Path, data: Path, command: Sequence[str], threads: int | None
    ) -> None:
        """Start it, from nothing; `threads`: of one process, None where it is alone."""
        self.cell, self.folder = cell, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spec = folder / "spec.json"
        write_spec(cell, data, spec)
        # Beside other programs, threads that spin while they wait make steps far longer.
        variables = {"OMP_WAIT_POLICY": "passive", **os.environ}
        if threads is not None:
            variables["OMP_NUM_THREADS"] = str(threads)
        with (folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(spec), str(folder)],
                cwd=REPOSITORY,
                env=variables,
                stdout=log,
                stderr=log,
            )

    def is_over(self) -> bool:
        """Whether the process has ended; its weights are gone then."""
        if self.process.poll() is None:
            return False
        if (self.folder / "run" / "metrics.json").exists():
            shutil.copy(self.folder / "run" / "metrics.json", self.folder)
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return True

    def row(self) -> dict[str, Any] | None:
        """What it found; None: it failed."""
        path = self.folder / "row.json"
        if self.process.returncode or not path.exists():
            return None
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def stop(self) -> None:
        """End the process, and wait until it is gone."""
        self.process.terminate()
        self.process.wait()


def run_study(
    find: Callable[[dict[str, dict[str, str]]], list[Cell]],
    work: Path,
    data: Path,
    table: Path = TABLE,
    seconds: float = float("inf"),
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.study.cell"),
    workers: int = 1,
) -> list[str]:
    """Run one missing cell after the other until there is none.

    Args:
        find: From rows to the cells that are missing; asked again after every cell.
        work: Folder for data, runs and logs.
        data: Folder of data sets.
        table: Where rows go.
        seconds: No cell begins after that.
        command: What runs a cell, given its specification and its folder.
        workers: Cells at a time; they share the processor's cores.

    Returns:
        Names of the cells that failed; they have no row.
    """
    began, failed = time.monotonic(), dict[str, None]()
    threads = max((os.cpu_count() or 1) // workers, 1) if workers > 1 else None
    running: list[Run] = []
    try:
        while True:
            cells = [cell for cell in find(read_rows(table)) if cell.name not in failed]
            waiting = [cell for cell in cells if all(cell != run.cell for run in running)]
            for cell in waiting[: workers - len(running)]:
                if time.monotonic() - began >= seconds:
                    break
                print(
                    f"{time.strftime('%H:%M:%S')}  {cell.name} ({len(cells)} missing)", flush=True
                )
                prepared = write_splits(cell.task.name, data, work / "data")
                running.append(Run(cell, work / "cells" / cell.name, prepared, command, threads))
            if not running:
                return list(failed)
            over = wait_for(running)
            running = [run for run in running if run not in over]
            for run in over:
                row = run.row()
                if row is None:
                    failed[run.cell.name] = None
                else:
                    add_row(row, table)
    finally:
        for run in running:
            run.stop()


def wait_for(running: Sequence[Run]) -> list[Run]:
    """Those that are over, at least one."""
    while not (over := [run for run in running if run.is_over()]):
        time.sleep(0.2)
    return over


if __name__ == "__main__":
    sys.exit(main())

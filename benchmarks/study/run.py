"""Run the study, cell by cell: `python -m benchmarks.study.run --work DIR`.

Every cell is a process; when it has ended, its row is in results/study.csv. Start it again after
anything, and it goes on with the first cell that has no row: only the running cell is lost. A cell
that fails leaves its log in DIR and is tried again by the next call.

    python -m benchmarks.study.run --list                 what is missing, and a guess of the time
    python -m benchmarks.study.run --work DIR --hours 8   begins no cell after that
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from json import loads
from pathlib import Path

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
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    args = parser.parse_args(argv)
    if args.list:
        list_missing(missing(read_rows(), args.parts, guess=FIRST[1]))
        return 0
    if args.work is None:
        parser.error("--work is needed: a folder for runs and logs, outside the project")
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
        failed = run_study(find, work, data_root(args.data), seconds=args.hours * 3600)
    for name in failed:
        print(f"failed: {name}, see {work / 'cells' / name / 'log.txt'}")
    return int(bool(failed))


def list_missing(cells: Sequence[Cell]) -> None:
    """Print the cells and how long they may take."""
    for cell in cells:
        print(f"{cell.seconds / 60:6.1f} min  {cell.name}")
    hours = sum(cell.seconds for cell in cells) / 3600
    print(f"{len(cells)} cells, about {hours:.1f} hours on two cores (a guess). Searches may grow.")


def run_study(
    find: Callable[[dict[str, dict[str, str]]], list[Cell]],
    work: Path,
    data: Path,
    table: Path = TABLE,
    seconds: float = float("inf"),
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.study.cell"),
) -> list[str]:
    """Run one missing cell after the other until there is none.

    Args:
        find: From rows to the cells that are missing; asked again after every cell.
        work: Folder for data, runs and logs.
        data: Folder of data sets.
        table: Where rows go.
        seconds: No cell begins after that.
        command: What runs a cell, given its specification and its folder.

    Returns:
        Names of the cells that failed; they have no row.
    """
    began, failed = time.monotonic(), dict[str, None]()
    while time.monotonic() - began < seconds:
        cells = [cell for cell in find(read_rows(table)) if cell.name not in failed]
        if not cells:
            break
        cell, folder = cells[0], work / "cells" / cells[0].name
        print(f"{time.strftime('%H:%M:%S')}  {cell.name} ({len(cells)} missing)", flush=True)
        prepared = write_splits(cell.task.name, data, work / "data")
        if run_one(cell, folder, prepared, command):
            add_row(loads((folder / "row.json").read_text(encoding="utf-8")), table)
        else:
            failed[cell.name] = None
    return list(failed)


def run_one(cell: Cell, folder: Path, data: Path, command: Sequence[str]) -> bool:
    """Run a cell's process from nothing; its weights are gone afterwards. False: it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = folder / "spec.json"
    write_spec(cell, data, spec)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [*command, str(spec), str(folder)],
            cwd=REPOSITORY,
            # Beside other programs, threads that spin while they wait make steps far longer.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            stdout=log,
            stderr=log,
        )
    if (folder / "run" / "metrics.json").exists():
        shutil.copy(folder / "run" / "metrics.json", folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return done.returncode == 0 and (folder / "row.json").exists()


if __name__ == "__main__":
    sys.exit(main())

"""`remix report`: what runs did, side by side, on one page that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from remix_cli.config import write_text
from remix_cli.display import console
from remix_cli.report.charts import charts_of
from remix_cli.report.page import page_of
from remix_cli.report.runs import read_runs


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix report --help`."""
    output = Path(args.output).expanduser()
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name the page's file, report.html say")
    runs, skipped = read_runs([Path(name).expanduser() for name in args.runs], args.any_model)
    charts = charts_of(runs)
    page = page_of(runs, skipped, charts)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, output)
    for name, reason in skipped:
        console.print(f"left out: {name}: {reason}")
    console.print(f"{len(runs)} runs are in {output} ({len(page.encode()) / 2**10:.0f} KiB)")
    if args.png:
        from remix_cli.report.png import write_pngs

        written = write_pngs(charts, runs, Path(args.png).expanduser())
        console.print(f"{len(written)} figures are in {args.png}")

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
    for shown in runs:
        if shown.damage:
            console.print(f"shown in part: {shown.name}: {shown.damage}")
    count = "1 run is" if len(runs) == 1 else f"{len(runs)} runs are"
    console.print(f"{count} in {output} ({len(page.encode()) / 2**10:.0f} KiB)")
    if args.png:
        from remix_cli.report.png import write_pngs

        written = write_pngs(charts, runs, Path(args.png).expanduser())
        figures = "1 figure is" if len(written) == 1 else f"{len(written)} figures are"
        console.print(f"{figures} in {args.png}")

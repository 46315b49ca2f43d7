"""The report's figures as PNG files, for papers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remix_cli.report.charts import Chart, View
from remix_cli.report.runs import Run

# Okabe and Ito's colours, with dashes and markers that tell curves apart in print.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b3fa8", "#000000"]
_DASHES = ["-", "--", ":", "-."]
_DPI = 200
_ACROSS, _UP = 54, 30  # letters that fit beside and above each other


def write_pngs(charts: Sequence[Chart], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write one file for each view of each chart.

    Returns:
        Their paths.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The folder cannot be written.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install 'remix-lora[report]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        for number, view in enumerate(chart.views):
            figure = matplotlib.figure.Figure(figsize=(5.2, 3.2), layout="constrained")
            _DRAW[chart.kind](figure.subplots(), chart, view, runs)
            name = "-".join(part for part in (chart.id, str(number), _slug(view.label)) if part)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=_DPI, metadata={"Title": f"{chart.title}: {view.label}"})
            written.append(path)
    return written


def _lines(axes: Any, chart: Chart, view: View, runs: Sequence[Run]) -> None:
    for curve in view.data:
        i = curve["run"]
        mark = "" if len(curve["x"]) > 1 else "o"  # a line of one point is invisible
        style = {**_style(i), "marker": mark, "lw": 1.5}
        axes.plot(curve["x"], curve["y"], label=_plain(runs[i].name), **style)
    axes.set(xlabel=chart.x, ylabel=textwrap.fill(chart.y or view.label, _UP))
    _title(axes, chart, view)
    axes.legend(fontsize=8, frameon=False)


def _bars(axes: Any, chart: Chart, view: View, runs: Sequence[Run]) -> None:
    edges, series = view.data["edges"], view.data["series"]
    width = (edges[1] - edges[0]) * 0.86 / len(series)
    for j, bars in enumerate(series):
        i = bars["run"]
        places = [edge + (j + 0.5) * width for edge in edges[:-1]]
        label = _plain(runs[i].name)
        axes.bar(places, bars["y"], width, color=COLOURS[i % len(COLOURS)], label=label)
    axes.set(xlabel=chart.x, ylabel=chart.y)
    _title(axes, chart, view)
    axes.legend(fontsize=8, frameon=False)


def _heat(axes: Any, chart: Chart, view: View, runs: Sequence[Run]) -> None:
    values, rows = view.data["values"], view.data["rows"]
    high = max(2.0, *(value for row in values for value in row))
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=high)
    every = max(1, len(rows) // 16)
    axes.set_yticks(range(0, len(rows), every), [_plain(name) for name in rows[::every]])
    axes.tick_params(labelsize=6)
    axes.set(xlabel=chart.x)
    _title(axes, chart, view)
    axes.figure.colorbar(image)


_DRAW = {"lines": _lines, "bars": _bars, "heat": _heat}


def _title(axes: Any, chart: Chart, view: View) -> None:
    """Over the axes, in lines that fit the figure."""
    title = textwrap.fill(f"{chart.title}: {_plain(view.label)}", _ACROSS)
    axes.set_title(title, fontsize=9)


def _style(run: int) -> dict[str, Any]:
    """No two of 32 runs are alike."""
    turn = run + run // len(COLOURS)
    return {"color": COLOURS[run % len(COLOURS)], "ls": _DASHES[turn % len(_DASHES)]}


def _plain(name: str) -> str:
    """A name that matplotlib does not take for a formula, nor hide from a legend."""
    return name.replace("$", r"\$").lstrip("_") or "run"


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60]

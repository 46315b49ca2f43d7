"""The page: a template, a style sheet and a script of ours, and the charts' data, in one file.

Text from runs reaches the page in two ways: through the template, which escapes it, and as JSON
that the script puts into the document as text. A content security policy lets nothing run but our
script, whatever a run's files hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

import remix_model
from remix_cli.report.charts import MAX_POINTS, MAX_ROWS, Chart
from remix_cli.report.runs import Run, number, text

_SAME_START = 0.01  # relative: bfloat16's rounding is less
# (heading, key of the metrics or of the configuration, digits or None for whole numbers)
_COLUMNS = [
    ("held-out loss before", "eval_loss_before", 4),
    ("held-out loss", "eval_loss_after", 4),
    ("steps", "train_steps", None),
    ("tokens/s", "tokens_per_s", 4),
    ("seconds", "train_seconds", 4),
    ("trainable", "trainable_parameters", None),
    ("activated", "activated_parameters", None),
    ("peak MiB", "peak_rss_mib", 4),
    ("n", "num_experts", None),
    ("k", "top_k", None),
    ("r", "r", None),
    ("M", "num_selections", None),
    ("learning rate", "learning_rate", 3),
    ("seed", "seed", None),
]


def page_of(runs: Sequence[Run], skipped: Sequence[tuple[str, str]], charts: list[Chart]) -> str:
    """The report as one HTML file.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("remix report needs jinja2: pip install 'remix-lora[report]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    style, script = _part("page.css"), _part("page.js")
    headings, rows, values = table_of(runs)
    data = {
        "runs": [{"name": run.name, "method": run.method} for run in runs],
        "charts": [asdict(chart) for chart in charts if chart.views],
        "table": {"headings": headings, "rows": values},
    }
    return environment.from_string(_part("page.html")).render(
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_json(data),
        runs=runs,
        charts=charts,
        skipped=skipped,
        damaged=[run for run in runs if run.damage],
        starts_differ=starts_differ(runs),
        headings=headings,
        rows=rows,
        models=list(dict.fromkeys(run.model for run in runs)),
        datasets=list(dict.fromkeys(text(run.config.get("dataset", "-")) for run in runs)),
        version=remix_model.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        max_points=MAX_POINTS,
        max_rows=MAX_ROWS,
    )


def starts_differ(runs: Sequence[Run]) -> bool:
    """Whether runs of one base model begin at different held-out losses, rounding aside."""
    starts: dict[str, list[float]] = {}
    for run in runs:
        before = run.number("eval_loss_before")
        if before is not None:
            starts.setdefault(run.model, []).append(before)
    return any(max(found) - min(found) > _SAME_START * max(found) for found in starts.values())


Cells = list[list[str]]
Values = list[list[str | float]]


def table_of(runs: Sequence[Run]) -> tuple[list[str], Cells, Values]:
    """The table of runs; columns that no run fills are left out.

    Returns:
        Headings, a row of texts for each run, and the same rows with whole numbers, for CSV.
    """
    several_models = len({run.model for run in runs}) > 1
    lead = ["run", "method"] + (["base model"] if several_models else [])
    columns: list[tuple[str, list[str], list[str | float]]] = []
    for heading, key, digits in _COLUMNS:
        found = [run.number(key) for run in runs]
        values = [
            number(run.config.get(key)) if value is None else value
            for run, value in zip(runs, found, strict=True)
        ]
        plain = ["" if value is None else _whole(value) for value in values]
        columns.append((heading, [_cell(value, digits) for value in values], plain))
    for heading, measure in (("ESS, worst token", _least_ess), ("never chosen", _dead)):
        texts = [measure(run) for run in runs]
        columns.append((heading, texts, ["" if cell == "-" else cell for cell in texts]))
    kept = [column for column in columns if set(column[1]) != {"-"}]
    cells, plain_rows = [], []
    for i, run in enumerate(runs):
        first = [run.name, run.method] + ([run.model] if several_models else [])
        cells.append(first + [texts[i] for _, texts, _ in kept])
        plain_rows.append([*first, *(plain[i] for _, _, plain in kept)])
    return lead + [heading for heading, _, _ in kept], cells, plain_rows


def _whole(value: float) -> float:
    """A number that JSON writes without a point where it has no fraction."""
    return int(value) if value.is_integer() else value


def _cell(value: float | None, digits: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if digits is None else f"{value:.{digits}g}"


def _least_ess(run: Run) -> str:
    found = [number(layer.get("ess_min")) for layer in run.held_out]
    known = [value for value in found if value is not None]
    return f"{min(known):.3g}" if known else "-"


def _dead(run: Run) -> str:
    """Experts that no held-out token chose, of all layers."""
    shares = [share for layer in run.held_out for share in layer["expert_share"]]
    return f"{sum(share == 0 for share in shares)} of {len(shares)}" if shares else "-"


def _part(name: str) -> str:
    return (files("remix_cli.report") / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json(data: Any) -> Any:
    """JSON that cannot end the script element that it stands in."""
    from markupsafe import Markup

    dumped = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return Markup(dumped)

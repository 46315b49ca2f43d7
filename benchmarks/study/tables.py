"""The sections of docs/study.md, from the committed rows: `python -m benchmarks.study.tables`.

Only rows of the present plan count; what has none is called not run. Means are over seeds, with the
standard error; differences are taken seed by seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.common import rows_of, table
from benchmarks.study.plan import (
    GRID,
    HELP,
    LONG,
    TASKS,
    Cell,
    best_rate,
    loss_of,
    next_rates,
    wanted,
)
from benchmarks.study.rows import read_rows
from benchmarks.tables import rewrite

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
NOT_RUN = "not run"
II = "instruction_induction"
Row = Mapping[str, str]
Found = dict[tuple[str, str], dict[int, Row]]  # by task and method, then by seed

MIXED = ("mixlora", "mixlora_router30", "hydralora", "mor")
MAIN = ("base", "lora", "rslora", "dora", "vblora", "ia3", *MIXED)
MAIN = (*MAIN, "remix_paper", "remix", "remix_router30", "lora_matched")
GSM8K = ("base", "lora", "mixlora", "mixlora_router30", "remix", "remix_router30")
DRAWING = ("remix_paper", "remix", "remix_router30", "uniform", "remix_frozen")
EXPERTS = ("rslora_r8", "rslora_r16", "rslora_r32", "remix_k1", "remix", "remix_k3", "remix_k4")
SELECTIONS = ("remix", "remix_m4_g1", "remix_m4_matched", "remix_m4")
SELECTIONS = (*SELECTIONS, "remix_m8_matched", "remix_m8")
# Whom the others are held to, pair by pair; by task, since gsm8k has fewer.
RIVALS = ("rslora", "mixlora", "mixlora_router30", "remix", "remix_router30")
LONG_RIVALS = tuple(f"{name}_long" for name in ("rslora", "mixlora_router30", "remix_router30"))


def main() -> None:
    """Rewrite the page between its markers."""
    rows = read_rows()
    rewrite(PAGE, "<!-- theorem1 -->\n", "<!-- /theorem1 -->", theorem1_section())
    rewrite(PAGE, "<!-- study -->\n", "<!-- /study -->", study_section(rows))


def theorem1_section() -> str:
    """Theorem 1's simulation."""
    head = ["σ", "n", "D", "mean ESS", "P(ESS ≤ 2)", "P(≤ 2 above 0.1)", "P(≤ 2 above 0.01)", "t"]
    body = [
        [
            *(row[key] for key in ("sigma", "n", "D", "mean_ess")),
            f"{row['p_ess_at_most_2']} ± {row['se']}",
            *(row[f"p_at_most_two_above_{bound}"] for bound in ("0.1", "0.01")),
            row["threshold"],
        ]
        for row in rows_of("theorem1", "sigma", "n", "D")
    ]
    return "\n".join(table(head, body)) + "\n"


def study_section(rows: Mapping[str, Row]) -> str:
    """Everything that comes from the study's rows."""
    cells = [cell for cell in wanted(rows, guess=0.0) if cell.part != "search"]
    found = found_rows((cell for cell in cells if cell.split == "test"), rows)
    helped = found_rows((cell for cell in cells if cell.part == "help"), rows)
    done = sum(cell.digest in rows for cell in cells)
    lines = [
        f"{done} of {len(cells)} cells are run (without the search). {_where(rows)}",
        "",
        *_search_table(rows),
    ]
    for task in TASKS:
        methods = GSM8K if task == "gsm8k" else MAIN
        lines += [f"**Main table, {task}**", "", *comparison(found, task, methods, "lora")]
        rivals = [name for name in RIVALS if name in methods]
        lines += ["Differences in loss:", "", *_differences(found, task, methods, rivals)]
    lines += ["**Without learning**: routers as initialised, evenly drawn experts", ""]
    lines += comparison(found, II, ("remix", "remix_frozen", "uniform"), "remix")
    lines += ["**Kinds of routing**, held-out loss", "", *_routings(found)]
    lines += [
        "**While training** (instruction_induction, first seed, every other held-out batch)",
        "",
    ]
    lines += _histories(found)
    lines += ["**One LoRA of rank k r, k LoRAs of rank r**", ""]
    lines += comparison(found, II, EXPERTS, "remix")
    lines += ["**Selections**", "", *comparison(found, II, SELECTIONS, "remix")]
    lines += ["**Longer**: four times the steps, once through the training data", ""]
    lines += comparison(found, II, tuple(LONG), "lora_long")
    lines += ["Differences in loss:", "", *_differences(found, II, tuple(LONG), LONG_RIVALS)]
    lines += ["**ω**: 2/√(k r) (remix), 2/(k r)", ""]
    lines += comparison(found, II, ("remix", "remix_lora_type"), "remix")
    lines += ["**What may help**, by the loss on held-out training data of trec", ""]
    lines += comparison(helped, "trec", ("remix", *HELP, "mixlora"), "remix", "policy_ess")
    lines += ["**Weights** under top-k after training, instruction_induction", "", *_weights(found)]
    return "\n".join(lines) + "\n"


def found_rows(cells: Iterable[Cell], rows: Mapping[str, Row]) -> Found:
    """The rows of cells, by (task, method) and seed; empty where none is there."""
    found: Found = {}
    for cell in cells:
        seeds = found.setdefault((cell.task.name, cell.method), {})
        if cell.digest in rows:
            seeds[cell.seed] = rows[cell.digest]
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error over seeds; without an error for one; not run for none."""
    if not values:
        return NOT_RUN
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def paired(ours: Mapping[int, Row], reference: Mapping[int, Row]) -> str:
    """Mean ± standard error of the difference in loss, seed by seed."""
    seeds = sorted(set(ours) & set(reference))
    differences = [loss_of(ours[seed]) - loss_of(reference[seed]) for seed in seeds]
    if not all(map(math.isfinite, differences)):  # one of the two diverged, or both
        return "diverged"
    text = spread(differences)
    return f"+{text}" if differences and statistics.mean(differences) > 0 else text


def comparison(
    found: Found, task: str, methods: Sequence[str], reference: str, last: str = "accuracy"
) -> list[str]:
    """Methods beside each other on one task; `last` is a column of the rows."""
    head = ["method", "activated", "tokens", "learning rate", "loss", f"− {reference}"]
    body = []
    for method in methods:
        seeds = found.get((task, method), {})
        rows = list(seeds.values())
        whole = [row for row in rows if math.isfinite(loss_of(row))]
        first = next(iter(whole or rows), None)
        values = [float(row[last]) for row in whole if row[last]]
        body.append(
            [
                method,
                _short(first, "activated_parameters"),
                _short(first, "tokens"),
                (first["learning_rate"] or "—") if first else NOT_RUN,
                spread([loss_of(row) for row in rows]),
                "" if method == reference else paired(seeds, found.get((task, reference), {})),
                _of_all(rows, whole, values),
            ]
        )
    return table([*head, {"policy_ess": "ESS of the policy"}.get(last, last)], body)


def _differences(
    found: Found, task: str, methods: Sequence[str], references: Sequence[str]
) -> list[str]:
    """Every method with a row over every reference, seed by seed."""
    body = []
    for method in (name for name in methods if found.get((task, name))):
        over = [
            "" if other == method else paired(found[task, method], found.get((task, other), {}))
            for other in references
        ]
        body.append([method, *over])
    if not body:
        return [NOT_RUN, ""]
    return table(["method", *(f"− {name}" for name in references)], body)


def _of_all(rows: Sequence[Row], whole: Sequence[Row], values: Sequence[float]) -> str:
    """Mean and error of a column; not of the survivors, where some seeds diverged."""
    if len(whole) < len(rows):
        return "diverged"
    return "—" if rows and not values else spread(values)


def _short(row: Row | None, column: str) -> str:
    """A number of a row as 3.69M or 12k."""
    if row is None:
        return NOT_RUN
    if not row[column]:
        return "—"
    value = float(row[column])
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e4 else f"{value:.0f}"


def _search_table(rows: Mapping[str, Row]) -> list[str]:
    """Losses of the search; the best in bold, at the end of the grid with a mark."""
    tried: dict[str, dict[float, float]] = {}
    for cell in wanted(rows, guess=0.0):
        if cell.part == "search":
            rates = tried.setdefault(cell.method, {})
            if cell.digest in rows:
                rates[cell.learning_rate or 0.0] = loss_of(rows[cell.digest])
    body = []
    for method, rates in tried.items():
        best = best_rate(rates) if rates else None
        whole = len(rates) >= 3 and not next_rates(rates)
        cells = []
        for rate in GRID:
            text = f"{rates[rate]:.3f}" if rate in rates else ""
            edge = " (end of the grid)" if rate in (GRID[0], GRID[-1]) else ""
            cells.append(f"**{text}**{edge}" if whole and rate == best else text)
        body.append([method, *(cells if rates else [NOT_RUN] * len(GRID))])
    title = "**Learning rates**: loss on held-out training data of trec, first seed"
    return [title, "", *table(["method", *(f"{rate:g}" for rate in GRID)], body)]


def _routings(found: Found) -> list[str]:
    columns = ("loss", "loss_sampled", "loss_random", "loss_fixed")
    body = []
    for task in (II, "trec"):
        for method in DRAWING:
            if (task, method) in found:
                rows = list(found[task, method].values())
                if not all(math.isfinite(loss_of(row)) for row in rows):
                    body.append([task, method, *["diverged"] * (2 * len(columns))])
                    continue
                whole = [row for row in rows if row["loss_sampled"]]
                values = [[float(row[column]) for row in whole] for column in columns]
                gaps = [
                    [b - a for a, b in zip(values[0], kind, strict=True)] for kind in values[1:]
                ]
                policy = spread([float(row["policy_ess"]) for row in whole if row["policy_ess"]], 2)
                body.append([task, method, *map(spread, values), *map(spread, gaps), policy])
    kinds = ("sampled", "random", "one subset")
    head = ["task", "method", "top-k", *kinds, *(f"{kind} − top-k" for kind in kinds)]
    return table([*head, "ESS of the policy"], body)


def _histories(found: Found) -> list[str]:
    head = ["method", "step", "top-k", "sampled", "random", "one subset", "ESS", "least ESS"]
    keys = ("loss", "loss_sampled", "loss_random", "loss_fixed", "ess", "least_ess")
    body = []
    for method in ("mixlora", "remix_paper", "remix"):
        row = found.get((II, method), {}).get(0)
        for point in json.loads(row["history"] or "[]") if row else []:
            values = [f"{float(point[key]):.3f}" if key in point else "—" for key in keys]
            body.append([method, str(point["step"]), *values])
        if row is None:
            body.append([method, *[NOT_RUN] * (len(head) - 1)])
    return table(head, body)


def _weights(found: Found) -> list[str]:
    body = []
    for method in (*MIXED, "remix", "remix_router30"):
        row = next(iter(found.get((II, method), {}).values()), None)
        if row is None or not row["weights"]:
            body.append([method, *[NOT_RUN] * 4])
            continue
        weights = ", ".join(f"{weight:.3f}" for weight in json.loads(row["weights"]))
        numbers = [f"{float(row[key]):.2f}" for key in ("ess", "least_ess", "share_ess")]
        body.append([method, weights, *numbers])
    head = ["method", "largest weight, second, ...", "mean ESS", "least ESS, last layer"]
    return table([*head, "ESS of the experts' shares"], body)


def _where(rows: Mapping[str, Row]) -> str:
    if not rows:
        return ""
    row = list(rows.values())[-1]
    threads = f"{row['threads']} threads, torch {row['torch']}"
    return f"Last row: {row['date']}, {row['device']}, {threads}."


if __name__ == "__main__":
    main()

"""The figures of docs/performance.md, from the committed rows (`python -m benchmarks.tables`)."""

from __future__ import annotations

from benchmarks.bench_profile import KINDS, OURS_NOT_GEMM
from benchmarks.common import rows_of, table
from benchmarks.layers.cells import DEFAULT
from benchmarks.layers.growth import Row, growth, regrets

COLUMNS = (
    "remix",
    "lora_kr",
    "lora_nr",
    "dense_eager",
    "dense_compiled",
    "expert_loop",
    "grouped_mm",
    "einsum",
)
NOTHING = "not measured"


def performance_figures() -> str:
    """What stands between the markers."""
    grid = rows_of("grid", "cell", "variant")
    names = {str(cell) for cell in DEFAULT}
    grid = [row for row in grid if row["cell"] in names]
    steps, types = train_steps()
    profile = rows_of("profile", "part", "variant", "kind")
    lines = [*origin(grid), *layers(grid), *memory(grid), *dispatch(grid), *grown(grid)]
    lines += [*whole_steps(steps), *routers(types), *recording(rows_of("recording", "variant"))]
    lines += [*kinds(profile), *imports(rows_of("imports", "what"))]
    gpu = rows_of("gpu", "cell", "variant")
    lines += ["## On a GPU", ""]
    if gpu:
        head = ["cell", "variant", "ms", "over frozen", "peak MiB"]
        keys = ("cell", "variant", "time_ms", "over_frozen", "peak_mib")
        lines += [gpu[0]["device"], "", *table(head, [[row[k] for k in keys] for row in gpu])]
    else:
        lines += [f"{NOTHING.capitalize()}. `make bench-gpu` measures it where there is one.", ""]
    return "\n".join(lines)


def train_steps() -> tuple[list[Row], list[Row]]:
    """Rows of whole steps and generation; and those that compare types of routers."""
    rows = rows_of("train_step", "case", "variant")
    types = [row for row in rows if row["case"].startswith("routers")]
    return [row for row in rows if row not in types], types


def origin(rows: list[Row]) -> list[str]:
    """Where rows are from."""
    if not rows:
        return []
    row = rows[-1]
    return [
        f"{row['date']}, {row['device']}, {row['threads']} threads, torch {row['torch']}, Python "
        f"{row['python']}, fp32.",
        "",
    ]


def _title(row: Row) -> str:
    parts = [row["shape"], f"T={row['T']}"]
    if row["M"] != "1":
        parts.append(f"M={row['M']}")
    parts += [f"n={row['n']}", f"r={row['r']}", f"k={row['k']}"]
    if row["routing"] != "uniform":
        parts.append(row["routing"])
    return " ".join([*parts, "" if row["passes"] == "train" else "(forward)"]).strip()


def layers(rows: list[Row]) -> list[str]:
    """Every cell: each peer's time over the frozen linear's."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["cell"], {})[row["variant"]] = row
    body = []
    for variants in cells.values():
        found = [variants.get(name, {}).get("over_frozen") for name in COLUMNS]
        first = next(iter(variants.values()))
        frozen = float(variants["frozen"]["time_ms"])
        values = [f"{float(value):.2f}" if value else "–" for value in found]
        body.append([_title(first), f"{frozen:.2f}", *values])
    return [
        "## One adapted linear",
        "",
        "Time over the frozen linear's, the median of paired rounds with cold caches; forward and",
        "backward unless it says otherwise. `–`: not measured (a reason is in the row, if there is",
        "one; `dense_compiled` only runs at a few cells, for the time that compiling takes).",
        "",
        *table(["cell", "frozen ms", *COLUMNS], body),
    ]


def memory(rows: list[Row]) -> list[str]:
    """Peaks of some cells."""
    wanted = [row for row in rows if row["passes"] == "train" and row["peak_mib"]]
    wanted = [r for r in wanted if r["routing"] == "uniform" and r["T"] == "1024" and r["k"] == "2"]
    cells: dict[str, dict[str, str]] = {}
    for row in wanted:
        cells.setdefault(_title(row), {})[row["variant"]] = row["peak_mib"]
    body = [
        [title, *(f"{float(peaks[c]):.1f}" if c in peaks else "–" for c in ("frozen", *COLUMNS))]
        for title, peaks in cells.items()
    ]
    return [
        "Most MiB that torch holds during the pass, over what it held before:",
        "",
        *table(["cell", "frozen", *COLUMNS], body),
    ]


def dispatch(rows: list[Row]) -> list[str]:
    """How good `auto` is."""
    found = regrets(rows)
    if not found:
        return []
    worst = sorted(found.items(), key=lambda item: -item[1][2])
    titles = {row["cell"]: _title(row) for row in rows}
    body = [
        [titles[cell], taken, best, f"{ratio:.2f}"]
        for cell, (taken, best, ratio) in worst
        if ratio > 1.02
    ]
    rest = table(["cell", "auto", "fastest", "time over the fastest's"], body) if body else []
    return [
        "### The choice of strategy",
        "",
        f"`auto` took the fastest strategy, or one within 2 % of it, at {len(found) - len(body)} "
        f"of {len(found)} cells{'; the others:' if body else '.'}",
        "",
        *rest,
    ]


def grown(rows: list[Row]) -> list[str]:
    """Exponents."""
    body = [
        [
            g.axis,
            g.variant,
            ", ".join(map(str, g.sizes)),
            ", ".join(f"{cost:.2f}" for cost in g.costs_ms),
            f"{g.exponent:.2f}",
            f"{g.last_exponent:.2f}",
            g.formula,
        ]
        for g in growth(rows)
    ]
    return [
        "### How cost grows",
        "",
        "Adapters' ms (time over the frozen linear's; for M the whole time) along one size, all",
        "others fixed. Exponents: of the line through the logarithms of all points, of the largest",
        "two, and of the multiply-adds. Fixed costs of a call flatten the small end.",
        "",
        *table(["size", "variant", "at", "ms", "all", "largest two", "formula"], body),
    ]


def whole_steps(rows: list[Row]) -> list[str]:
    """Training steps and generation."""
    body = [
        [
            row["case"],
            row["variant"],
            row["time_s"],
            f"{float(row['ratio']):.2f}",
            row["ratio_to"],
            row.get("peak_mib") or "–",
        ]
        for row in rows
    ]
    return [
        "## Whole steps",
        "",
        "SmolLM2-135M, side by side; ratios are per selection, medians of paired rounds.",
        "Peak: the most that torch holds during the whole step, over what it held before.",
        "",
        *table(["case", "variant", "s", "time over", "of", "peak MiB"], body),
    ]


def routers(rows: list[Row]) -> list[str]:
    """The same step with every type of router."""
    lines = ["### Types of routers", ""]
    if not rows:
        return [*lines, f"{NOTHING.capitalize()} yet.", ""]
    ratio = {row["variant"]: float(row["ratio"]) for row in rows}
    body = [
        [name, f"{value:.2f}", f"{value / ratio['remix_M1']:.2f}"] for name, value in ratio.items()
    ]
    return [
        *lines,
        *origin(rows),
        f"{rows[-1]['case'].removeprefix('routers ')}, times a selection. `remix_M1` is ReMix with",
        "frozen routers, one selection a step as the learned types have; with M = 2, a selection",
        "shares the step's fixed costs. `mixlora_block` works on k times the hidden values, as its",
        "formula says. `mixlora_loop` is MixLoRA as a loop over experts with `index_add_`.",
        "",
        *table(["type", "over remix_M2", "over remix_M1"], body),
    ]


def recording(rows: list[Row]) -> list[str]:
    """What statistics cost."""
    found = {row["variant"]: row for row in rows}
    if "recorded" not in found:
        return []
    row = found["recorded"]
    return [
        "### Recording",
        "",
        *origin([row]),
        f"A recorder's own time is {float(row['share']):.1%} of a recorded step ({row['case']});",
        f"the step with it took {float(row['ratio']):.2f} of the time without, which is noise.",
        f"Reading what it counted, at logging steps: {row['reading_ms']} ms.",
        "",
    ]


def kinds(rows: list[Row]) -> list[str]:
    """Where the time goes."""
    lines = ["## Where the time goes", ""]
    if not rows:
        return [*lines, f"{NOTHING.capitalize()} yet.", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        ours = [row for row in rows if row["part"] == part]
        variants = list(dict.fromkeys(row["variant"] for row in ours))
        found = {(row["variant"], row["kind"]): row for row in ours}
        unit = "a selection" if part.startswith("step") else "a token"
        body = []
        for kind in KINDS:
            cells = []
            for variant in variants:
                row = found.get((variant, kind))
                share = "" if row is None else f" ({float(row['share']):.1%})"
                cells.append("–" if row is None else f"{float(row['ms']):.2f}{share}")
            body.append([kind, *cells])
        total = []
        for variant in variants:
            shares = [float(found[variant, kind]["share"]) for kind in OURS_NOT_GEMM]
            total.append(f"{sum(shares):.1%}")
        body.append(["ours, not a product", *total])
        lines += [
            f"{part}, ms {unit}, without what the profiler adds:",
            "",
            *table(["kind", *variants], body),
        ]
    return lines


def imports(rows: list[Row]) -> list[str]:
    """Seconds of whole processes."""
    body = [[row["what"], row["time_s"], row["p20_s"], row["p80_s"]] for row in rows]
    table_ = table(["process", "s", "p20", "p80"], body) if rows else [NOTHING, ""]
    return ["## Starting", "", *table_]

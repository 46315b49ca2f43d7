"""How the adapters' cost grows with T, n, k and M: exponents fitted to the grid's rows.

The cost is the time over the frozen linear's, `time - frozen`; along M the whole time, since what
selections share saves more than adapters cost. Along each axis, from the cells that differ in
nothing else, `log cost = p log size + c` by least squares, over all sizes and over the largest two:
a fixed cost a call flattens the curve where sizes are small. `formula` has the exponent of each
strategy's multiply-adds (`remix_kernels._dispatch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.layers.cells import SHAPES
from remix_kernels._dispatch import strategy_costs_s

Row = dict[str, str]
SIZES = ("shape", "T", "n", "r", "k", "M", "routing", "passes")
BASES: dict[str, dict[str, str]] = {
    "T": {"shape": "SmolLM2-135M up", "n": "8", "r": "8", "k": "2", "M": "1"},
    "n": {"shape": "SmolLM2-135M up", "T": "1024", "r": "8", "k": "2", "M": "1"},
    "k": {"shape": "SmolLM2-135M up", "T": "1024", "n": "32", "r": "16", "M": "1"},
    "M": {"shape": "SmolLM2-135M up", "T": "128", "n": "8", "r": "8", "k": "2"},
}
# Exponents of multiply-adds. With M selections of one x, dense makes x W and A x once.
FORMULA: dict[str, dict[str, str]] = {
    "dense": {"T": "1", "n": "1", "k": "0", "M": "below 1"},
    "grouped": {"T": "1", "n": "0", "k": "1", "M": "1"},
    "lora_nr": {"T": "1", "n": "1", "k": "0", "M": "1"},
    "expert_loop": {"T": "1", "n": "0", "k": "1", "M": "1"},
}


class Growth(NamedTuple):
    """One fitted line."""

    axis: str
    variant: str
    sizes: list[int]
    costs_ms: list[float]
    exponent: float
    last_exponent: float  # between the largest two sizes
    formula: str


def growth(rows: Iterable[Row]) -> Iterator[Growth]:
    """Every axis and variant with three sizes or more."""
    kept = [r for r in rows if r["passes"] == "train" and r["routing"] == "uniform"]
    frozen = {r["cell"]: float(r["time_ms"]) for r in kept if r["variant"] == "frozen"}
    for axis, base in BASES.items():
        line = [r for r in kept if all(r[size] == value for size, value in base.items())]
        for variant, exponents in FORMULA.items():
            points = sorted(
                (int(r[axis]), float(r["time_ms"]) - (axis != "M") * frozen[r["cell"]])
                for r in line
                if r["variant"] == variant and r["time_ms"]
            )
            points = [(size, cost) for size, cost in points if cost > 0]
            if len(points) < 3:
                continue
            sizes, costs = [p[0] for p in points], [p[1] for p in points]
            slopes = _slope(sizes, costs), _slope(sizes[-2:], costs[-2:])
            yield Growth(axis, variant, sizes, costs, *slopes, exponents[axis])


def _slope(sizes: list[int], costs: list[float]) -> float:
    """Of the least-squares line through the logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def regrets(rows: Iterable[Row]) -> dict[str, tuple[str, str, float]]:
    """By cell: (what `auto` takes, the fastest strategy, the first's time over the second's).

    From the medians of the strategies' ratios to the frozen linear, which are paired.
    """
    found: dict[str, dict[str, float]] = {}
    auto: dict[str, str] = {}
    for row in rows:
        if row["variant"] in ("dense", "grouped", "gather") and row["over_frozen"]:
            found.setdefault(row["cell"], {})[row["variant"]] = float(row["over_frozen"])
            auto[row["cell"]] = choice(row)
    result = {}
    for cell, ratios in found.items():
        best = min(ratios, key=ratios.__getitem__)
        taken = auto[cell]
        if taken in ratios:
            result[cell] = (taken, best, ratios[taken] / ratios[best])
    return result


def choice(row: Row) -> str:
    """What the cost model as it is now takes for a cell; the row has what it took then."""
    d, o = SHAPES[row["shape"]]
    rows = int(row["T"]) * int(row["M"])
    modelled = strategy_costs_s(rows, d, o, int(row["n"]), int(row["k"]), int(row["r"]), 4)
    return min(modelled, key=modelled.__getitem__)

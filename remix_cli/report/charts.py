"""The report's charts as plain data, which the page and the PNGs draw and CSV files hold.

A chart has views, of which one is shown at a time. A view's `data` is, by the chart's kind:

    lines   [{"run": i, "x": [...], "y": [...]}]
    bars    {"edges": [bins + 1], "series": [{"run": i, "y": [...]}]}
    heat    {"rows": [names], "columns": [names], "values": [rows][columns]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from remix_cli.report.runs import Run, number, text

MAX_POINTS = 400  # of a curve
MAX_ROWS = 256  # of a heatmap
MAX_CELLS = 2**14  # likewise
_MAX_TASKS = 64
_ALL_CELLS = 100_000  # of one run's tasks, layer by layer


@dataclass
class View:
    """One way to look at a chart."""

    label: str
    data: Any
    summary: str = ""  # read out in place of the picture


@dataclass
class Chart:
    """A figure of the report; without views, `empty` says why."""

    id: str
    title: str
    kind: str
    x: str
    y: str
    note: str
    views: list[View] = field(default_factory=list)
    empty: str = "No run has this."


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All charts of a report, empty ones included."""
    return [
        _losses(runs),
        _ess(runs),
        _policies(runs),
        _weights(runs),
        _shares(runs),
        _tasks(runs),
        _pairs(runs),
        _subsets(runs),
    ]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of a curve, evenly spaced, the last one among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _lines(curves: Sequence[Sequence[tuple[float, float]]], runs: Sequence[Run]) -> View:
    """A view without its label: a curve for each run that has one."""
    data, said = [], []
    for i, curve in enumerate(curves):
        if not curve:
            continue
        points = [(x, _short(y)) for x, y in thin(curve)]
        data.append({"run": i, "x": [x for x, _ in points], "y": [y for _, y in points]})
        said.append(f"{runs[i].name} from {points[0][1]:g} to {points[-1][1]:g}")
    return View("", data, "; ".join(said))


def _over_steps(
    runs: Sequence[Run], measures: dict[str, Callable[[Run], Sequence[tuple[float, float]]]]
) -> list[View]:
    views = []
    for label, curve in measures.items():
        view = _lines([curve(run) for run in runs], runs)
        if view.data:
            view.label = label
            views.append(view)
    return views


def _losses(runs: Sequence[Run]) -> Chart:
    views = _over_steps(
        runs, {"held-out": lambda run: run.eval_loss, "training": lambda run: run.loss}
    )
    note = "Mean loss of a labelled token. Held-out: top-k routing; step 0 is the base model."
    return Chart("loss", "Loss", "lines", "step", "loss", note, views)


def _of_layers(name: str, pick: Callable[[list[float]], float]) -> Callable[[Run], Any]:
    return lambda run: [(float(line["step"]), pick(line[name])) for line in run.series]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ess(runs: Sequence[Run]) -> Chart:
    measures = {
        "worst token, last layer": _of_layers("ess_min", lambda values: values[-1]),
        "worst token, all layers": _of_layers("ess_min", min),
        "mean over tokens and layers": _of_layers("ess", _mean),
    }
    note = (
        "Effective number of LoRAs behind a token: 1 when one weight has everything, k when k "
        "weights are equal, which ReMix's are by construction. The paper's Figure 3 is the worst "
        "token of the last layer."
    )
    title = "Effective sample size of the routing weights"
    views = _over_steps(runs, measures)
    return Chart("ess", title, "lines", "step", "ESS", note, views, _NO_ROUTING)


def _policies(runs: Sequence[Run]) -> Chart:
    measures = {
        "effective experts of the policy, mean": _of_layers("policy_ess", _mean),
        "effective experts of the policy, worst token": _of_layers("policy_ess_min", min),
        "entropy of the policy (nats), mean": _of_layers("entropy", _mean),
        "effective experts in use, mean over layers": _of_layers("share_ess", _mean),
    }
    note = (
        "The policy is softmax of the router's logits: with n equal logits its effective number "
        "of experts is n and its entropy log n. In use: of the shares of all tokens' choices."
    )
    views = _over_steps(runs, measures)
    return Chart("policy", "Router over training", "lines", "step", "", note, views, _NO_ROUTING)


def _weights(runs: Sequence[Run]) -> Chart:
    views = []
    kinds = {"every weight": "weight_histogram", "a token's largest": "top_weight_histogram"}
    for label, name in kinds.items():
        series, said, bins = [], [], 0
        for i, run in enumerate(runs):
            counts = [layer[name] for layer in run.held_out]
            if not counts or len({len(c) for c in counts}) > 1:
                continue
            summed = [sum(column) for column in zip(*counts, strict=True)]
            total = sum(summed)
            if total <= 0 or (bins and len(summed) != bins):
                continue
            bins = len(summed)
            share = [_short(count / total) for count in summed]
            series.append({"run": i, "y": share})
            top = max(range(bins), key=lambda b: share[b])
            said.append(f"{run.name}: most, {share[top]:.0%}, from {top / bins:g}")
        if series:
            edges = [_short(i / bins) for i in range(bins + 1)]
            views.append(View(label, {"edges": edges, "series": series}, "; ".join(said)))
    note = (
        "Routing weights on the held-out data, all layers, as shares of a token's total (the "
        "paper's Figure 2). ReMix's are all 1/k."
    )
    title = "Distribution of the routing weights"
    return Chart("weights", title, "bars", "weight", "share", note, views, _NO_ROUTING)


def _shares(runs: Sequence[Run]) -> Chart:
    views = []
    for run in runs:
        layers = _thin_rows(run.held_out)
        if not layers:
            continue
        n = max(len(layer["expert_share"]) for layer in layers)
        rows = [layer["expert_share"] for layer in layers]
        views.append(_heat(run.name, [_layer_name(layer) for layer in layers], n, rows))
    note = (
        "Share of each expert in a layer's choices on the held-out data, n times: 1 is even use, "
        "0 an expert that no token chose."
    )
    title = "Experts by layer"
    return Chart("experts", title, "heat", "expert", "layer", note, views, _NO_ROUTING)


def _tasks(runs: Sequence[Run]) -> Chart:
    views = []
    for run in runs:
        n = max((len(layer["expert_share"]) for layer in run.held_out), default=1)
        named = [task for layer in run.held_out for task in layer["task_share"]]
        tasks = list(dict.fromkeys(named))[: min(_MAX_TASKS, max(MAX_CELLS // n, 1))]
        names = [text(task) for task in tasks]
        layers = [layer for layer in run.held_out if set(tasks) <= set(layer["task_share"])]
        layers = [layer for layer in layers if len(layer["expert_share"]) == n]
        if not tasks or not layers:
            continue
        means = []
        for task in tasks:
            columns = zip(*(layer["task_share"][task] for layer in layers), strict=True)
            means.append([_mean(column) for column in columns])
        views.append(_heat(run.name, names, n, means))
        if len(runs) > 1:
            continue
        for layer in _thin_rows(layers)[: _ALL_CELLS // (len(tasks) * n)]:
            shares = [layer["task_share"][task] for task in tasks]
            views.append(_heat(_layer_name(layer), names, n, shares))
    note = "Share of each expert in the choices of one task's tokens, n times; mean over layers."
    if len(runs) == 1:
        note += " Each layer by itself is in the list."
    empty = 'The data name no tasks: give records a field "task".'
    return Chart("tasks", "Experts by task", "heat", "expert", "task", note, views, empty)


def _pairs(runs: Sequence[Run]) -> Chart:
    views = []
    for run in runs:
        n = max((len(layer["expert_share"]) for layer in run.held_out), default=0)
        layers = [layer for layer in run.held_out if len(layer["expert_share"]) == n]
        total = sum(layer["tokens"] for layer in layers)
        if not layers or n * n > MAX_CELLS or total <= 0:
            continue
        counts = [
            [sum(layer["co_selection"][i][j] for layer in layers) / total for j in range(n)]
            for i in range(n)
        ]
        rows = [[_lift(counts, i, j) for j in range(n)] for i in range(n)]
        names = [f"expert {i}" for i in range(n)]
        views.append(_heat(run.name, names, n, rows, scale=1.0))
    note = (
        "How often two experts are chosen by the same token, over what their shares alone would "
        "give: above 1 they go together, below 1 they replace each other. All layers together."
    )
    title = "Experts chosen together"
    return Chart("pairs", title, "heat", "expert", "expert", note, views, _NO_ROUTING)


def _lift(counts: Sequence[Sequence[float]], i: int, j: int) -> float:
    """P(i and j) / (P(i) P(j)); 0 where one is never chosen, and 1 for an expert with itself."""
    expected = counts[i][i] * counts[j][j]
    return 1.0 if i == j else counts[i][j] / expected if expected > 0 else 0.0


def _subsets(runs: Sequence[Run]) -> Chart:
    by_layer = []
    for run in runs:
        found = [(float(i), number(s.get("distinct_subsets"))) for i, s in enumerate(run.held_out)]
        by_layer.append([(i, count) for i, count in found if count is not None])
    by_linear = _lines(by_layer, runs)
    by_linear.label = "held-out data, by routed linear"
    views = [by_linear] if by_linear.data else []
    views += _over_steps(runs, {"training, mean over layers, by step": _distinct})
    note = (
        "How many different subsets of experts the tokens took. n experts with k active have "
        "n!/(k!(n-k)!) subsets; a count of 4096 means so many or more. In training, between logs."
    )
    title = "Diversity of subsets"
    return Chart("subsets", title, "lines", "linear or step", "subsets", note, views, _NO_ROUTING)


def _distinct(run: Run) -> list[tuple[float, float]]:
    points = []
    for line in run.series:
        counts = [number(count) for count in line.get("distinct_subsets") or []]
        known = [count for count in counts if count is not None]
        if known:
            points.append((float(line["step"]), _mean(known)))
    return points


_NO_ROUTING = "No run here has routers, or what they did was not recorded."


def _heat(
    label: str,
    names: Sequence[str],
    n: int,
    rows: Sequence[Sequence[float]],
    scale: float | None = None,
) -> View:
    """Values times `scale`; None: times n, so that 1 is even use."""
    values = [[_short(v * (n if scale is None else scale)) for v in row] for row in rows]
    flat = [value for row in values for value in row]
    columns = [str(i) for i in range(n)]
    summary = f"{label}: {len(rows)} rows, {n} columns, from {min(flat):g} to {max(flat):g}"
    return View(label, {"rows": list(names), "columns": columns, "values": values}, summary)


def _thin_rows(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_ROWS layers, and MAX_CELLS of their experts, evenly spaced."""
    widest = max((len(layer["expert_share"]) for layer in layers), default=1)
    rows = min(MAX_ROWS, max(MAX_CELLS // widest, 1))
    step = math.ceil(len(layers) / rows) or 1
    return list(layers[::step])


def _layer_name(layer: dict[str, Any]) -> str:
    """A linear's name without what all of them begin with."""
    name = layer["name"].removeprefix("base_model.model.")
    return text(name.removeprefix("model.layers."))


def _short(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0

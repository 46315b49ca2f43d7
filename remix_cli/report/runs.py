"""Reads runs' folders for the report. Nothing in them is trusted: numbers are checked.

A run counts as finished when it has `metrics.json`, which `remix train` writes last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remix_cli.run_folder import CONFIG_FILE, METRICS_FILE, is_run
from remix_model.routing_log import ROUTING_FILE, SERIES, read_lines

MAX_RUNS = 24
_LARGEST_FILE = 2**28  # bytes
_LARGEST = 1e18
_LONGEST_NAME = 80


class BrokenRun(Exception):
    """A run that cannot be shown; the message says why."""


@dataclass
class Run:
    """One finished run. Numbers are finite, lists as long as they say."""

    name: str
    method: str
    model: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    loss: list[tuple[float, float]]  # (step, loss) of training
    eval_loss: list[tuple[float, float]]  # held-out, before and after included
    layers: list[str] = field(default_factory=list)
    series: list[dict[str, Any]] = field(default_factory=list)  # of routing.jsonl, by step
    held_out: list[dict[str, Any]] = field(default_factory=list)  # RoutingStats, layer by layer
    damage: str = ""  # what of it cannot be shown, and why

    def number(self, name: str) -> float | None:
        """A number of the metrics."""
        return number(self.metrics.get(name))


def read_runs(
    folders: Sequence[Path], any_model: bool = False
) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read the runs of a report.

    Args:
        folders: Where `remix train` wrote them.
        any_model: Put runs of different base models side by side.

    Returns:
        The runs, and (name, reason) of those that cannot be shown.

    Raises:
        ValueError: A folder is no run's, is given twice, or all are broken; there are too many; or
            base models differ.
    """
    if len(folders) > MAX_RUNS:
        raise ValueError(f"{len(folders)} runs are more than the {MAX_RUNS} that fit a page")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: check the path")
        if not is_run(folder):
            raise ValueError(f"{folder} is no run's folder: `remix train` wrote no {CONFIG_FILE}")
        if places.count(place) > 1:
            raise ValueError(f"{folder} is given twice: name each run once")
    runs, skipped = [], []
    for name, place in zip(_names(places), places, strict=True):
        try:
            runs.append(read_run(place, name))
        except BrokenRun as error:
            skipped.append((name, str(error)))
    if not runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
        raise ValueError(f"no run can be shown ({reasons})")
    models = list(dict.fromkeys(run.model for run in runs))
    if len(models) > 1 and not any_model:
        of = {model: next(run.name for run in runs if run.model == model) for model in models}
        raise ValueError(
            f"the runs are of different base models, {of[models[0]]} of {models[0]} and "
            f"{of[models[1]]} of {models[1]}, whose losses cannot be compared: report on them "
            "apart, or side by side with --any-model"
        )
    return runs, skipped


def read_run(folder: Path, name: str) -> Run:
    """Read one run.

    Raises:
        BrokenRun: It is not finished, or damaged.
    """
    if not (folder / METRICS_FILE).is_file():
        raise BrokenRun(f"not finished: there is no {METRICS_FILE} (go on with --resume)")
    metrics = _read_metrics(folder / METRICS_FILE)
    config = metrics.get("config")
    config = config if isinstance(config, dict) else {}
    steps = number(metrics.get("train_steps"))
    loss = _curve(metrics.get("loss_history"), "loss")
    held_out = _curve(metrics.get("eval_history"), "eval_loss")
    if steps is None or not (loss or held_out or number(metrics.get("eval_loss_after"))):
        raise BrokenRun(f"{METRICS_FILE} has no steps or no losses")
    before, after = (number(metrics.get(f"eval_loss_{when}")) for when in ("before", "after"))
    if before is not None:
        held_out = [(0.0, before), *(point for point in held_out if point[0] > 0)]
    if after is not None:
        held_out = [*(point for point in held_out if point[0] < steps), (steps, after)]
    method = metrics.get("method") or config.get("method") or config.get("router_type")
    run = Run(
        name=name,
        method=text(method or "remix"),
        model=text(_base_model(folder) or config.get("model") or "unknown"),
        metrics=metrics,
        config=config,
        loss=loss,
        eval_loss=held_out,
    )
    if (folder / ROUTING_FILE).is_file():
        _read_routing(folder / ROUTING_FILE, run)
    run.damage = _damage(folder / ROUTING_FILE, run)
    return run


def number(value: Any) -> float | None:
    """A number of sensible size, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST else None  # which nan is not


def text(value: Any) -> str:
    """A short text without control characters."""
    printable = "".join(c if c.isprintable() else " " for c in str(value)[: 4 * _LONGEST_NAME])
    return printable if len(printable) <= _LONGEST_NAME else f"{printable[:_LONGEST_NAME]}…"


def _names(places: Sequence[Path]) -> list[str]:
    """Folders' names; where two are alike, with as many parents as tell them apart."""
    depth, names = 1, [place.name for place in places]
    while len(set(names)) < len(names) and depth < 20:
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return [text(name) for name in names]


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise BrokenRun(f"{path.name} has {path.stat().st_size} bytes: none of ours is so big")
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenRun(f"{path.name} cannot be read: {text(error)}") from error
    if not isinstance(metrics, dict):
        raise BrokenRun(f"{path.name} is no run's")
    return metrics


def _base_model(folder: Path) -> Any:
    """The base model's name or path, absolute, as the run's configuration has it."""
    import yaml

    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return config.get("model") if isinstance(config, dict) else None


def _curve(history: Any, key: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have both, by step."""
    points = {}
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, Mapping):
            step, value = number(entry.get("step")), number(entry.get(key))
            if step is not None and value is not None:
                points[step] = value
    return sorted(points.items())


def _read_routing(path: Path, run: Run) -> None:
    """Read what is whole of routing.jsonl."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return
        lines = list(read_lines(path))
    except OSError:
        return
    layers: list[str] = []
    for line in lines:
        named = line.get("layers")
        if isinstance(named, list):
            layers = [text(name) for name in named]
        elif isinstance(line.get("held_out"), list):
            run.held_out = [layer for layer in line["held_out"] if _is_layer(layer)]
        elif number(line.get("step")) is not None and _fits(line, len(layers)):
            run.series.append(line)
    run.layers = layers
    run.series = [line for line in run.series if len(line["ess"]) == len(layers)]


def _damage(path: Path, run: Run) -> str:
    """What is not there of what the routers did, as a sentence; empty for nothing."""
    recorded = run.metrics.get("routing")
    layers = recorded.get("layers") if isinstance(recorded, dict) else None
    if not isinstance(layers, list):
        return ""  # no routers, or no held-out data
    if not path.is_file():
        return f"there is no {path.name}, which says what its routers did"
    logged = {step for step, _ in run.loss} - {float(line["step"]) for line in run.series}
    if logged or len(run.held_out) < len(layers):
        return f"lines of {path.name}, which says what its routers did, are missing or damaged"
    return ""


def _fits(line: dict[str, Any], layers: int) -> bool:
    """Whether a line has a number for each layer."""
    lists = [line.get(name) for name in SERIES if name != "distinct_subsets"]
    return layers > 0 and all(_numbers(values, layers) for values in lists)


def _is_layer(layer: Any) -> bool:
    """Whether a layer's statistics have the shapes that the charts read."""
    if not isinstance(layer, dict) or not isinstance(layer.get("expert_share"), list):
        return False
    n = len(layer["expert_share"])
    pairs, tasks = layer.get("co_selection"), layer.get("task_share")
    bins = [layer.get("weight_histogram"), layer.get("top_weight_histogram")]
    return (
        0 < n <= 4096
        and _numbers(layer["expert_share"], n)
        and isinstance(layer.get("name"), str)
        and number(layer.get("tokens")) is not None
        and all(isinstance(b, list) and 0 < len(b) <= 100 and _numbers(b, len(b)) for b in bins)
        and isinstance(pairs, list)
        and len(pairs) == n
        and all(_numbers(row, n) for row in pairs)
        and isinstance(tasks, dict)
        and all(_numbers(share, n) for share in tasks.values())
    )


def _numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(number(value) is not None for value in values)

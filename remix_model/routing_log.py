"""What the routers did over a run, as a file: `routing.jsonl`, a line for each training log.

    {"layers": [names]}                       once, and again where the layers are others
    {"step": s, "ess": [L], ..., "expert_share": [L][n], "weight_histogram": [20]}
    {"step": s, "held_out": [RoutingStats.to_dict()'s layers]}      last, by `remix train`

Lines are appended. Training that resumes at step s first drops what came after it, so that the file
ends as if the run had never stopped; a line that a killed run left half-written goes too.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from remix_model.stats import RoutingStats

ROUTING_FILE = "routing.jsonl"
SERIES = (
    "ess",
    "ess_min",
    "policy_ess",
    "policy_ess_min",
    "share_ess",
    "entropy",
    "distinct_subsets",
)
_DIGITS = 4


class RoutingLog(TrainerCallback):
    """Writes the file into a Trainer's output_dir; on one process, of that process's tokens."""

    def __init__(self) -> None:
        """Nothing is written before training begins."""
        self._path: Path | None = None
        self._layers: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was logged up to the step that training begins with."""
        self._path = Path(args.output_dir) / ROUTING_FILE if state.is_world_process_zero else None
        self._layers = []
        if self._path is None or not self._path.exists():
            return
        kept: list[dict[str, Any]] = []
        try:
            lines = read_lines(self._path)
            kept = [line for line in lines if 0 <= _step(line) <= state.global_step]
            kept = [line for line in kept if "held_out" not in line]
            partial = self._path.with_name(f".{ROUTING_FILE}.{os.getpid()}")
            partial.write_text("".join(_text(line) for line in kept), encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            self._give_up(error)
        self._layers = next((line["layers"] for line in reversed(kept) if "layers" in line), [])

    def add(self, step: int, stats: RoutingStats) -> None:
        """Append one log's line."""
        self._append(series_line(step, stats), [layer.name for layer in stats.layers])

    def add_held_out(self, step: int, stats: RoutingStats) -> None:
        """Append what the finished model does with held-out data."""
        line = {"step": step, "held_out": _round_all(stats.to_dict()["layers"])}
        self._append(line, [layer.name for layer in stats.layers])

    def _append(self, line: dict[str, Any], layers: list[str]) -> None:
        if self._path is None or not layers:
            return
        header = {} if layers == self._layers else {"step": line["step"], "layers": layers}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write((_text(header) if header else "") + _text(line))
        except OSError as error:
            self._give_up(error)
        self._layers = layers

    def _give_up(self, error: OSError) -> None:
        """Statistics are not worth a run."""
        warnings.warn(
            f"{self._path} cannot be written ({error.strerror}): training goes on, and what the "
            "routers do is not kept",
            stacklevel=2,
        )
        self._path = None


def series_line(step: int, stats: RoutingStats) -> dict[str, Any]:
    """One log's numbers; each a list with a number for each layer."""
    line: dict[str, Any] = {
        "step": step,
        "tokens": max((s.tokens for s in stats.layers), default=0),
    }
    for name in SERIES:
        values = [getattr(layer, name) for layer in stats.layers]
        line[name] = _round_all(values)
    line["expert_share"] = _round_all([layer.expert_share for layer in stats.layers])
    histograms = zip(*(layer.weight_histogram for layer in stats.layers), strict=True)
    line["weight_histogram"] = [sum(counts) for counts in histograms]
    return line


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The file's lines that are whole.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and text.endswith("\n"):
                yield line


def _step(line: dict[str, Any]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else -1


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def _round_all(value: Any) -> Any:
    """Lists and dictionaries with their numbers at a few digits."""
    if isinstance(value, dict):
        return {key: _round_all(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_round_all(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

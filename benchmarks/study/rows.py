"""The table of finished cells, results/study.csv: a row is there as a whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

# Not from benchmarks.common, which would load torch into the runner for as long as the study takes.
TABLE = Path(__file__).parents[1] / "results" / "study.csv"
COLUMNS = (
    *("name", "digest", "part", "task", "method", "seed", "learning_rate", "options"),
    *("steps", "batch", "split", "status"),
    *("loss", "loss_sampled", "loss_random", "loss_fixed", "train_loss"),
    *("accuracy", "answered", "accuracies"),
    *("tokens", "train_seconds", "seconds", "tokens_per_s", "peak_rss_mib"),
    *("activated_parameters", "trainable_parameters"),
    *("ess", "policy_ess", "share_ess", "dead_experts", "least_ess", "weights"),
    *("history", "routing", "train_losses"),
    *("date", "commit", "device", "threads", "torch", "transformers", "peft", "python"),
)


def read_rows(table: Path = TABLE) -> dict[str, dict[str, str]]:
    """Whole rows by digest, the last of each; a line that was only half written is left out.

    A column that is newer than the table is empty.
    """
    if not table.exists():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        blank = dict.fromkeys(COLUMNS, "")
        rows = [blank | row for row in csv.DictReader(file) if _is_whole(row)]
    return {row["digest"]: row for row in rows}


def _is_whole(row: Mapping[str | None, object]) -> bool:
    """Whether a line has all its columns and no more: csv gives None for what is not there."""
    return None not in row and None not in row.values() and bool(row.get("digest"))


def add_row(row: Mapping[str, object], table: Path = TABLE) -> None:
    """Add a row, over one of the same digest; the table is replaced, so it is never half there.

    Raises:
        ValueError: The row has a column that is not in `COLUMNS`.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"the column {unknown[0]!r} is not in rows.COLUMNS: add it there")
    rows: dict[str, Mapping[str, object]] = dict(read_rows(table))
    rows[str(row["digest"])] = row
    table.parent.mkdir(parents=True, exist_ok=True)
    temporary = table.with_suffix(".partial")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows.values())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(table)

"""What work costs on a processor: the constants of the cost model, shipped or measured by the user.

`remix bench --calibrate` measures this machine's and writes them to calibration.json in
REMIX_CACHE_DIR (default: remix in $XDG_CACHE_HOME or ~/.cache), where every later process of as
many threads finds them. REMIX_CALIBRATION names another file, or is "shipped": look for none. Both
are read once in a process.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True)
class Costs:
    """Seconds for each unit of work of a forward and backward pass."""

    flop_s: float  # of a GEMM
    byte_s: float  # of an expert's matrices, read
    pair_byte_s: float  # of rows of x and y, gathered and scattered
    dense_call_s: float
    expert_call_s: float  # a non-empty expert, grouped: index_select, two GEMMs, index_add
    slot_call_s: float  # a (row, slot), gather: two matrix-vector products


# Fitted to benchmarks/results/calibration.csv: two cores, fp32. Their ratios decide.
SHIPPED = Costs(
    flop_s=6.5e-12,
    byte_s=1.7e-10,
    pair_byte_s=2.45e-10,
    dense_call_s=1.07e-3,
    expert_call_s=1.6e-4,
    slot_call_s=9.2e-5,
)


def calibration_file() -> Path | None:
    """Where this user's constants are looked for; None: nowhere."""
    chosen = os.environ.get("REMIX_CALIBRATION", "")
    if chosen == "shipped":
        return None
    return Path(chosen) if chosen else cache_folder() / "calibration.json"


def cache_folder() -> Path:
    """REMIX_CACHE_DIR, else remix in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("REMIX_CACHE_DIR") or Path(cache) / "remix")


def costs() -> Costs:
    """The constants to decide by; looked for once for each number of threads.

    Raises:
        ValueError: REMIX_CALIBRATION names a file that holds none.
    """
    return costs_with(torch.get_num_threads())


@functools.cache  # a decoded token asks at every layer
def costs_with(threads: int) -> Costs:
    """A file's constants; the shipped ones where there is no file, or it is of other threads."""
    path, named = calibration_file(), bool(os.environ.get("REMIX_CALIBRATION"))
    if path is None:
        return SHIPPED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        constants = Costs(**found["costs"])
        if not all(0.0 <= value < 1.0 for value in asdict(constants).values()):
            raise ValueError("a cost is negative or a second and more")
    except FileNotFoundError:
        if named:
            raise ValueError(
                f"REMIX_CALIBRATION={path} is not there: write it with `remix bench --calibrate`, "
                "or unset the variable"
            ) from None
        return SHIPPED
    except (OSError, ValueError, TypeError, KeyError) as error:
        names = ", ".join(field.name for field in fields(Costs))
        message = f"{path} holds no calibration ({error}); it needs `costs` with {names}"
        if named:
            raise ValueError(message) from None
        warnings.warn(f"{message}; the shipped constants are used", stacklevel=2)
        return SHIPPED
    return constants if named or found.get("threads") == threads else SHIPPED


def write_calibration(path: Path, constants: Costs, facts: dict[str, object]) -> None:
    """Write constants to a file that `costs` reads; it is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "costs": asdict(constants)}, indent=2)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    costs_with.cache_clear()

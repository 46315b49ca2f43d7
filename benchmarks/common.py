"""What every benchmark shares: interleaved timing, peak memory, rows that say where they are from.

Variants of one comparison take turns within each round (A B C A B C ...), so that a machine whose
speed drifts slows all of them; ratios are taken round by round, and their median is what is quoted.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from remix_cli.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
THREADS = 2


@dataclass(frozen=True)
class Timing:
    """Times of one variant, a number a round."""

    times_ms: list[float]

    @property
    def median_ms(self) -> float:
        """Median over rounds."""
        return statistics.median(self.times_ms)

    def quantile_ms(self, q: float) -> float:
        """The q-quantile over rounds, by nearest rank."""
        return quantile(self.times_ms, q)

    def ratios_to(self, other: Timing) -> list[float]:
        """This time over the other's in the same round, for every round."""
        return [a / b for a, b in zip(self.times_ms, other.times_ms, strict=True)]

    def ratio_to(self, other: Timing) -> float:
        """Median over rounds of this time over the other's in the same round."""
        return statistics.median(self.ratios_to(other))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def prepare_cpu() -> None:
    """Two threads, and an allocator that keeps what it has, as `remix train` runs on a processor.

    Else the page faults of each variant are timed too, which on a virtual machine come and go.
    """
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    *,
    cold: bool = False,
    seconds: float = float("inf"),
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time each variant once a round, in turn; each round begins with another one.

    Args:
        variants: What to run.
        rounds: At most.
        warmup: Rounds that are not counted.
        cold: Fill the processor's caches with something else before each run, as the rest of a
            model would: what a run reads comes from memory.
        seconds: Rounds end then, but not before there are 5.
        clock: Runs a variant and returns its ms; None: by the wall.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    other = torch.empty(_cache_bytes() // 4 if cold else 0)
    began = time.perf_counter()
    names = list(variants)
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > seconds:
            break
        first = done % len(names)
        for name in (*names[first:], *names[:first]):
            other.fill_(1.0)
            times[name].append((clock or wall_ms)(variants[name]))
    return {name: Timing(values) for name, values in times.items()}


def wall_ms(run: Callable[[], object]) -> float:
    """One run by the clock on the wall."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cache_bytes() -> int:
    """A little more than the largest cache of the processor; 64 MiB where it does not say."""
    try:
        return max(2**26, int(1.1 * os.sysconf("SC_LEVEL3_CACHE_SIZE")))
    except (AttributeError, ValueError, OSError):
        return 2**26


def peak_bytes(run: Callable[[], object], warm: bool = False) -> int:
    """The most bytes that torch held at once on the CPU during `run`, over what it held before.

    From the profiler's allocation events: what torch allocates, not resident memory. `warm`: it has
    run before.
    """
    from torch.profiler import ProfilerActivity, profile

    if not warm:
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth|, in fp64."""
    difference = (value.detach().double() - truth.detach().double()).norm()
    return float(difference / truth.detach().double().norm())


def environment() -> dict[str, str]:
    """Where a row was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": _device(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_rows(name: str, rows: Sequence[dict[str, object]]) -> Path:
    """Append rows to results/<name>.csv, each with its environment.

    Rows from before a column was added get an empty one.
    """
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    full = [{**where, **row} for row in rows]
    header = _read_table(path, 0)[0]
    columns = list(dict.fromkeys([*header, *full[0]]))
    if columns == header:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerows(full)
    else:
        _write_table(path, columns, [*_read_table(path)[1], *full])
    return path


def _read_table(path: Path, most: int | None = None) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the first rows of a table; none of either if it is not there."""
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(islice(reader, most))


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def replace_rows(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as the whole of results/<name>.csv: for what is computed, not measured."""
    path = RESULTS / f"{name}.csv"
    _write_table(path, list(rows[0]), rows)
    return path


def rows_of(name: str, *keys: str) -> list[dict[str, str]]:
    """The last row for each combination of keys in results/<name>.csv; none if it is not there."""
    rows = _read_table(RESULTS / f"{name}.csv")[1]
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Markdown."""
    rule = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)] + [""]


def _commit() -> str:
    """Short hash, with + when the tree has other changes than results."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":!results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def _device() -> str:
    """The processor: these scripts time the CPU, also on a machine that has a GPU."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"

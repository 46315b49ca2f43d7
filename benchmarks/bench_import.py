"""How long it takes to import the packages and to start the command line: whole processes.

Unit: s, medians of interleaved rounds. What `import torch, remix_kernels` takes more than `import
torch` is what remix_kernels adds.

    python -m benchmarks.bench_import [--rounds 7] [--no-save]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from benchmarks.common import interleaved, write_rows

COMMANDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch, remix_kernels": ["-c", "import torch, remix_kernels"],
    "remix --help": ["-m", "remix_cli", "--help"],
    "remix train --help": ["-m", "remix_cli", "train", "--help"],
}


def process(arguments: list[str]) -> Callable[[], None]:
    """Start a Python and wait for it."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    runs = {name: process(arguments) for name, arguments in COMMANDS.items()}
    times = interleaved(runs, args.rounds, warmup=1)
    rows: list[dict[str, object]] = [
        {
            "what": name,
            "time_s": f"{timing.median_ms / 1e3:.3f}",
            "p20_s": f"{timing.quantile_ms(0.2) / 1e3:.3f}",
            "p80_s": f"{timing.quantile_ms(0.8) / 1e3:.3f}",
        }
        for name, timing in times.items()
    ]
    for row in rows:
        print(f"{row['what']:30s} {row['time_s']} s ({row['p20_s']} to {row['p80_s']})")
    if not args.no_save:
        print(f"written to {write_rows('imports', rows)}")


if __name__ == "__main__":
    main()

"""Every benchmark of the CPU, one after the other: `make bench`.

Microbenchmarks by pytest-benchmark; then, side by side with what users would otherwise run, one
adapted linear, a training step and generation; then where their time goes.

python -m benchmarks.run [--no-save] [--compare ROWS]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_import, bench_layer, bench_profile, bench_train_step


def main() -> None:
    """Run each script's main; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="append no rows to results")
    parser.add_argument("--compare", metavar="ROWS", help="only compare with these, of bench_layer")
    args = parser.parse_args()
    if args.compare:
        sys.argv = ["bench_layer", "--compare", args.compare]
        bench_layer.main()
    save = ["--no-save"] if args.no_save else []
    started = time.time()
    folder = str(Path(__file__).parent)
    timing = ["--benchmark-only", "--benchmark-max-time=0.3", "--benchmark-columns=min,median,iqr"]
    code = pytest.main([folder, "-q", "-p", "no:cacheprovider", *timing])
    if code:
        raise SystemExit(int(code))
    # All of it would take half of the time.
    fewer = {bench_train_step: ["--rounds", "3", "--parts", "step", "generate"]}
    for module in (bench_layer, bench_train_step, bench_profile, bench_import):
        print(f"\n== {module.__name__}", flush=True)
        sys.argv = [module.__name__, *save, *fewer.get(module, [])]
        module.main()
    print(f"\n{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

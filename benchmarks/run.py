"""Every benchmark of the CPU, one after the other: `make bench`.

python -m benchmarks.run [--rounds N] [--no-save]      as each script's own
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import bench_crossover, bench_layer, bench_train_step


def main() -> None:
    """Run each script's main with the arguments that all of them take."""
    arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-save", action="store_true")
    parser.parse_args(arguments)  # before the first of them writes rows
    for module in (bench_layer, bench_crossover, bench_train_step):
        print(f"\n== {module.__name__}")
        sys.argv = [module.__name__, *arguments]
        module.main()


if __name__ == "__main__":
    main()

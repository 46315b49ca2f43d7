"""Every benchmark that this machine can run, one after the other: `make bench`."""

from __future__ import annotations

import sys

from benchmarks import bench_layer, bench_train_step


def main() -> None:
    """Run each script's main with this command's arguments, where it takes them."""
    arguments = sys.argv[1:]
    for module in (bench_layer, bench_train_step):
        print(f"\n== {module.__name__}")
        sys.argv = [module.__name__, *arguments]
        module.main()


if __name__ == "__main__":
    main()

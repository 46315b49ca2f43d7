"""What recording costs a training step of SmolLM2-135M: the same step with and without a recorder.

Both variants run in every round, in turns; `ratio` is the median of the rounds' ratios. What it
shows is as small as the noise, so the recorder's own time is taken as well, on the clock of a
processor, which waits for every operation: `share` is the median of its shares of the recorded
steps, and the goal is 0.02 at most. The trainers record every step; what is read at logging steps
is timed apart. Unit: s a step, ms a reading.

    python -m benchmarks.bench_recording [--rounds 9] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.bench_train_step import BATCH, LENGTH, TARGETS, K, N, R, batch_of, build, remix_step
from benchmarks.common import interleaved, prepare_cpu, write_rows
from remix_model import ReMixConfig
from remix_model.stats import RoutingRecorder

SELECTIONS = 2


class TimedRecorder(RoutingRecorder):
    """Knows how long it took, and the steps that it recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.own_s = 0.0
        self.shares: list[float] = []

    def add(self, *args: Any) -> None:
        """The parent's, timed."""
        start = time.perf_counter()
        super().add(*args)
        self.own_s += time.perf_counter() - start

    def detach(self) -> None:
        """The parent's, timed; it counts what is left."""
        start = time.perf_counter()
        super().detach()
        self.own_s += time.perf_counter() - start

    def recorded(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as the trainers run it."""

        def run() -> None:
            self.own_s, start = 0.0, time.perf_counter()
            self.attach()
            step()
            self.detach()
            self.shares.append(self.own_s / (time.perf_counter() - start))

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    model = build(ReMixConfig(num_experts=N, top_k=K, r=R, target_modules=TARGETS))
    recorder = TimedRecorder(model)
    plain = remix_step(model, batch_of(BATCH, 0.5), SELECTIONS)
    variants = {"plain": plain, "recorded": recorder.recorded(plain)}
    times = interleaved(variants, args.rounds, warmup=1)
    start = time.perf_counter()
    recorder.stats()
    reading_ms = 1e3 * (time.perf_counter() - start)
    share = statistics.median(recorder.shares[1:])  # the first is the warm-up's
    rows: list[dict[str, object]] = []
    for name, timing in times.items():
        row: dict[str, object] = {
            "case": f"{BATCH}x{LENGTH}-n{N}-k{K}-r{R}-M{SELECTIONS}",
            "variant": name,
            "time_s": f"{timing.median_ms / 1e3:.3f}",
            "ratio": f"{timing.ratio_to(times['plain']):.4f}",
            "share": f"{share:.4f}" if name == "recorded" else "",
            "reading_ms": f"{reading_ms:.1f}" if name == "recorded" else "",
        }
        rows.append(row)
        print(f"{name:9s} {row['time_s']:>8} s   x plain {row['ratio']}")
    print(f"recorder  {share:.4f} of a step; reading {reading_ms:.1f} ms")
    if not args.no_save:
        print(f"written to {write_rows('recording', rows)}")


if __name__ == "__main__":
    main()

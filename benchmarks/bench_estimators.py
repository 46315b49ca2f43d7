"""The routers' estimators: variance, cost, the shared prefix, and learning curves.

variance   of the routers' gradient over M, by credit, log-probability and forward-only
           selections, on stories260k and SmolLM2-135M with partly trained adapters
steps      time and peak memory of a SmolLM2 step over M and G, same tokens
prefix     time and memory with the blocks below the first adapted one run once
planted    steps until a router alone has found the right experts, known by construction

python -m benchmarks.bench_estimators [--parts variance steps prefix planted] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator

import torch

from benchmarks.common import prepare_cpu, write_rows
from benchmarks.estimators import cost, planted, variance
from benchmarks.estimators.models import SMOLLM2, partly_trained, stories260k_folder

PLANTED = {
    "sequence-ordered": {},
    "sequence-unordered": {"log_prob": "unordered"},
    "causal-ordered": {"credit": "causal"},
    "causal-unordered": {"credit": "causal", "log_prob": "unordered"},
    "causal-unordered-G1": {"credit": "causal", "log_prob": "unordered", "grad_selections": 1},
}


def show(rows: list[dict[str, object]]) -> None:
    """Print rows as a table."""
    keys = list(rows[0])
    widths = [max(len(k), *(len(str(row[k])) for row in rows)) for k in keys]
    for row in [dict(zip(keys, keys, strict=True)), *rows]:
        print("  ".join(str(row[k]).rjust(w) for k, w in zip(keys, widths, strict=True)))


def measure_variance(
    groups: int, all_labelled: bool, models: list[str]
) -> Iterator[list[dict[str, object]]]:
    """Both models, one after the other; stories260k only where it is."""
    for name in models:
        if name != SMOLLM2 and stories260k_folder() is None:
            print(f"{name} is not here: set REMIX_TEST_MODELS to the folder that holds it")
            continue
        rows: list[dict[str, object]] = []
        model, batches = partly_trained(name, all_labelled)
        size, length = batches[0]["input_ids"].shape
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        share = labels / sum(int(batch["attention_mask"].sum()) for batch in batches)
        error = variance.check(model, batches[0])
        print(f"{name}: gradients agree with delivered ones to {error:.1e}", flush=True)
        chunk = 32 if name == "stories260k" else 8
        for row in variance.variances(
            model,
            batches,
            groups * (4 if name == "stories260k" else 1),
            chunk,
            lambda done: print(f"\r  {done} groups", end="", flush=True),
        ):
            rows.append(
                {
                    "model": name,
                    "batch": f"{len(batches)} of {size}x{length}",
                    "labelled": f"{share:.2f}",
                    **row,
                }
            )
        print()
        yield rows


def measure_planted(seeds: int, most: int, rates: list[float]) -> list[dict[str, object]]:
    """Median over seeds of the steps; `most` where a run did not get there."""
    rows: list[dict[str, object]] = []
    for m, rate, (name, options) in itertools.product((2, 8), rates, PLANTED.items()):
        found = [planted.steps_until_right(seed, m, most, rate, **options) for seed in range(seeds)]
        steps = [most if step is None else step for step, _ in found]
        rows.append(
            {
                "estimator": name,
                "M": m,
                "learning_rate": rate,
                "seeds": seeds,
                "reached": sum(step is not None for step, _ in found),
                "median_steps": statistics.median(steps),
                "least": min(steps),
                "most": max(steps),
                "share_right": f"{statistics.mean(share for _, share in found):.3f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, append the rows."""
    parts = ["variance", "steps", "prefix", "planted"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=(), help="of steps; default: all")
    parser.add_argument("--groups", type=int, default=2, help="of 32 selections a batch, variance")
    parser.add_argument(
        "--all-labelled", action="store_true", help="SmolLM2 on all tokens, not responses"
    )
    parser.add_argument("--models", nargs="+", default=["stories260k", SMOLLM2])
    parser.add_argument("--seeds", type=int, default=5, help="for planted")
    parser.add_argument("--most", type=int, default=1000, help="steps of planted")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03], help="of planted"
    )
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    for part in args.parts:
        print(f"\n== {part}", flush=True)
        if part == "variance":
            measured = measure_variance(args.groups, args.all_labelled, args.models)
        elif part == "steps":
            measured = iter([cost.steps(args.rounds, args.cases)])
        elif part == "prefix":
            measured = iter([cost.prefixes(args.rounds)])
        else:
            torch.set_num_threads(1)  # small tensors: threads would wait for each other
            measured = iter([measure_planted(args.seeds, args.most, args.rates)])
        for rows in measured:
            show(rows)
            if not args.no_save:
                print(f"written to {write_rows(f'estimators_{part}', rows)}")


if __name__ == "__main__":
    main()

"""Train, evaluate, generate, save and reload in a loop: does anything grow?

A row a cycle: resident memory (MiB), open files, threads, live Python objects, and the cycle's
time (s). The run fails when one of them has grown by more than its allowance from the second third
of the cycles on, by the median of the slopes between all pairs of cycles (Theil and Sen), which a
few odd cycles do not move. What is loaded and cached once is over by then.

    python -m benchmarks.soak --minutes 120
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import prepare_cpu, write_rows

# What may come by chance, over a whole run.
ALLOWED = {"rss_mib": 24.0, "open_files": 0.9, "threads": 0.9, "objects": 2000.0}
LENGTH = 64


def main() -> int:
    """Run the loop for a while, write its rows, and say whether anything grew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a cycle")
    parser.add_argument("--results", default="soak", help="name of the table in results")
    args = parser.parse_args()
    prepare_cpu()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(Path(folder), args.minutes * 60, args.steps, args.results)
    grown = growth(rows)
    for name, amount in grown.items():
        verdict = "too much" if amount > ALLOWED[name] else "allowed"
        print(f"{name}: {amount:+.2f} from the second third on ({verdict}: {ALLOWED[name]})")
    return int(any(amount > ALLOWED[name] for name, amount in grown.items()))


def soak(
    folder: Path, seconds: float, steps: int, results: str | None, at_least: int = 6
) -> list[dict[str, Any]]:
    """Run cycles for so long.

    Args:
        folder: Where runs are saved.
        seconds: No cycle begins after that.
        steps: Optimizer steps of a cycle.
        results: Name of the table that gets a row a cycle; None: none does.
        at_least: Cycles, however long they take.
    """
    cycle = make_cycle(folder, steps)
    began, rows = time.perf_counter(), list[dict[str, Any]]()
    while len(rows) < at_least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        loss = cycle(len(rows))
        row: dict[str, Any] = {"cycle": len(rows), "loss": round(loss, 4), **measure()}
        rows.append({**row, "cycle_s": round(time.perf_counter() - start, 2)})
        if results:
            write_rows(results, rows[-1:])
    return rows


def make_cycle(folder: Path, steps: int) -> Callable[[int], float]:
    """One cycle, as a function of its number that returns the loss."""
    from peft import AutoPeftModelForCausalLM, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

    from remix_model import ReMixConfig, ReMixTrainer, ReMixTrainingArguments, record_routing

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, num_attention_heads=4))
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    ids = torch.randint(0, 512, (64, LENGTH))
    rows = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in ids]
    options = {"remix_credit": "causal", "remix_log_prob": "unordered", "remix_grad_selections": 1}

    def cycle(number: int) -> float:
        config = ReMixConfig(num_experts=8, top_k=2, r=4, task_type="CAUSAL_LM")
        trainer = ReMixTrainer(
            model=get_peft_model(copy.deepcopy(base), config),
            args=ReMixTrainingArguments(
                str(folder / "run"),
                remix_num_selections=4,
                **(options if number % 2 else {}),
                gradient_checkpointing=number % 3 == 0,
                max_steps=steps,
                save_steps=max(steps // 2, 1),
                save_total_limit=1,
                seed=number,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows,
            eval_dataset=rows[:16],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        with record_routing(trainer.model):
            trainer.evaluate()
        model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
        model.generate(input_ids=ids[:2, :8], max_new_tokens=16, do_sample=False)
        return float(trainer.evaluate()["eval_loss"])

    return cycle


def measure() -> dict[str, float]:
    """What this process holds, once what is only waiting to be collected is gone."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mib": round(int(fields["VmRSS"].split()[0]) / 1024, 1),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
        "objects": len(gc.get_objects()),
    }


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By how much everything grew from the second third of the rows to the last one."""
    kept = rows[len(rows) // 3 :]
    return {name: slope([row[name] for row in kept]) * (len(kept) - 1) for name in ALLOWED}


def slope(values: Sequence[float]) -> float:
    """Median of the slopes between all pairs of values (of at most 400 of them), per value."""
    step = max(len(values) // 400, 1)
    points = list(enumerate(values))[::step]
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in combinations(points, 2))


if __name__ == "__main__":
    sys.exit(main())

"""One cell of the study, in a process of its own: `remix train`, then scoring.

python -m benchmarks.study.cell SPEC FOLDER: the runner writes SPEC and reads FOLDER/row.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.data import read_items
from benchmarks.study.plan import POOL, Cell, Task, train_options
from benchmarks.study.rows import COLUMNS


def main() -> None:
    """Run the cell that a file describes, and write its row."""
    from remix_cli.allocator import keep_freed_memory

    spec, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    keep_freed_memory()
    row = run_cell(read_spec(spec), folder, Path(spec["data"]))
    temporary = folder / ".row.json"
    temporary.write_text(json.dumps(row), encoding="utf-8")
    temporary.replace(folder / "row.json")


def write_spec(cell: Cell, data: Path, path: Path) -> None:
    """Write what `main` reads."""
    path.write_text(json.dumps({"cell": asdict(cell), "data": str(data)}), encoding="utf-8")


def read_spec(spec: Mapping[str, Any]) -> Cell:
    """The cell of a specification."""
    return Cell(**{**spec["cell"], "task": Task(**spec["cell"]["task"])})


def run_cell(cell: Cell, folder: Path, data: Path) -> dict[str, Any]:
    """Train, score, and return the row.

    Args:
        cell: What to run.
        folder: Of the run; whatever lies in `folder/run` is overwritten.
        data: The task's train, dev and test files.

    Raises:
        ValueError: An option does not fit.
        OSError: A file is not there.
    """
    began = time.perf_counter()
    row = described(cell)
    try:
        metrics = train(cell, folder / "run", data) if cell.steps else {}
    except FloatingPointError as error:
        print(f"training broke down: {error}", file=sys.stderr)
        metrics, row["status"] = {}, "diverged"
    else:
        row |= scored(cell, folder / "run", data)
    row |= trained(metrics)
    series = routing_series(folder / "run")
    row["routing"] = json.dumps(series) if series else ""
    row["seconds"] = round(time.perf_counter() - began, 1)
    return {key: row[key] for key in COLUMNS if key in row}


def described(cell: Cell) -> dict[str, Any]:
    """What a row says of a cell before it runs."""
    from benchmarks.common import environment
    from remix_cli.env import versions

    found = versions()
    return {
        **{key: getattr(cell, key) for key in ("name", "digest", "part", "method", "seed")},
        **{key: getattr(cell, key) for key in ("learning_rate", "steps", "split")},
        "task": cell.task.name,
        "batch": cell.task.batch,
        "options": json.dumps(cell.options, sort_keys=True),
        "status": "finished",
        **environment(),
        **{name: found[name] for name in ("transformers", "peft")},
    }


def overrides(cell: Cell, run: Path, data: Path) -> dict[str, Any]:
    """The options of `remix train`."""
    every = max(cell.steps // cell.checkpoints, 1) if cell.checkpoints else 10**6
    return {
        "model": cell.model,
        "dataset": str(data / "train.jsonl"),
        "eval_size": 0,  # all kinds of routing are scored afterwards, in one go
        "num_samples": 0,
        "output_dir": str(run),
        "overwrite": True,
        "max_steps": cell.steps,
        "per_device_train_batch_size": cell.task.batch // cell.task.passes,
        "gradient_accumulation_steps": cell.task.passes,
        "train_sampling_strategy": "batch_rebalance" if cell.task.passes > 1 else "random",
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "logging_steps": max(cell.steps // 12, 1),
        "save_steps": every,
        "save_total_limit": max(cell.checkpoints, 1) + 1,
        **train_options(cell.options, cell.learning_rate),
    }


def train(cell: Cell, run: Path, data: Path) -> dict[str, Any]:
    """Train as `remix train` does, and return what it wrote of it.

    With `copied_steps`, so many of the steps train one LoRA, of which all experts are copies then.
    """
    from remix_cli import train

    options, copied = overrides(cell, run, data), cell.options.get("copied_steps", 0)
    if copied:
        lora = train_one_lora(cell, run.parent / "lora", data, copied)
        options |= {"from_lora": [str(lora)] * POOL["num_experts"], "seed": cell.seed + 1000}
        options["max_steps"] -= copied
    train.run(argparse.Namespace(config=None), options)
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if copied:
        first = json.loads((lora / "metrics.json").read_text(encoding="utf-8"))
        shutil.rmtree(lora)
        metrics["train_seconds"] += first["train_seconds"]
        for entry in metrics["loss_history"]:  # goes on where the LoRA's ends
            entry["step"] += copied
            entry["num_input_tokens_seen"] += tokens_seen(first)
        metrics["loss_history"] = first["loss_history"] + metrics["loss_history"]
    return metrics


def train_one_lora(cell: Cell, folder: Path, data: Path, steps: int) -> Path:
    """Train an expert alone; its folder, in which it is scaled so that k of them add up to it."""
    from remix_cli import train

    options = overrides(cell, folder, data)
    alone = {"method": "rslora", "rank": POOL["r"], "max_steps": steps}
    kept = {key: value for key, value in options.items() if key not in cell.options}
    train.run(argparse.Namespace(config=None), {**kept, **alone})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["lora_alpha"] /= POOL["top_k"]
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def trained(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of the training."""
    if not metrics:
        return {}
    entries = metrics["loss_history"]
    last = [entry["loss"] for entry in entries[-3:]]
    keys = ("tokens_per_s", "peak_rss_mib", "activated_parameters", "trainable_parameters")
    return {
        **{key: metrics[key] for key in keys if key in metrics},
        "train_seconds": metrics["train_seconds"],
        "tokens": tokens_seen(metrics),
        "train_loss": f"{statistics.mean(last):.4f}",
        "train_losses": json.dumps([[e["step"], round(e["loss"], 4)] for e in entries]),
    }


def routing_series(run: Path) -> list[dict[str, Any]]:
    """How the tokens of the last steps were routed, at each log of the training.

    Returns:
        By log: step; ess, policy_ess, share_ess: means over layers and tokens; ess_min: the least
        of any token in the last layer; weights: how many were in each of 20 bins of [0, 1]. Empty
        without routers.
    """
    from remix_model.routing_log import ROUTING_FILE, read_lines

    series = []
    for line in read_lines(run / ROUTING_FILE) if (run / ROUTING_FILE).exists() else ():
        if "weight_histogram" in line:
            means = {key: statistics.mean(line[key]) for key in ("ess", "policy_ess", "share_ess")}
            point = {"step": line["step"], **{key: round(v, 4) for key, v in means.items()}}
            series.append(
                {**point, "ess_min": line["ess_min"][-1], "weights": line["weight_histogram"]}
            )
    return series


def tokens_seen(metrics: Mapping[str, Any]) -> int:
    """Tokens of all examples that a run was given, without padding."""
    return max(int(entry.get("num_input_tokens_seen", 0)) for entry in metrics["loss_history"])


def scored(cell: Cell, run: Path, data: Path) -> dict[str, Any]:
    """What a row says of the trained model, or of the base model."""
    from benchmarks.study import scoring
    from remix_cli.prepare import quiet_libraries

    quiet_libraries()
    items = read_items(data / f"{cell.split}.jsonl")[: cell.task.scored]
    model, tokenizer = load(cell, run)
    batches = _batches(model, tokenizer, data / f"{cell.split}.jsonl", cell.task, cell.task.scored)
    row: dict[str, Any] = scoring.routing_figures(model, batches)
    if cell.split != "test":
        row["loss"] = scoring.held_out_loss(model, batches)
    else:
        row |= scoring.all_losses(model, batches)
        asked = items[: cell.task.answers]
        task = cell.task
        found = scoring.accuracy(model, tokenizer, asked, task.eval_batch, task.longest)
        counts = [sum(item.group == group for item in asked) for group in found]
        total = sum(a * n for a, n in zip(found.values(), counts, strict=True))
        row["answered"], row["accuracy"] = len(asked), f"{total / len(asked):.4f}"
        row["accuracies"] = json.dumps({name: round(a, 4) for name, a in found.items()})
    if cell.checkpoints:
        row["history"] = json.dumps(history(cell, run, data))
    return {key: f"{v:.5f}" if isinstance(v, float) else v for key, v in row.items()}


def history(cell: Cell, run: Path, data: Path) -> list[dict[str, float]]:
    """Losses and weights of every checkpoint, on every other held-out example."""
    from benchmarks.study import scoring

    found = []
    folders = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*")}
    for step in sorted(folders):
        model, tokenizer = load(cell, folders[step])
        path = data / f"{cell.split}.jsonl"
        batches = _batches(model, tokenizer, path, cell.task, cell.task.scored)[::2]
        figures = scoring.routing_figures(model, batches)
        row = {"step": step, **scoring.all_losses(model, batches), **figures}
        found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return found


def load(cell: Cell, folder: Path) -> tuple[Any, Any]:
    """The model to score, and its tokenizer: an adapter's, or without training the base model's."""
    from remix_cli.config import RunConfig
    from remix_cli.prepare import adapter_config, load_adapter, load_base
    from remix_model.models import load_tokenizer

    if not cell.steps:
        return load_base(RunConfig(model=cell.model)), load_tokenizer(cell.model)
    return load_adapter(folder, adapter_config(folder, {}))


def _batches(model: Any, tokenizer: Any, path: Path, task: Task, most: int) -> list[Any]:
    from benchmarks.study.scoring import batches_of
    from remix_model.data import load_examples
    from remix_model.tokens import DataCollator, tokenize

    rows = tokenize(load_examples(path, limit=most), tokenizer)
    collator = DataCollator.for_tokenizer(tokenizer)
    return batches_of(rows, collator, task.eval_batch, model.device)


if __name__ == "__main__":
    main()

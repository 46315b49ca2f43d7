"""`remix eval`: an adapter's loss under top-k routing beside its base model's, or lm-eval tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from remix_cli.config import RunConfig
from remix_cli.display import console, print_losses, print_table
from remix_cli.prepare import (
    adapter_config,
    adapter_folder,
    encode,
    load_adapter,
    quiet_libraries,
    read_data,
)
from remix_cli.run_folder import write_json
from remix_model import token_losses
from remix_model.models import load_config, load_tokenizer
from remix_model.tasks import evaluate_tasks, find_tasks
from remix_model.tokens import DataCollator


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix eval --help`."""
    quiet_libraries()
    folder = adapter_folder(args.adapter)
    config = adapter_config(folder, overrides)
    if args.json is not None:
        target = Path(args.json).expanduser()
        if not target.parent.is_dir():
            raise ValueError(f"there is no folder for --json {args.json}: create it first")
        if target.is_dir():
            raise ValueError(f"--json {args.json} is a folder: give a file in it")
    for name in ("num_fewshot", "task_limit", "include_path"):
        if not args.tasks and getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} belongs to --tasks: name the tasks")
    if args.tasks:
        results = _evaluate_tasks(args, folder, config)
    else:
        results = _evaluate_loss(folder, config, overrides)
    if args.json is not None:
        write_json(results, Path(args.json).expanduser())
        console.print(f"results are in {args.json}")


def held_out_rows(config: RunConfig, overrides: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Read and tokenise the held-out data; of a data set that a flag gives, all of it.

    Raises:
        ValueError: There is none.
    """
    if "dataset" in overrides and "eval_dataset" not in overrides:
        config.eval_dataset = None  # the one it was trained with
    whole = "dataset" in overrides and "eval_size" not in overrides
    if whole:
        config.eval_size = 0.0
    examples, held_out = read_data(config)
    if whole and config.eval_dataset is None:
        held_out = examples[: config.eval_limit]
    if not held_out:
        raise ValueError("there is no held-out data: give --eval-dataset or --eval-size")
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    return encode(held_out, config, tokenizer, model_config)


def _evaluate_loss(folder: Path, config: RunConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Compare the losses on the held-out data."""
    rows = held_out_rows(config, overrides)
    model, tokenizer = load_adapter(folder, config)
    collator = DataCollator.for_tokenizer(tokenizer)
    with model.disable_adapter():
        base, tokens = mean_loss(model, rows, collator, config, "base model")
    adapted, _ = mean_loss(model, rows, collator, config, "adapter")
    title = f"Loss on {len(rows)} examples, {tokens} tokens"
    print_losses(title, [("base model", base), ("adapter", adapted)])
    return {
        "adapter": str(folder),
        "model": config.model,
        "dataset": config.eval_dataset or config.dataset,
        "examples": len(rows),
        "tokens": tokens,
        "loss_base": base,
        "loss_adapter": adapted,
    }


def mean_loss(
    model: Any,
    rows: list[dict[str, list[int]]],
    collator: DataCollator,
    config: RunConfig,
    description: str,
) -> tuple[float, int]:
    """Return (mean loss over all labelled tokens, their number), under top-k routing."""
    total, tokens = 0.0, 0
    size = config.per_device_eval_batch_size
    # Batches of similar length waste little on padding; the mean does not depend on the order.
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    starts = range(0, len(ordered), size)
    quiet = not console.is_terminal
    for start in track(starts, description, console=console, transient=True, disable=quiet):
        batch = collator(ordered[start : start + size])
        with torch.no_grad():
            losses, mask = token_losses(model, {k: v.to(model.device) for k, v in batch.items()})
        total += float(losses.double().sum())
        tokens += int(mask.sum())
    return total / tokens, tokens


def _evaluate_tasks(args: argparse.Namespace, folder: Path, config: RunConfig) -> dict[str, Any]:
    """Run lm-eval's tasks with the base model and with the adapter."""
    tasks = [name for word in args.tasks for name in word.split(",") if name]
    manager = find_tasks(tasks, args.include_path)
    model, tokenizer = load_adapter(folder, config)

    def evaluate() -> dict[str, Any]:
        return evaluate_tasks(
            model,
            tokenizer,
            tasks,
            num_fewshot=args.num_fewshot,
            limit=args.task_limit,
            batch_size=config.per_device_eval_batch_size,
            task_manager=manager,
        )

    with model.disable_adapter():
        base = evaluate()
    results = {"base_model": base, "adapter": evaluate()}
    table = Table()
    for heading in ("task", "metric", "base model", "adapter"):
        table.add_column(heading)
    for task, metrics in results["adapter"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{base[task][metric]:.4g}", f"{value:.4g}")
    print_table(f"lm-eval: {', '.join(tasks)}", table)
    return {"adapter_folder": str(folder), "model": config.model, **results}

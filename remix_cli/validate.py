"""`remix validate`: what `remix train` would do with a configuration, without doing it.

With `--adapter` a saved adapter is checked in its place (check_adapter.py).

Changes nothing, but for one thing: the embedded model is converted on its first use.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from remix_cli.check_adapter import check_adapter
from remix_cli.display import console, print_facts
from remix_cli.memory import ONE_PASS, at_once, estimate_memory
from remix_cli.options import RunConfig
from remix_cli.prepare import Plan, prepare, quiet_libraries, skeleton
from remix_cli.run_folder import resolve_config
from remix_model.baselines import activated_parameters
from remix_model.site import RoutedModule

_NOT_ESTIMATED = ("dora", "xlora")  # whole weights are made anew; every token takes two passes


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix validate --help`."""
    quiet_libraries()
    if args.adapter is not None:
        check_adapter(args.adapter, overrides)
        return
    config = resolve_config(args.config, overrides)
    plan = prepare(config)
    train_args, model_config, rows = plan.arguments, plan.model_config, plan.train_rows
    facts = _data_facts(rows, plan.held_out_rows, plan.num_examples)
    print_facts(f"Data: {config.dataset}", facts)

    device = str(train_args.device)
    dtype: torch.dtype = torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    elif device != "cpu":
        dtype = getattr(torch, str(model_config.dtype).removeprefix("torch."), dtype)
    model = skeleton(config, model_config, plan.adapter, dtype)
    steps = train_args.max_steps
    if steps <= 0:
        accumulated = config.per_device_train_batch_size * config.gradient_accumulation_steps
        steps = math.ceil(math.ceil(len(rows) / accumulated) * config.num_train_epochs)
    linears = adapted_linears(model)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
    parameters = list(model.parameters())
    print_facts(
        f"Model: {config.model}",
        [
            ("adapted linears", f"{len(linears)} ({', '.join(kinds) or 'none'})"),
            ("total parameters", sum(p.numel() for p in parameters)),
            ("trainable parameters", sum(p.numel() for p in parameters if p.requires_grad)),
            ("activated parameters", activated_parameters(model)),
            ("optimizer steps", steps),
            ("device", device),
        ],
    )

    activation_bytes = 2 if config.bf16 or dtype.itemsize == 2 else 4
    _print_memory(config, plan, model, len(linears), activation_bytes, on_cpu=device == "cpu")
    console.print("the configuration is valid; nothing was changed")


def adapted_linears(model: Any) -> list[str]:
    """Return the names of the modules that carry adapters; none under a learned prompt."""
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, RoutedModule | BaseTunerLayer)
    ]


def _print_memory(
    config: RunConfig, plan: Plan, model: Any, linears: int, activation_bytes: int, *, on_cpu: bool
) -> None:
    """Print the memory that a step is estimated to take, or that it is not."""
    if config.method in _NOT_ESTIMATED:
        console.print(f"memory is not estimated for method={config.method}")
        return
    selections, width = _selections(config, plan)
    virtual = getattr(plan.adapter, "num_virtual_tokens", 0)
    rows = plan.train_rows
    estimate = estimate_memory(
        model,
        **selections,
        batch_size=config.per_device_train_batch_size,
        tokens=max(len(row["input_ids"]) for row in rows) + virtual,
        labelled_tokens=max(sum(label != -100 for label in row["labels"]) for row in rows),
        experts_width=linears * width,
        gradient_checkpointing=config.gradient_checkpointing,
        activation_bytes=activation_bytes,
        on_cpu=on_cpu,
        quantised_bits=_quantised_bits(config, plan),
    )
    parts = {**asdict(estimate), "total": estimate.total}
    title = "Estimated memory of a step (MiB)"
    if config.is_routed:
        arguments: Any = plan.arguments
        count = selections["selections_at_once"]
        title = (
            f"Estimated memory of a step with M = {arguments.remix_num_selections}, {count} at "
            "once (MiB)"
        )
    print_facts(title, [(part, round(size / 2**20)) for part, size in parts.items()])


def _quantised_bits(config: RunConfig, plan: Plan) -> int:
    """4 or 8 where bitsandbytes quantises the base, or has done so before it was saved; else 0."""
    saved = getattr(plan.model_config, "quantization_config", None) or {}
    if config.load_in_4bit or saved.get("load_in_4bit"):
        return 4
    return 8 if config.load_in_8bit or saved.get("load_in_8bit") else 0


def _selections(config: RunConfig, plan: Plan) -> tuple[dict[str, Any], int]:
    """What of a step's passes is in memory together, and the elements a row of one linear adds."""
    if not config.is_routed:
        return {**ONE_PASS, "router_blocks": 0}, getattr(plan.adapter, "r", 0)
    train_args: Any = plan.arguments
    options = train_args.sampling_options()
    adapter: Any = plan.adapter
    plan_of_step = options.plan(
        detached=adapter.router_detach_input,
        checkpointed=config.gradient_checkpointing,
        ranks=config.selection_parallel,
    )
    together = {**at_once(plan_of_step), "router_blocks": options.credit_blocks}
    return together, config.num_experts * (config.r + 2)


def _data_facts(
    rows: list[dict[str, list[int]]], held_out: list[dict[str, list[int]]], examples: int
) -> list[tuple[str, Any]]:
    lengths = sorted(len(row["input_ids"]) for row in rows)
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    return [
        ("examples to train on", len(rows)),
        ("dropped as too long", examples - len(rows)),
        ("examples held out", len(held_out)),
        ("tokens", sum(lengths)),
        ("tokens with a loss", labelled),
        ("tokens per example", f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"),
    ]

"""The trainer's arguments of a run, from its options."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from remix_cli.options import RunConfig
from remix_model.models import resolve_device
from remix_model.routers import make_router

if TYPE_CHECKING:
    from remix_model import ReMixTrainingArguments


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Return the trainer's arguments, which check their own values."""
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(
            f"max_steps={config.max_steps}: give at least 1, or -1 to train num_train_epochs"
        )
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} would train nothing")
    passes = config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    if config.train_sampling_strategy == "batch_rebalance" and passes == 1:
        raise ValueError(
            f"train_sampling_strategy='batch_rebalance' shares a step's examples among its passes, "
            f"and there is one: give gradient_accumulation_steps=2 or more and a smaller "
            f"per_device_train_batch_size than {config.per_device_train_batch_size}"
        )
    if config.warmup_ratio >= 1:
        raise ValueError(f"warmup_ratio must be a share below 1, got {config.warmup_ratio}")
    if not config.is_routed:
        return TrainingArguments(**_common_arguments(config))
    return _routed_arguments(config)


def _common_arguments(config: RunConfig) -> dict[str, Any]:
    """What every method's training has, as transformers names it."""
    on_cpu = resolve_device(config.device).type == "cpu"
    same = (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "train_sampling_strategy",
        "bf16",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "seed",
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in same}
    values.update(
        output_dir=str(Path(config.output_dir).expanduser()),
        warmup_steps=config.warmup_ratio,  # transformers reads a number below 1 as a share
        eval_strategy="no" if config.eval_steps is None else "steps",
        include_num_input_tokens_seen="non_padding",
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    if config.gradient_checkpointing:
        known = {item.name for item in fields(TrainingArguments)}
        new_name = "activation_checkpointing"
        values[new_name if new_name in known else "gradient_checkpointing"] = True
    return values


def _routed_arguments(config: RunConfig) -> ReMixTrainingArguments:
    """What training a mixture has beside."""
    from remix_model import ReMixTrainingArguments

    router = make_router(config.router_type, config.num_experts, config.top_k, config.router_kwargs)
    drawn_for = not (router.learned or router.random)  # a policy that is trained
    if drawn_for and config.num_selections < 2:
        raise ValueError(
            f"num_selections={config.num_selections}: training the routers compares at least 2 "
            f"sampled selections of each example"
        )
    kept = config.grad_selections or config.num_selections
    if drawn_for and not router.linear and kept < config.num_selections:
        raise ValueError(
            f"grad_selections={kept}: the gradient of routers of type {router.name!r} needs a "
            "graph of every selection; leave it out"
        )
    if router.learned and (config.temperature != 1.0 or config.temperature_end not in (None, 1.0)):
        raise ValueError(
            f"temperature={config.temperature}, temperature_end={config.temperature_end}: routers "
            f"of type {router.name!r} weigh their experts and nothing is drawn; leave them out "
            "(router_temperature is the weights')"
        )
    if router.learned and config.dense_start:
        raise ValueError(
            f"dense_start={config.dense_start}: routers of type {router.name!r} weigh their "
            "experts and nothing is drawn; leave it out"
        )
    ours = (
        "num_selections",
        "grad_selections",
        "selection_chunk_size",
        "selection_parallel",
        "credit",
        "log_prob",
        "logprob_tokens",
        "advantage_norm",
        "router_entropy_coef",
        "load_balancing_coef",
        "temperature",
        "temperature_end",
        "router_learning_rate",
        "dense_start",
        "router_wait",
        "expert_rate_scale",
        "router_max_grad_norm",
    )
    values = {f"remix_{name}": getattr(config, name) for name in ours}
    if router.learned:  # nothing is drawn
        values["remix_num_selections"] = 1
        values["remix_grad_selections"] = values["remix_selection_chunk_size"] = None
    try:
        return ReMixTrainingArguments(**_common_arguments(config), **values)
    except ValueError as error:
        raise ValueError(str(error).replace("remix_", "")) from None  # as our options are named

"""`remix train`: finetune a model, compare it with its start, and keep the adapter."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from remix_cli.allocator import keep_freed_memory
from remix_cli.answers import answer, max_answer_end
from remix_cli.config import RunConfig, has_option, write_yaml
from remix_cli.display import console, print_facts, print_losses, print_routing, print_sample
from remix_cli.env import peak_memory_mib, versions
from remix_cli.prepare import Plan, adapt, load_base, prepare, quiet_libraries
from remix_cli.progress import ProgressCallback
from remix_cli.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    RunStart,
    last_checkpoint,
    remove_leftovers,
    resolve_config,
    write_json,
)
from remix_model import ReMixTrainer, record_routing
from remix_model.adapter_trainer import AdapterTrainer
from remix_model.baselines import activated_parameters
from remix_model.card import write_model_card
from remix_model.data import Example
from remix_model.errors import SavingError
from remix_model.peft_files import without_adapter
from remix_model.stats import RoutingRecorder
from remix_model.tokens import DataCollator, prompt_ids


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix train --help`."""
    quiet_libraries()
    config = resolve_config(args.config, overrides)
    folder = Path(config.output_dir).expanduser()
    is_main = int(os.environ.get("RANK", "0")) == 0
    console.quiet = not is_main

    # Everything that can be wrong, before the weights are read or a file is written.
    plan = prepare(config, check_folder=is_main)
    if plan.arguments.device.type == "cpu":
        keep_freed_memory()
    with console.status(f"loading {config.model}"):
        set_seed(config.seed)
        model = adapt(load_base(config), config, plan.adapter)
    progress, start = ProgressCallback(), RunStart(folder)
    callbacks: list[TrainerCallback] = [_StopIfFinished(), progress]
    if is_main:
        continued = partial(write_yaml, config, folder / CONFIG_FILE)
        callbacks.append(_FirstStep(continued if config.resume else start.commit))
    try:
        if is_main and config.resume:
            remove_leftovers(folder)
        elif is_main:
            start.begin(config)
        trainer_class: Any = ReMixTrainer if config.is_routed else AdapterTrainer
        trainer = trainer_class(
            model=model,
            args=plan.arguments,
            train_dataset=plan.train_rows,
            eval_dataset=plan.held_out_rows or None,
            data_collator=DataCollator.for_tokenizer(plan.tokenizer),
            processing_class=plan.tokenizer,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        _run(config, plan, trainer, progress, folder, is_main)
    except BaseException:
        if is_main and not config.resume:
            start.undo()
        raise


class _Finished(Exception):
    """The checkpoint to resume from is the run's last: there is no step left."""


class _StopIfFinished(TrainerCallback):
    """The Trainer's own loop would do one step more."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _Finished


class _FirstStep(TrainerCallback):
    """Does something after this process's first step: now the run is under way."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._action is not None:
            self._action()
            self._action = None


def _run(
    config: RunConfig,
    plan: Plan,
    trainer: Trainer,
    progress: ProgressCallback,
    folder: Path,
    is_main: bool,
) -> None:
    """Evaluate, train, evaluate again, and write what came out."""
    model: Any = trainer.model
    train_rows, held_out_rows = plan.train_rows, plan.held_out_rows
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": trainable,
        "activated_parameters": activated_parameters(model),
        "train_examples": len(train_rows),
        "eval_examples": len(held_out_rows),
    }
    title = "ReMix" if config.method == "remix" else config.method
    print_facts(f"{title} on {config.model}, {config.dataset}", _labels(facts))

    with without_adapter(model):
        loss_before = _held_out_loss(trainer, "before training")
    _train(trainer, progress, folder, plan.checkpoint)
    if progress.steps == 0 and _reported_steps(folder) == trainer.state.global_step:
        console.print(f"the run in {folder} was finished already: raise max_steps to go on")
        return
    with record_routing(model) if config.is_routed else nullcontext() as recorder:
        loss_after = _held_out_loss(trainer, "after training", recorder)
    routing = recorder.stats() if recorder and held_out_rows else None

    state = trainer.state
    history = [_numbers(entry) for entry in state.log_history]
    metrics: dict[str, Any] = {
        "method": config.method,
        "eval_loss_before": loss_before,
        "eval_loss_after": loss_after,
        "train_steps": state.global_step,
        "train_epochs": state.epoch,
        "train_seconds": progress.step_seconds,
        "tokens_per_s": progress.tokens_per_s,
        **peak_memory_mib(),
        **facts,
        "loss_history": [entry for entry in history if "loss" in entry],
        "eval_history": [entry for entry in history if "eval_loss" in entry],
        "routing": routing.to_dict(matrices=False) if routing else None,
        "config": config.values(),
        "versions": versions(),
        "device": str(plan.arguments.device),
    }
    if not is_main:
        return
    if routing is not None and isinstance(trainer, ReMixTrainer):
        trainer.routing_log.add_held_out(state.global_step, routing)
    write_json(metrics, folder / METRICS_FILE)
    facts_of_run = _card_facts(metrics, config)
    write_model_card(
        model,
        folder,
        evaluation=facts_of_run.get("evaluation"),
        training=facts_of_run.get("training"),
        fresh=not config.is_routed,  # PEFT has written a form to be filled in
    )

    if routing is not None:
        print_routing("Routing on the held-out data", routing, config.top_k)
    if loss_before is not None and loss_after is not None:
        if not trainer.accelerator.is_fsdp2:  # where all ranks would have to take part
            _print_samples(model, plan.tokenizer, plan.held_out, config)
        losses = [("before (base model)", loss_before), ("after", loss_after)]
        print_losses(f"Held-out loss ({len(held_out_rows)} examples)", losses)
    keys = ("train_steps", "train_seconds", "tokens_per_s", "peak_rss_mib", "peak_cuda_mib")
    print_facts("Run", _labels({k: metrics[k] for k in keys if k in metrics}))
    console.print(f"adapter, tokenizer, {CONFIG_FILE} and {METRICS_FILE} are in {folder}")
    console.print(f"try it: remix generate --adapter {folder} --compare --prompt '...'")


def _train(
    trainer: Trainer, progress: ProgressCallback, folder: Path, checkpoint: Path | None
) -> None:
    """Train, and on a failure say what is left to continue from."""
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    try:
        with suppress(_Finished):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if progress.steps > 0 or _reported_steps(folder) != trainer.state.global_step:
            trainer.save_model(str(folder))  # which looks whether the weights are numbers
    except (FloatingPointError, KeyboardInterrupt, SavingError) as error:
        left = last_checkpoint(folder)
        kept = f"the last good checkpoint is {left}" if left else "no checkpoint was saved yet"
        go_on = "; --resume continues from it" if left else ""
        if isinstance(error, KeyboardInterrupt):
            console.print(f"stopped at step {trainer.state.global_step}; {kept}{go_on}")
            raise
        if isinstance(error, SavingError):
            raise SavingError(f"training stopped: {error}; {kept}{go_on}") from error
        raise FloatingPointError(f"training stopped: {error}; {kept}") from error
    finally:
        progress.close()


def _reported_steps(folder: Path) -> int | None:
    """Return the steps of the run whose metrics are in the folder: they are written last."""
    try:
        return int(json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["train_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _held_out_loss(
    trainer: Trainer, when: str, recorder: RoutingRecorder | None = None
) -> float | None:
    """Return the held-out loss under top-k routing, None without held-out data.

    A recorder is told which task is evaluated.
    """
    rows: Any = trainer.eval_dataset
    if rows is None:
        return None
    if not console.is_terminal:
        console.print(f"evaluating {len(rows)} held-out examples {when}")
    by_task: dict[str, list[Any]] = {}
    for row in rows if recorder is not None else []:
        by_task.setdefault(row.get("task", ""), []).append(row)
    if recorder is None or set(by_task) <= {""}:
        loss = float(trainer.evaluate()["eval_loss"])
    else:
        loss = _loss_by_task(trainer, by_task, recorder)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the held-out loss {when} is {loss}: look at the data")
    return loss


def _loss_by_task(
    trainer: ReMixTrainer, by_task: dict[str, list[Any]], recorder: RoutingRecorder
) -> float:
    """Return the mean over all labelled tokens, while each task is evaluated by itself."""
    total, count = 0.0, 0
    for task, rows in by_task.items():
        recorder.tasks(task or "(none)")
        labelled = sum(label != -100 for row in rows for label in row["labels"][1:])
        found = trainer.evaluate(rows, metric_key_prefix="task")
        total, count = total + found["task_loss"] * labelled, count + labelled
    return total / count


def _print_samples(model: Any, tokenizer: Any, examples: list[Example], config: RunConfig) -> None:
    """Answer the first held-out prompts with the base model and with the adapter."""
    limit = max_answer_end(model)
    shown, fitting = 0, 0
    for example in examples:
        ids = prompt_ids(example, tokenizer)
        if not ids or (limit is not None and len(ids) + config.max_new_tokens > limit):
            continue
        fitting += 1
        if shown == config.num_samples:
            break
        shown += 1
        with console.status("generating"):
            tuned = answer(model, tokenizer, ids, max_new_tokens=config.max_new_tokens)
            with model.disable_adapter():
                base = answer(model, tokenizer, ids, max_new_tokens=config.max_new_tokens)
        print_sample(tokenizer.decode(ids), [("base model", base), ("with the adapter", tuned)])
    if examples and config.num_samples and not fitting:
        console.print(
            f"no sample: no held-out prompt leaves room for max_new_tokens={config.max_new_tokens} "
            f"in the model's {limit} positions"
        )


def _card_facts(metrics: dict[str, Any], config: RunConfig) -> dict[str, dict[str, Any]]:
    """What the model card says of the run, beside its routing."""
    names = (
        "num_selections",
        "credit",
        "log_prob",
        "learning_rate",
        "router_learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "seed",
    )
    data = config.dataset if config.eval_dataset is None else config.eval_dataset
    training = {
        "method": config.method,
        "data": config.dataset,
        **{name: metrics[name] for name in ("train_examples", "train_steps", "train_epochs")},
        **{name: getattr(config, name) for name in names if has_option(config.method, name)},
        **{name: metrics[name] for name in ("trainable_parameters", "activated_parameters")},
        **metrics["versions"],
    }
    if metrics["eval_loss_after"] is None:
        return {"training": training}
    evaluation = {
        "data": f"{metrics['eval_examples']} held-out examples of {data}",
        "loss of the base model": metrics["eval_loss_before"],
        "loss with the adapter": metrics["eval_loss_after"],
    }
    return {"evaluation": evaluation, "training": training}


def _labels(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key.replace("_", " "), value) for key, value in values.items()]


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if isinstance(value, int | float)}

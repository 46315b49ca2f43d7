"""From a configuration to the objects of a run. What is cheap to check comes before any weights."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model

from remix_cli.config import RunConfig, build_config, option_fields, read_yaml
from remix_cli.display import console
from remix_cli.run_folder import CONFIG_FILE, check_output_dir, checkpoint_to_resume, is_run
from remix_kernels._dispatch import resolve_backend
from remix_model.data import Example, load_examples, split_examples
from remix_model.from_lora import from_lora_adapters, pool_config, read_lora
from remix_model.models import (
    check_quantisation,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from remix_model.tokens import tokenize
from remix_model.tuner.adapter_files import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from remix_model import ReMixConfig, ReMixTrainingArguments


@dataclass
class Plan:
    """A run that was checked as far as it can be without its weights."""

    adapter: ReMixConfig
    arguments: ReMixTrainingArguments
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[dict[str, list[int]]]
    held_out: list[Example]
    held_out_rows: list[dict[str, list[int]]]  # shortest first: less padding, the same mean
    num_examples: int  # before any were dropped as too long
    checkpoint: Path | None  # to resume from


def prepare(config: RunConfig, *, check_folder: bool = True) -> Plan:
    """Check all that can be wrong with a run before its weights are read or a file is written.

    Args:
        config: The run's.
        check_folder: Also look whether output_dir may be written; once is enough for all ranks.

    Raises:
        ValueError: Something does not fit: with the option or the line of the data.
        OSError: A file cannot be read.
    """
    folder, checkpoint = Path(config.output_dir).expanduser(), None
    if check_folder:
        check_output_dir(folder, overwrite=config.overwrite, resume=config.resume)
    if config.resume:
        checkpoint, damages = checkpoint_to_resume(folder)
        for damage in damages:
            console.print(f"{damage}: continuing from an older checkpoint")
    check_backend(config)
    check_quantisation(config.load_in_4bit, config.load_in_8bit)
    adapter, arguments = method_config(config), training_arguments(config)
    examples, held_out = read_data(config)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    train_rows = encode(examples, config, tokenizer, model_config)
    held_out_rows = encode(held_out, config, tokenizer, model_config)
    if config.eval_steps is not None and not held_out_rows:
        raise ValueError("eval_steps needs held-out data: give eval_dataset or eval_size")
    skeleton(config, model_config, adapter, torch.float32)
    held_out_rows.sort(key=lambda row: len(row["input_ids"]))
    return Plan(
        adapter,
        arguments,
        model_config,
        tokenizer,
        train_rows,
        held_out,
        held_out_rows,
        len(examples),
        checkpoint,
    )


def check_backend(config: RunConfig) -> None:
    """Raise ValueError unless the backend, which REMIX_BACKEND may name, is there."""
    resolve_backend(config.backend, torch.empty(0, device=resolve_device(config.device)))


def read_data(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Read the data set and hold part of it out.

    Returns:
        (to train on, held out). The second may be empty, with eval_size 0.
    """

    def read(source: str, split: str, limit: int | None) -> list[Example]:
        return load_examples(
            source,
            split=split,
            name=config.dataset_name,
            prompt_template=config.prompt_template,
            response_field=config.response_field,
            messages_field=config.messages_field,
            limit=limit,
        )

    train = read(config.dataset, config.dataset_split, config.limit)
    if config.eval_dataset is not None:
        held_out = read(config.eval_dataset, config.eval_split, config.eval_limit)
    else:
        train, held_out = split_examples(train, config.eval_size, seed=config.split_seed)
    return train, held_out[: config.eval_limit]


def encode(
    examples: list[Example],
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
) -> list[dict[str, list[int]]]:
    """Tokenise examples, as the configuration says, for a model; none at all is fine."""
    if not examples:
        return []
    rows = tokenize(
        examples,
        tokenizer,
        max_length=config.max_length,
        model_max_length=getattr(model_config, "max_position_embeddings", None),
        long_examples=config.long_examples,
        train_on=config.train_on,
    )
    check_vocabulary(max(max(row["input_ids"]) for row in rows), config, model_config)
    return rows


def check_vocabulary(largest: int, config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise ValueError for a token that the model does not know."""
    vocabulary = getattr(model_config, "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"the tokenizer makes token {largest} and the model {config.model!r} knows "
            f"{vocabulary} tokens: they do not belong together"
        )


def method_config(config: RunConfig) -> ReMixConfig:
    """Return the adapter's configuration, which checks its own values."""
    from remix_model import ReMixConfig

    if config.routing_granularity == "sequence" and config.train_on == "all":
        raise ValueError(
            "routing_granularity=sequence chooses experts from the tokens before the first label, "
            "and train_on=all labels them all: set train_on=response, or routing_granularity=token"
        )
    ours = ("backend", "from_lora")
    names = [item.name for item in option_fields("method") if item.name not in ours]
    values = {name: getattr(config, name) for name in names}
    for name in ("target_modules", "exclude_modules"):
        # A bare name is one module; PEFT would read it as a regular expression for the whole path.
        if isinstance(values[name], str) and re.fullmatch(r"\w+", values[name]):
            values[name] = [values[name]]
    runtime = {"backend": config.backend}
    adapter = ReMixConfig(task_type="CAUSAL_LM", runtime_config=runtime, **values)
    if config.from_lora is None:
        return adapter
    return pool_config([read_lora(folder) for folder in config.from_lora], adapter)


def adapt(base: Any, config: RunConfig, adapter: ReMixConfig) -> PeftModel:
    """Put a new adapter on the base model; its experts may start as trained LoRAs."""
    if config.from_lora is None:
        return get_peft_model(base, adapter)
    return from_lora_adapters(base, config.from_lora, adapter)


def training_arguments(config: RunConfig) -> ReMixTrainingArguments:
    """Return the trainer's arguments, which check their own values."""
    from remix_model import ReMixTrainingArguments

    if config.num_selections < 2:
        raise ValueError(
            f"num_selections={config.num_selections}: training the routers compares at least 2 "
            f"sampled selections of each example"
        )
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(
            f"max_steps={config.max_steps}: give at least 1, or -1 to train num_train_epochs"
        )
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} would train nothing")
    if config.warmup_ratio >= 1:
        raise ValueError(f"warmup_ratio must be a share below 1, got {config.warmup_ratio}")
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
        "bf16",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "seed",
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
        "router_max_grad_norm",
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in same}
    values.update({f"remix_{name}": getattr(config, name) for name in ours})
    values.update(
        output_dir=str(Path(config.output_dir).expanduser()),
        warmup_steps=config.warmup_ratio,  # transformers reads a number below 1 as a share
        eval_strategy="no" if config.eval_steps is None else "steps",
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        include_num_input_tokens_seen="non_padding",
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    if config.gradient_checkpointing:
        known = {item.name for item in fields(ReMixTrainingArguments)}
        new_name = "activation_checkpointing"
        values[new_name if new_name in known else "gradient_checkpointing"] = True
    try:
        return ReMixTrainingArguments(**values)
    except ValueError as error:
        raise ValueError(str(error).replace("remix_", "")) from None  # as our options are named


def skeleton(
    config: RunConfig, model_config: PretrainedConfig, adapter: ReMixConfig, dtype: torch.dtype
) -> Any:
    """Return the adapted model on the meta device: all shapes and names, no weights.

    Raises:
        ValueError: The adapter does not fit the model: nothing to adapt, or not a linear layer.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        return get_peft_model(base, copy.deepcopy(adapter))


def adapter_folder(path: str) -> Path:
    """Check that a folder holds an adapter in safetensors, and return it.

    Raises:
        ValueError: It does not.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no adapter folder {folder}: check --adapter")
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no adapter_config.json: give the output_dir of a finished run, one of "
            f"its checkpoint-N folders, or a folder written by save_pretrained"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds no adapter_model.safetensors: adapter weights are read from "
            f"safetensors only"
        )
    saved = read_config(folder / CONFIG_NAME)
    if saved.get("peft_type") != "REMIX":
        raise ValueError(
            f"{folder / 'adapter_config.json'} describes an adapter of type "
            f"{saved.get('peft_type')!r}: this command needs a ReMix adapter"
        )
    return folder


def adapter_config(folder: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that an adapter was trained with, and flags over it.

    An adapter that no run wrote has only its base model's name.
    """
    base: dict[str, Any] = {}
    for place in (folder, folder.parent):  # a run's folder, or a checkpoint in it
        if is_run(place):
            base = read_yaml(place / CONFIG_FILE)
            base.pop("trust_remote_code", None)  # a folder must not decide that code is run
            break
    if not base and "model" not in overrides:
        name = read_config(folder / CONFIG_NAME).get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{folder} does not say what its base model is: give --model")
        base = {"model": name}
    return build_config(overrides, base=base)


def load_adapter(folder: Path, config: RunConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model, the adapter on it, and the tokenizer."""
    check_backend(config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    adapted = PeftModel.from_pretrained(
        load_base(config), folder, runtime_config={"backend": config.backend}
    )
    return adapted.eval(), tokenizer


def quiet_libraries() -> None:
    """Silence the libraries' own bars and notices; ours show what takes long and what is wrong."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("remix_model").setLevel(logging.INFO)


def load_base(config: RunConfig) -> Any:
    """Load the base model that a configuration names."""
    return load_model(
        config.model,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        device=config.device,
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
    )

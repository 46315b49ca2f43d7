"""From a configuration to the objects of a run. What is cheap to check comes before any weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel

from remix_cli.arguments import training_arguments
from remix_cli.config import RunConfig, build_config, has_option, option_fields, read_yaml
from remix_cli.display import console
from remix_cli.options import PEFT_METHODS, ROUTED_METHODS, is_registered
from remix_cli.run_folder import CONFIG_FILE, check_output_dir, checkpoint_to_resume, is_run
from remix_kernels._dispatch import resolve_backend
from remix_model.baselines import baseline_config, check_targets
from remix_model.data import Example, load_examples, split_examples
from remix_model.from_lora import from_lora_adapters, pool_config, read_lora
from remix_model.models import (
    check_quantisation,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from remix_model.peft_files import add_adapter, load_peft_adapter, method_of
from remix_model.tokens import tokenize
from remix_model.tuner.adapter_files import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainingArguments,
    )

    from remix_model import ReMixConfig


@dataclass
class Plan:
    """A run that was checked as far as it can be without its weights."""

    adapter: PeftConfig  # a ReMixConfig, or one of PEFT's own
    arguments: TrainingArguments  # ReMixTrainingArguments for a mixture
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
    adapter: PeftConfig | None = method_config(config) if config.is_routed else None
    arguments = training_arguments(config)
    examples, held_out = read_data(config)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    train_rows = encode(examples, config, tokenizer, model_config)
    held_out_rows = encode(held_out, config, tokenizer, model_config)
    if config.eval_steps is not None and not held_out_rows:
        raise ValueError("eval_steps needs held-out data: give eval_dataset or eval_size")
    if adapter is None:
        base = base_skeleton(config, model_config, torch.float32)
        adapter = peft_method_config(config, base)
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
    if not config.is_routed:
        return
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
        model_max_length=positions(config, model_config),
        long_examples=config.long_examples,
        train_on=config.train_on,
    )
    check_vocabulary(max(max(row["input_ids"]) for row in rows), config, model_config)
    return rows


def positions(config: RunConfig, model_config: PretrainedConfig) -> int | None:
    """Return how long a sequence may be: a learned prompt takes positions of the model's too."""
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is None or not has_option(config.method, "num_virtual_tokens"):
        return limit
    if limit < config.num_virtual_tokens + 2:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens} leaves no room in the model's {limit} "
            "positions: lower it"
        )
    return int(limit) - config.num_virtual_tokens


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
    ours = ("method", "backend", "from_lora")
    names = [item.name for item in option_fields("method") if item.name not in ours]
    values = {name: getattr(config, name) for name in names}
    values["router_kwargs"] = values["router_kwargs"] or {}
    _list_names(values)
    runtime = {"backend": config.backend}
    adapter = ReMixConfig(task_type="CAUSAL_LM", runtime_config=runtime, **values)
    if config.from_lora is None:
        return adapter
    return pool_config([read_lora(folder) for folder in config.from_lora], adapter)


def _list_names(values: dict[str, Any]) -> None:
    """Make a bare name a list of one, which PEFT would read as an expression for a whole path."""
    for name in ("target_modules", "exclude_modules"):
        value = values.get(name)
        if isinstance(value, str) and re.fullmatch(r"\w+", value):
            values[name] = [value]


def peft_method_config(config: RunConfig, base: Any) -> PeftConfig:
    """Return the configuration of one of PEFT's own methods, for a base on any device.

    Raises:
        ValueError: It does not fit the model, or needs what was not given.
    """
    values = {
        item.name: getattr(config, item.name)
        for item in option_fields("method", "peft")
        if item.name != "method" and has_option(config.method, item.name)
    }
    _list_names(values)
    if "rank" in values:
        k, r = values.pop("top_k"), values.pop("r")
        values["rank"] = values["rank"] or k * r
    check_targets(base, values.get("target_modules"))
    return baseline_config(config.method, base, **values)


def adapt(base: Any, config: RunConfig, adapter: PeftConfig) -> PeftModel:
    """Put a new adapter on the base model; a mixture's experts may start as trained LoRAs."""
    from remix_model import ReMixConfig

    if config.from_lora is None:
        return add_adapter(base, adapter)
    assert isinstance(adapter, ReMixConfig)  # no other method has from_lora
    return from_lora_adapters(base, config.from_lora, adapter)


def base_skeleton(
    config: RunConfig, model_config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Return the base model on the meta device: all shapes and names, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )


def skeleton(
    config: RunConfig, model_config: PretrainedConfig, adapter: PeftConfig, dtype: torch.dtype
) -> Any:
    """Return the adapted model on the meta device: all shapes and names, no weights.

    Raises:
        ValueError: The adapter does not fit the model: nothing to adapt, or not a linear layer.
    """
    base = base_skeleton(config, model_config, dtype)
    # PEFT makes a set of names; a text is an expression, and may fit nothing.
    names = getattr(adapter, "exclude_modules", None)
    check_targets(base, names if isinstance(names, str) else sorted(names or ()), "exclude_modules")
    with torch.device("meta"):
        return add_adapter(base, adapter)


def adapter_folder(path: str, *, routed: bool = False) -> Path:
    """Check that a folder holds an adapter in safetensors, and return it.

    Args:
        path: The folder.
        routed: Only a mixture will do.

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
    kind, method = read_config(folder / CONFIG_NAME).get("peft_type"), method_of(folder)
    if method is None or (routed and kind != "REMIX"):
        wanted = "a mixture" if routed else f"a mixture or one of {', '.join(PEFT_METHODS)}"
        raise ValueError(
            f"{folder / CONFIG_NAME} describes an adapter of type {kind!r}: this command needs "
            f"{wanted}"
        )
    return folder


def adapter_config(folder: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that an adapter was trained with, and flags over it.

    An adapter that no run wrote has only its base model's name.
    """
    method = method_of(folder)
    if method not in (*ROUTED_METHODS, *PEFT_METHODS) and not is_registered(method):
        raise ValueError(
            f"{folder} is a mixture of router type {method!r}, which is registered nowhere in this "
            "process: see docs/routers.md on commands with a router of your own"
        )
    base: dict[str, Any] = {}
    for place in (folder, folder.parent):  # a run's folder, or a checkpoint in it
        if is_run(place):
            base = read_yaml(place / CONFIG_FILE)
            base.pop("trust_remote_code", None)  # a folder must not decide that code is run
            break
    base["method"] = method  # the weights are that, whatever a run's file says
    if "model" not in base and "model" not in overrides:
        name = read_config(folder / CONFIG_NAME).get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{folder} does not say what its base model is: give --model")
        base["model"] = name
    return build_config(overrides, base=base)


def load_adapter(folder: Path, config: RunConfig) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model, the adapter on it, and the tokenizer."""
    check_backend(config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if not config.is_routed:
        return load_peft_adapter(load_base(config), folder), tokenizer
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

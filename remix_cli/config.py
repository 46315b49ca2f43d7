"""The run's configuration: one flat dataclass, a YAML file and flags, checked key by key.

Every field is a key of the YAML file and a flag: `num_experts: 8` and `--num-experts 8`. Flags win
over the file, the file over the defaults. The names are those of `ReMixConfig` and of transformers'
`TrainingArguments`.
"""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

CONFIG_HEADER = "# Written by `remix train`: the configuration of the run in this folder.\n"


def _option(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
    }
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """All options of a run; their help texts are in the fields' metadata."""

    # What is finetuned.
    model: str = _option("smollm2-135m", "model", "hub id, folder, or smollm2-135m (embedded)")
    dtype: str = _option(
        "auto",
        "model",
        "of the base model; auto is float32 on a CPU, else the checkpoint's",
        ("auto", "float32", "bfloat16", "float16"),
    )
    load_in_4bit: bool = _option(False, "model", "quantise it to NF4 (QLoRA); bitsandbytes")
    load_in_8bit: bool = _option(False, "model", "quantise it to int8; bitsandbytes")
    attn_implementation: str | None = _option(
        None, "model", "sdpa, eager, flash_attention_2, ...; default: transformers' choice"
    )
    trust_remote_code: bool = _option(False, "model", "run code that comes with the checkpoint")
    device: str | None = _option(
        None, "model", "where to run; default: CUDA if there is any", ("cpu", "cuda")
    )

    # What it learns from.
    dataset: str = _option(
        "humaneval", "data", "humaneval, a .jsonl/.json/.csv/.tsv/.txt file (.gz too), or a hub id"
    )
    dataset_name: str | None = _option(None, "data", "configuration of a hub dataset")
    dataset_split: str = _option("train", "data", "split of a hub dataset")
    eval_dataset: str | None = _option(None, "data", "held-out data; default: part of the dataset")
    eval_split: str = _option("test", "data", "split of a hub dataset to evaluate on")
    eval_size: float = _option(
        0.1,
        "data",
        "held out where there is no eval_dataset: a share, or a number of examples",
        minimum=0,
    )
    split_seed: int = _option(0, "data", "chooses which examples are held out")
    limit: int | None = _option(None, "data", "read only the first so many examples", minimum=1)
    eval_limit: int | None = _option(
        None, "data", "evaluate on the first so many held-out", minimum=1
    )
    prompt_template: str | None = _option(
        None, "data", "prompt with fields in braces, like '{question}\\n'; default: '{prompt}'"
    )
    response_field: str | None = _option(None, "data", "field with the response; default: response")
    messages_field: str | None = _option(
        None, "data", "field with a chat; default: messages, where the records have it"
    )
    max_length: int | None = _option(
        None, "data", "longest sequence in tokens; default: 1024 or the model's limit"
    )
    long_examples: str = _option(
        "error", "data", "what to do with longer ones", ("error", "drop", "truncate")
    )
    train_on: str = _option("response", "data", "tokens with a loss", ("response", "all"))

    # The mixture.
    num_experts: int = _option(8, "method", "LoRAs in a layer's pool (n)")
    top_k: int = _option(4, "method", "LoRAs active per token (k)")
    r: int = _option(8, "method", "rank of each LoRA")
    lora_alpha: float = _option(2.0, "method", "as in LoRA, of the k LoRAs together")
    use_rslora: bool = _option(True, "method", "scale by alpha/sqrt(k r) instead of alpha/(k r)")
    lora_dropout: float = _option(0.0, "method", "noise that is not the selection's: best at 0")
    target_modules: Sequence[str] | str | None = _option(
        None, "method", "names of linears, all-linear, or one regular expression; default: MLP"
    )
    exclude_modules: Sequence[str] | str | None = _option(None, "method", "names to leave out")
    layers_to_transform: Sequence[int] | None = _option(None, "method", "only these layers")
    router_type: str = _option("remix", "method", "how experts are chosen", ("remix",))
    routing_granularity: str = _option(
        "token",
        "method",
        "one choice a token, or a sequence (from its prompt)",
        ("token", "sequence"),
    )
    router_sharing: str = _option(
        "module", "method", "one router a linear, or a feed-forward block", ("module", "block")
    )
    router_init_range: float = _option(0.02, "method", "standard deviation of the router's start")
    router_temperature: float = _option(1.0, "method", "divides the router's logits")
    from_lora: Sequence[str] | None = _option(
        None, "method", "folders of n trained LoRAs that the experts start as; default: afresh"
    )
    backend: str = _option(
        "auto", "method", "of the routed ops", ("auto", "torch", "triton", "reference")
    )

    # How it learns.
    num_selections: int = _option(4, "training", "sampled selections per input (M), at least 2")
    grad_selections: int | None = _option(
        None, "training", "selections with a backward pass (G); default: all M"
    )
    selection_chunk_size: int | None = _option(
        None, "training", "selections in memory at once; default: G"
    )
    selection_parallel: int = _option(
        1, "training", "neighbouring ranks that share the selections of a batch", minimum=1
    )
    credit: str = _option(
        "causal",
        "training",
        "losses a choice answers for: those after it, or all of its sequence (the paper's)",
        ("causal", "sequence"),
    )
    log_prob: str = _option(
        "unordered",
        "training",
        "of a selection: of the set, or of the draw (the paper's)",
        ("unordered", "ordered"),
    )
    logprob_tokens: str = _option(
        "all", "training", "positions that are sampled", ("all", "response")
    )
    learning_rate: float = _option(5e-4, "training", "of the LoRAs, at its peak", minimum=0)
    router_learning_rate: float | None = _option(
        None, "training", "of the routers; default: learning_rate", minimum=0
    )
    advantage_norm: str = _option(
        "none",
        "training",
        "divides advantages by their spread, of an input or the batch; biased",
        ("none", "input", "batch"),
    )
    router_entropy_coef: float = _option(
        0.0, "training", "bonus for undecided routers; biased", minimum=0
    )
    load_balancing_coef: float = _option(
        0.0, "training", "pull towards even use of experts; biased", minimum=0
    )
    temperature: float = _option(1.0, "training", "of the sampled policy, at the first step")
    temperature_end: float | None = _option(
        None, "training", "the same at the last step, linear in between; default: no schedule"
    )
    num_train_epochs: float = _option(1.0, "training", "passes over the training data", minimum=0)
    max_steps: int = _option(-1, "training", "optimizer steps; overrides num_train_epochs")
    per_device_train_batch_size: int = _option(4, "training", "examples in one pass", minimum=1)
    per_device_eval_batch_size: int = _option(
        8, "training", "examples in one evaluation pass", minimum=1
    )
    gradient_accumulation_steps: int = _option(
        1, "training", "passes in one optimizer step", minimum=1
    )
    lr_scheduler_type: str = _option(
        "cosine",
        "training",
        "as in transformers",
        (
            "cosine",
            "linear",
            "constant",
            "constant_with_warmup",
            "cosine_with_restarts",
            "polynomial",
            "inverse_sqrt",
        ),
    )
    warmup_ratio: float = _option(0.1, "training", "share of the steps that warm up", minimum=0)
    weight_decay: float = _option(0.0, "training", "as in AdamW", minimum=0)
    max_grad_norm: float = _option(1.0, "training", "clips the LoRAs' gradient", minimum=0)
    router_max_grad_norm: float | None = _option(
        None, "training", "clips the routers' gradient", minimum=0
    )
    gradient_checkpointing: bool = _option(False, "training", "recompute to save memory")
    bf16: bool = _option(False, "training", "mixed precision")
    group_by_length: bool = _option(False, "training", "batch examples of similar length")
    seed: int = _option(
        0,
        "training",
        "of initialisation, data order and sampled selections",
        minimum=0,
        maximum=2**32 - 1,
    )

    # What is written.
    output_dir: str = _option("runs/remix", "output", "folder for the adapter and all else")
    overwrite: bool = _option(False, "output", "replace the run in output_dir")
    resume: bool = _option(False, "output", "continue from output_dir's last checkpoint")
    logging_steps: int = _option(5, "output", "steps between logged losses", minimum=1)
    eval_steps: int | None = _option(
        None, "output", "steps between evaluations; default: none", minimum=1
    )
    save_steps: int = _option(100, "output", "steps between checkpoints", minimum=1)
    save_total_limit: int = _option(2, "output", "checkpoints to keep", minimum=1)
    num_samples: int = _option(1, "output", "held-out prompts to answer at the end", minimum=0)
    max_new_tokens: int = _option(128, "output", "length of the generated answers", minimum=1)

    def __post_init__(self) -> None:
        for item in fields(self):
            setattr(self, item.name, check_value(item.name, getattr(self, item.name)))


_FIELDS: dict[str, Field[Any]] = {item.name: item for item in fields(RunConfig)}
_TYPES: dict[str, Any] = get_type_hints(RunConfig)
_PATHS = ("model", "dataset", "eval_dataset", "from_lora", "output_dir")


def option_fields(*groups: str) -> list[Field[Any]]:
    """Return the fields of these groups, in their order."""
    return [item for item in fields(RunConfig) if item.metadata["group"] in groups]


def option_types(name: str) -> tuple[Any, ...]:
    """Return the alternatives of a field's type, without None: (int,), (Sequence[str], str)."""
    hint = _TYPES[name]
    union = get_origin(hint) in (Union, types.UnionType)
    return tuple(kind for kind in (get_args(hint) if union else (hint,)) if kind is not type(None))


def is_optional(name: str) -> bool:
    """Return whether a field may be None."""
    return type(None) in get_args(_TYPES[name])


def build_config(
    overrides: Mapping[str, Any],
    file: str | Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge a base, a YAML file and overrides, the later ones winning, into a configuration.

    Raises:
        ValueError: An unknown key, or a value of the wrong type: with the key and what it should
            be.
        OSError: The file cannot be read.
    """
    values = dict(base or {})
    if file is not None:
        values.update(read_yaml(file))
    values.update(overrides)
    return RunConfig(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file and check its keys and types.

    Raises:
        ValueError: It is not a mapping, or has an unknown key or a value of the wrong type.
        OSError: It cannot be read.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}: check the path")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = None if node is None else yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise ValueError(f"{path} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    names = [key.value for key, _ in node.value]  # type: ignore[union-attr]
    for key in values:
        if names.count(str(key)) > 1:
            raise ValueError(f"{path} sets {key!r} more than once: keep one of the lines")
        if key not in _FIELDS:
            hint = closest(str(key).replace("-", "_"), _FIELDS)
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
    try:
        return {key: check_value(key, value) for key, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def absolute_path(key: str, value: Any) -> Any:
    """Return a path among the values as an absolute one: a run is used from other folders too."""
    if key in _PATHS and isinstance(value, list):
        return [absolute_path(key, item) for item in value]
    if key not in _PATHS or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if not path.exists():
        return value
    path = path.absolute()
    return str(path.parent.resolve() / path.name)  # the name of a link tells a file's format


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write a configuration as `read_yaml` reads it, without what only this start meant."""
    import yaml

    values = {
        key: absolute_path(key, value)
        for key, value in asdict(config).items()
        if key not in ("overwrite", "resume")
    }

    class Dumper(yaml.SafeDumper):
        """Writes text with line breaks on one line, as people do."""

    Dumper.add_representer(
        str,
        lambda dumper, text: dumper.represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
        ),
    )
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, width=1000)
    write_text(CONFIG_HEADER + text, path)


def write_text(text: str, path: Path) -> None:
    """Write under a temporary name and rename it, so that readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_value(key: str, value: Any) -> Any:
    """Return a value as its field's type.

    Raises:
        ValueError: It is of another type, too small, or not one of the field's choices.
    """
    kinds = option_types(key)
    if value is None and is_optional(key):
        return None
    for kind in kinds:
        converted = _convert(kind, value)
        if converted is not None:
            value = converted
            break
    else:
        expected = " or ".join(_kind_name(kind) for kind in kinds)
        if is_optional(key):
            expected += " or null"
        raise ValueError(f"{key} must be {expected}, got {value!r}")
    choices = _FIELDS[key].metadata["choices"]
    if choices and value not in choices:
        raise ValueError(
            f"{key} must be one of {', '.join(choices)}, got "
            f"{value!r}{closest(str(value), choices)}"
        )
    minimum = _FIELDS[key].metadata["minimum"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{key} must be at least {minimum}, got {value!r}")
    maximum = _FIELDS[key].metadata["maximum"]
    if maximum is not None and value > maximum:
        raise ValueError(f"{key} must be at most {maximum}, got {value!r}")
    return value


def closest(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of words, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _convert(kind: Any, value: Any) -> Any:
    """Return value as kind where that loses nothing, else None."""
    if get_origin(kind) is Sequence:
        (inner,) = get_args(kind)
        if not isinstance(value, list) or not value:
            return None
        items = [_convert(inner, item) for item in value]
        return None if None in items else items
    if isinstance(value, bool):
        return value if kind is bool else None
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML reads 1e-4, without a point, as text.
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, kind) else None


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Sequence:
        return "a list of " + {str: "names", int: "whole numbers"}[get_args(kind)[0]]
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]

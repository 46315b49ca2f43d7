"""The options of a run: one flat dataclass, and which of them each method has.

Every field is a key of the YAML file and a flag: `num_experts: 8` and `--num-experts 8`. The names
are those of `ReMixConfig`, of PEFT's configurations and of transformers' `TrainingArguments`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Union, get_args, get_origin, get_type_hints

from remix_cli.values import convert, one_of

ROUTED = "routed"  # stands for every method below that is a mixture, and for routers of the user's
ROUTED_METHODS = ("remix", "uniform", "mixlora", "mixlora_block", "hydralora", "mor")
DRAWN = "drawn"  # for those of them whose experts may be drawn
TRAINED = "trained"  # whose routers are trained
POLICY = "policy"  # both
_LEARNED = ("mixlora", "mixlora_block", "hydralora")
_LORAS = ("lora", "rslora", "dora")
_LOW_RANK = (*_LORAS, "vblora")
_PROMPTS = ("prefix", "prompt", "ptuning")
PEFT_METHODS = (*_LORAS, "ia3", *_PROMPTS, "vblora", "xlora")


def _option(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    methods: tuple[str, ...] | None = None,
) -> Any:
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "methods": methods,
    }
    return field(default=default, metadata=metadata)


_routed = partial(_option, methods=(ROUTED,))
_drawn = partial(_option, methods=(DRAWN,))
_trained = partial(_option, methods=(TRAINED,))
_policy = partial(_option, methods=(POLICY,))


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

    # What is trained beside it.
    method: str = _option(
        "remix",
        "method",
        f"a mixture: {', '.join(ROUTED_METHODS)}; or one of PEFT's: {', '.join(PEFT_METHODS)}",
    )
    num_experts: int = _routed(8, "method", "LoRAs in a layer's pool (n)")
    top_k: int = _option(4, "method", "LoRAs active per token (k)", methods=(ROUTED, *_LOW_RANK))
    r: int = _option(8, "method", "rank of each LoRA", methods=(ROUTED, *_LOW_RANK))
    lora_alpha: float = _option(
        2.0, "method", "as in LoRA, of the k LoRAs together", methods=(ROUTED, *_LORAS)
    )
    use_rslora: bool = _option(
        True, "method", "scale by alpha/sqrt(k r) instead of alpha/(k r)", methods=(ROUTED, "dora")
    )
    lora_dropout: float = _option(
        0.0, "method", "noise that is not the selection's: best at 0", methods=(ROUTED, *_LOW_RANK)
    )
    target_modules: Sequence[str] | str | None = _option(
        None,
        "method",
        "names of linears, all-linear, or one regular expression; default: MLP",
        methods=(ROUTED, *_LOW_RANK, "ia3"),
    )
    exclude_modules: Sequence[str] | str | None = _option(
        None, "method", "names to leave out", methods=(ROUTED, *_LOW_RANK, "ia3")
    )
    layers_to_transform: Sequence[int] | None = _option(
        None, "method", "only these layers", methods=(ROUTED, *_LOW_RANK)
    )
    router_type: str = _routed(
        "remix", "method", "how experts are chosen; as method", ROUTED_METHODS
    )
    router_kwargs: Mapping[str, Any] | None = _routed(
        None, "method", "options of the router, as '{load_balancing_coef: 0.02}'; default: none"
    )
    routing_granularity: str = _routed(
        "token",
        "method",
        "one choice a token, or a sequence (from its prompt)",
        ("token", "sequence"),
    )
    router_sharing: str = _routed(
        "module", "method", "one router a linear, or a feed-forward block", ("module", "block")
    )
    router_init_range: float = _trained(0.02, "method", "standard deviation of the router's start")
    router_temperature: float = _trained(1.0, "method", "divides the router's logits")
    from_lora: Sequence[str] | None = _routed(
        None, "method", "folders of n trained LoRAs that the experts start as; default: afresh"
    )
    backend: str = _routed(
        "auto", "method", "of the routed ops", ("auto", "torch", "triton", "reference")
    )

    # What PEFT's own methods have beside.
    rank: int | None = _option(
        None,
        "peft",
        "of the one low-rank update; default: top_k r, as in the mixture",
        minimum=1,
        methods=_LOW_RANK,
    )
    num_virtual_tokens: int = _option(
        20, "peft", "length of the learned prompt", minimum=1, methods=_PROMPTS
    )
    encoder_hidden_size: int | None = _option(
        None,
        "peft",
        "of what makes the prompt while training; default: the model's",
        minimum=1,
        methods=("ptuning",),
    )
    num_vectors: int = _option(
        256, "peft", "vectors in VB-LoRA's bank", minimum=1, methods=("vblora",)
    )
    vector_length: int | None = _option(
        None,
        "peft",
        "of VB-LoRA's vectors; default: the most that divides all sizes, up to 256",
        minimum=1,
        methods=("vblora",),
    )
    vblora_topk: int = _option(
        2, "peft", "vectors mixed in each piece of VB-LoRA", minimum=1, methods=("vblora",)
    )
    xlora_adapters: Sequence[str] | None = _option(
        None, "peft", "folders of the trained LoRAs that X-LoRA mixes", methods=("xlora",)
    )
    xlora_depth: int = _option(
        1, "peft", "layers of X-LoRA's classifier", minimum=1, methods=("xlora",)
    )

    # How it learns.
    num_selections: int = _drawn(4, "training", "sampled selections per input (M), at least 2")
    grad_selections: int | None = _drawn(
        None, "training", "selections with a backward pass (G); default: all M"
    )
    selection_chunk_size: int | None = _drawn(
        None, "training", "selections in memory at once; default: G"
    )
    selection_parallel: int = _drawn(
        1, "training", "neighbouring ranks that share the selections of a batch", minimum=1
    )
    credit: str = _policy(
        "causal",
        "training",
        "losses a choice answers for: those after it, or all of its sequence (the paper's)",
        ("causal", "sequence"),
    )
    log_prob: str = _policy(
        "unordered",
        "training",
        "of a selection: of the set, or of the draw (the paper's)",
        ("unordered", "ordered"),
    )
    logprob_tokens: str = _drawn(
        "all", "training", "positions that are sampled", ("all", "response")
    )
    learning_rate: float = _option(5e-4, "training", "of the LoRAs, at its peak", minimum=0)
    router_learning_rate: float | None = _trained(
        None, "training", "of the routers; default: learning_rate", minimum=0
    )
    dense_start: int = _drawn(
        0, "training", "steps in which a token's experts fall from all to top_k", minimum=0
    )
    router_wait: int = _trained(0, "training", "steps before the routers' first update", minimum=0)
    expert_rate_scale: float = _routed(
        1.0, "training", "times learning_rate: the rate of the experts", minimum=0
    )
    advantage_norm: str = _policy(
        "none",
        "training",
        "divides advantages by their spread, of an input or the batch; biased",
        ("none", "input", "batch"),
    )
    router_entropy_coef: float = _trained(
        0.0, "training", "bonus for undecided routers; biased", minimum=0
    )
    load_balancing_coef: float = _trained(
        0.0, "training", "pull towards even use of experts; biased", minimum=0
    )
    temperature: float = _policy(1.0, "training", "of the sampled policy, at the first step")
    temperature_end: float | None = _policy(
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
    router_max_grad_norm: float | None = _trained(
        None, "training", "clips the routers' gradient", minimum=0
    )
    gradient_checkpointing: bool = _option(
        False,
        "training",
        "recompute to save memory",
        methods=(ROUTED, *_LOW_RANK, "ia3", "prompt", "ptuning"),
    )
    bf16: bool = _option(False, "training", "mixed precision")
    train_sampling_strategy: str = _option(
        "random",
        "training",
        "what a pass holds: group_by_length and batch_rebalance (inside a step) save padding",
        ("random", "group_by_length", "batch_rebalance"),
    )
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
        self.method = settle_method(self.method, self.router_type)
        self.router_type = self.method if self.is_routed else "remix"

    @property
    def is_routed(self) -> bool:
        """Whether it trains a mixture, and none of PEFT's own methods."""
        return self.method not in PEFT_METHODS

    def values(self) -> dict[str, Any]:
        """Return the options that the method has, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if has_option(self.method, item.name)
        }


FIELDS: dict[str, Field[Any]] = {item.name: item for item in fields(RunConfig)}
_TYPES: dict[str, Any] = get_type_hints(RunConfig)
PATHS = ("model", "dataset", "eval_dataset", "from_lora", "xlora_adapters", "output_dir")


def option_fields(*groups: str) -> list[Field[Any]]:
    """Return the fields of these groups, in their order."""
    return [item for item in fields(RunConfig) if item.metadata["group"] in groups]


def option_types(name: str) -> tuple[Any, ...]:
    """Return the alternatives of a field's type, without None: (int,), (Sequence[str], str)."""
    hint = _TYPES[name]
    union = get_origin(hint) in (Union, types.UnionType)
    return tuple(kind for kind in (get_args(hint) if union else (hint,)) if kind is not type(None))


def has_option(method: str, name: str) -> bool:
    """Return whether a method has an option."""
    methods = FIELDS[name].metadata["methods"]
    if methods is None or method in PEFT_METHODS:
        return methods is None or method in methods
    drawn, trained = method not in _LEARNED, method != "uniform"
    kinds = {ROUTED: True, DRAWN: drawn, TRAINED: trained, POLICY: drawn and trained}
    return any(kinds.get(kind, False) for kind in methods)


def methods_with(name: str) -> str:
    """Return the names of the methods that have an option, for a message."""
    known = (*ROUTED_METHODS, *PEFT_METHODS)
    return ", ".join(method for method in known if has_option(method, name))


def is_registered(router_type: Any) -> bool:
    """Return whether a router is one of the user's, registered in this process."""
    routers: Any = sys.modules.get("remix_model.routers")  # help needs no torch
    return routers is not None and isinstance(router_type, str) and router_type in routers.ROUTERS


def settle_method(method: str, router_type: str) -> str:
    """Return the method of a run: the mixtures are told apart by method or by router_type.

    Raises:
        ValueError: The method is unknown, or the two name different mixtures.
    """
    known = method in (*ROUTED_METHODS, *PEFT_METHODS, router_type)
    if not known and not is_registered(method):
        raise ValueError(one_of("method", method, (*ROUTED_METHODS, *PEFT_METHODS)))
    if method in PEFT_METHODS or router_type in ("remix", method):
        return method
    if method != "remix":
        raise ValueError(f"method={method} and router_type={router_type} differ: leave one out")
    return router_type


def is_optional(name: str) -> bool:
    """Return whether a field may be None."""
    return type(None) in get_args(_TYPES[name])


def check_value(key: str, value: Any) -> Any:
    """Return a value as its field's type.

    Raises:
        ValueError: It is of another type, too small, or not one of the field's choices.
    """
    if key == "router_type" and is_registered(value):
        return value
    return convert(
        key, value, option_types(key), optional=is_optional(key), limits=FIELDS[key].metadata
    )

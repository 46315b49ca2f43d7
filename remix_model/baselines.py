"""PEFT's own methods by one word each, set up so that a comparison with a mixture is fair.

Nothing is computed here: every method is PEFT's, and this is the table from its name to its
configuration. `lora`, `rslora`, `dora` and `vblora` adapt the linears that ReMix adapts, by one
update of rank k r: what k chosen LoRAs of rank r are together. (IA)3 keeps the places that define
it (keys, values, and inside the feed-forward block).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    XLoraConfig,
)
from peft.utils import PeftType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from remix_model.peft_files import adapter_state
from remix_model.tuner.layer import linear_features
from remix_model.tuner.model import FEED_FORWARD_MODULES

Names = Sequence[str] | str | None
_LONGEST_VECTOR = 256  # VBLoRAConfig's own default


def baseline_config(method: str, base: Any, **options: Any) -> PeftConfig:
    """Return the configuration of one of PEFT's methods for a model.

    Args:
        method: A key of `METHODS`.
        base: The causal language model; it may be on the meta device.
        options: As the method's function below takes them.

    Raises:
        ValueError: The method is unknown, or does not fit the model or the options each other.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method](base, **options)


def lora(
    base: Any,
    *,
    rank: int,
    lora_alpha: float = 2.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dropout: float = 0.0,
    target_modules: Names = None,
    exclude_modules: Names = None,
    layers_to_transform: Sequence[int] | None = None,
) -> LoraConfig:
    """LoRA (arXiv 2106.09685): scaled by lora_alpha / rank, or with rsLoRA / sqrt(rank)."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        use_rslora=use_rslora,
        use_dora=use_dora,
        lora_dropout=lora_dropout,
        target_modules=_targets(base, target_modules),
        exclude_modules=exclude_modules,  # type: ignore[arg-type]  # any sequence
        layers_to_transform=layers_to_transform,  # type: ignore[arg-type]
    )


def rslora(base: Any, **options: Any) -> LoraConfig:
    """RsLoRA (arXiv 2312.03732): `lora`, scaled by lora_alpha / sqrt(rank)."""
    return lora(base, use_rslora=True, **options)


def dora(base: Any, *, use_rslora: bool = True, **options: Any) -> LoraConfig:
    """DoRA (arXiv 2402.09353): `lora` for the direction of the weight, and its magnitude."""
    return lora(base, use_rslora=use_rslora, use_dora=True, **options)


def ia3(base: Any, *, target_modules: Names = None, exclude_modules: Names = None) -> IA3Config:
    """(IA)3 (arXiv 2205.05638): a factor for each output, or each input of feed-forward linears.

    Which of target_modules are scaled at their input is PEFT's choice for the model's type.
    """
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(base.config.model_type, [])
    inner = None  # with PEFT's own targets, PEFT's own choice
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            raise ValueError(
                "target_modules=all-linear: (IA)3 takes names; leave it out or list some"
            )
        inner = []
    elif target_modules is not None:
        inner = [name for name in target_modules if name in known]
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=target_modules,  # type: ignore[arg-type]  # any sequence
        exclude_modules=exclude_modules,  # type: ignore[arg-type]
        feedforward_modules=inner,
    )


def prefix(base: Any, *, num_virtual_tokens: int) -> PrefixTuningConfig:
    """Prefix tuning (arXiv 2101.00190): keys and values of virtual tokens, in every layer."""
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


def prompt(base: Any, *, num_virtual_tokens: int) -> PromptTuningConfig:
    """Prompt tuning (arXiv 2104.08691): embeddings of virtual tokens."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


def ptuning(
    base: Any, *, num_virtual_tokens: int, encoder_hidden_size: int | None = None
) -> PromptEncoderConfig:
    """P-tuning (arXiv 2103.10385): embeddings of virtual tokens, made by a network in training."""
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
        encoder_hidden_size=encoder_hidden_size,  # type: ignore[arg-type]  # None: the model's
    )


def vblora(
    base: Any,
    *,
    rank: int,
    num_vectors: int,
    vector_length: int | None = None,
    vblora_topk: int = 2,
    lora_dropout: float = 0.0,
    target_modules: Names = None,
    exclude_modules: Names = None,
    layers_to_transform: Sequence[int] | None = None,
) -> VBLoRAConfig:
    """VB-LoRA (arXiv 2405.15179): LoRA whose pieces are mixed from one bank of vectors.

    Raises:
        ValueError: vblora_topk is more than num_vectors.
    """
    if vblora_topk > num_vectors:
        raise ValueError(f"vblora_topk={vblora_topk} of num_vectors={num_vectors}: lower it")
    targets = _targets(base, target_modules)
    return VBLoRAConfig(
        task_type="CAUSAL_LM",
        r=rank,
        num_vectors=num_vectors,
        vector_length=vector_length or _vector_length(base, targets),
        topk=vblora_topk,
        vblora_dropout=lora_dropout,
        target_modules=targets,
        exclude_modules=exclude_modules,  # type: ignore[arg-type]  # any sequence
        layers_to_transform=layers_to_transform,  # type: ignore[arg-type]
    )


def xlora(base: Any, *, xlora_adapters: Sequence[str] | None, xlora_depth: int = 1) -> XLoraConfig:
    """X-LoRA (arXiv 2402.07148): trained LoRAs, frozen, mixed by a classifier of the token.

    The classifier reads a first forward pass of the base model.

    Raises:
        ValueError: There are fewer than two LoRAs, or one is missing or damaged.
    """
    from remix_model.from_lora import read_lora

    folders = list(xlora_adapters or ())
    if len(folders) < 2:
        raise ValueError(
            f"xlora mixes trained LoRAs, and xlora_adapters names {len(folders)}: give the folders "
            "of two or more"
        )
    for folder in folders:
        read_lora(folder)
    return XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        # By number: PEFT loads them as "0", "1", ..., and activates those that it finds by name.
        adapters={str(i): str(Path(f).expanduser().resolve()) for i, f in enumerate(folders)},
        xlora_depth=xlora_depth,
    )


METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lora,
    "rslora": rslora,
    "dora": dora,
    "ia3": ia3,
    "prefix": prefix,
    "prompt": prompt,
    "ptuning": ptuning,
    "vblora": vblora,
    "xlora": xlora,
}


def activated_parameters(model: Any) -> int:
    """Return the adapter's parameters that a token passes through at inference.

    This is the one place for the convention; it is the ReMix paper's, as far as its table tells:

    * a mixture: k of its n LoRAs and the routers, all heads where weights are dense;
    * LoRA, rsLoRA, DoRA and (IA)3: all they train;
    * VB-LoRA: all it trains, bank and logits: each piece is the best few of the whole bank, found
      anew in every forward pass. (The paper's 0.675B for it are only explained so; what its authors
      report is what has to be stored, which is far less.)
    * prefix, prompt and P-tuning: the prompt itself. What makes P-tuning's prompt in training is
      not there at inference.
    * X-LoRA: the classifier and all LoRAs, since its weights are dense.

    Args:
        model: A PEFT model with one adapter; it may be on the meta device.
    """
    config = model.active_peft_config
    if hasattr(type(model.base_model), "activated_parameters"):
        return int(model.base_model.activated_parameters())
    if config.is_prompt_learning:
        per_token = config.token_dim
        if config.peft_type == PeftType.PREFIX_TUNING:
            per_token *= 2 * config.num_layers
        return config.num_virtual_tokens * per_token * (config.num_transformer_submodules or 1)
    of_experts = (".lora_A.", ".lora_B.") if config.peft_type == PeftType.XLORA else ()
    experts = [
        p for name, p in model.named_parameters() if any(part in name for part in of_experts)
    ]
    return sum(tensor.numel() for tensor in (*adapter_state(model).values(), *experts))


def check_targets(base: nn.Module, names: Names, option: str = "target_modules") -> None:
    """Raise ValueError unless every module that is named is there; PEFT wants only one to be."""
    if names is None or isinstance(names, str):
        return
    there = [name for name, _ in base.named_modules()]
    for target in names:
        if not any(name == target or name.endswith(f".{target}") for name in there):
            linears = {name.rpartition(".")[2] for name, _ in _linears(base)}
            raise ValueError(
                f"{option} names {target!r}, which is not there; the linears of "
                f"{type(base).__name__} are named {', '.join(sorted(linears))}"
            )


def _targets(base: Any, names: Names) -> Any:
    """What ReMix adapts by default."""
    if names is not None:
        return names
    model_type = base.config.model_type
    if model_type not in FEED_FORWARD_MODULES:
        raise ValueError(
            f"the feed-forward linears of model type {model_type!r} are not known: give "
            "target_modules"
        )
    return list(FEED_FORWARD_MODULES[model_type])


def _vector_length(base: nn.Module, targets: Names) -> int:
    """The most, up to PEFT's default, that divides the sizes of all targets."""
    sizes = [
        size
        for name, features in _linears(base)
        if not isinstance(targets, list) or any(f".{name}".endswith(f".{t}") for t in targets)
        for size in features
    ]
    common = math.gcd(*sizes)
    return max(d for d in range(1, _LONGEST_VECTOR + 1) if common % d == 0)


def _linears(base: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """Names and (in, out) of a model's linears, but for the head."""
    head = base.get_output_embeddings()  # type: ignore[operator]
    found = []
    for name, module in base.named_modules():
        try:
            found.append((name, linear_features(module)))
        except ValueError:
            continue
    return [(name, features) for name, features in found if base.get_submodule(name) is not head]

"""Trained LoRAs become the pool of a ReMix model: LoRA i is expert i of every linear.

ReMix adds `omega B_i A_i x` where LoRA i added `s_i B_i A_i x`, so B_i is stored times s_i / omega:
a token that chooses some experts gets the sum of exactly those LoRAs. A smaller LoRA has r - r_i
rows of A as they are initialised, and columns of zero in B: nothing yet, and free to be trained.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from remix_model.routers import ROUTERS
from remix_model.tuner.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Shapes,
    check_weights,
    read_config,
)
from remix_model.tuner.config import ReMixConfig
from remix_model.tuner.layer import ReMixLayer
from remix_model.tuner.loading import weights_file

# Fields of a LoraConfig that may be anything; all others must have their default values.
_ANY = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base model's weights as they are.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_ROOT = "base_model.model."


@dataclass
class SavedLora:
    """A LoRA's folder, read as far as its shapes."""

    folder: Path
    config: LoraConfig
    ranks: dict[str, int]  # by the linear's name in the base model

    def scaling(self, name: str) -> float:
        """What multiplies B A x in the linear `name`."""
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), name), self.config.lora_alpha)
        rank = self.ranks[name]
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def from_lora_adapters(
    base: nn.Module, directories: Sequence[str | Path], config: ReMixConfig
) -> PeftModel:
    """Make a ReMix model whose experts are trained LoRAs, with fresh routers.

    Where a token chooses a set of experts, the model computes what the sum of these LoRAs would, at
    their own scalings: with `top_k=1` and expert i, LoRA i's own output.

    Args:
        base: The model that the LoRAs were trained on.
        directories: n folders that PEFT wrote, in safetensors.
        config: With `num_experts` n and `r` at least the LoRAs' ranks. Without `target_modules`,
            those that the LoRAs adapt. It is not changed.

    Returns:
        The model with one adapter, "default", in training mode for PEFT's purposes: LoRAs and
        routers are trainable.

    Raises:
        ValueError: The LoRAs are not n, adapt other linears than each other or than config, do not
            fit r or the base model, or hold what a pool of LoRAs cannot: DoRA, biases, modules
            trained in full, weights that are a pickle or damaged.
    """
    loras = [read_lora(directory) for directory in directories]
    config = pool_config(loras, config)
    _warn_of_another_base(loras, base)
    model: Any = get_peft_model(base, config)
    layers = {
        name.removeprefix(_ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, ReMixLayer)
    }
    _check_linears("config", set(layers), str(loras[0].folder), set(loras[0].ranks))
    with torch.no_grad():
        for layer in layers.values():
            layer.remix_lora_B["default"].zero_()
        for expert, lora in enumerate(loras):
            _fill(layers, expert, lora)
    return model


def pool_config(loras: Sequence[SavedLora], config: ReMixConfig) -> ReMixConfig:
    """`config` for a pool of these LoRAs: a copy, with their linears where it names none.

    Raises:
        ValueError: They do not fit it, or each other.
    """
    if len(loras) != config.num_experts:
        raise ValueError(
            f"num_experts={config.num_experts}, and {len(loras)} LoRAs are to be the experts: make "
            "them equal"
        )
    if ROUTERS[config.router_type].shared_a:
        raise ValueError(
            f"router_type={config.router_type!r} has one A for all experts, and {len(loras)} LoRAs "
            "have one each: use another type"
        )
    for lora in loras:
        _check_linears(str(lora.folder), set(lora.ranks), str(loras[0].folder), set(loras[0].ranks))
        for name, rank in lora.ranks.items():
            r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
            if rank > r:
                raise ValueError(
                    f"r={r}, and the LoRA in {lora.folder} has rank {rank} at {name}: raise r, or "
                    "its rank_pattern"
                )
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = set(loras[0].ranks)  # type: ignore[assignment]  # as PEFT keeps it
    return config


def read_lora(directory: str | Path) -> SavedLora:
    """Read a LoRA's configuration and shapes, and check its weights.

    Raises:
        ValueError: It is no LoRA, one that a pool cannot hold, or damaged.
    """
    folder = Path(directory).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}: give a folder that PEFT wrote")
    kind = read_config(folder / CONFIG_NAME).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {kind!r}: the pool is made of LoRAs")
    shapes = check_weights(weights_file(folder, {}))
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is no LoRA's: {error}") from None
    plain = LoraConfig()
    for item in fields(LoraConfig):
        value = getattr(config, item.name)
        if item.name not in _ANY and value and value != getattr(plain, item.name):
            raise ValueError(
                f"the LoRA in {folder} has {item.name}={value!r}, which a pool of LoRAs cannot hold"
            )
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"the LoRA in {folder} has lora_alpha={alpha!r}, which is no number")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise ValueError(
            f"the LoRA in {folder} has init_lora_weights={config.init_lora_weights!r}, which "
            "changes the base model's weights too: convert it to a plain LoRA first (PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    return SavedLora(folder, config, _ranks(folder, shapes))


def _ranks(folder: Path, shapes: Shapes) -> dict[str, int]:
    """The rank at every linear, by name."""
    pairs: dict[str, dict[str, list[int]]] = {}
    for key, shape in shapes.items():
        name, _, kind = key.removeprefix(_ROOT).rpartition(".lora_")
        if kind not in ("A.weight", "B.weight") or not key.startswith(_ROOT):
            raise ValueError(
                f"the LoRA in {folder} holds {key}, which is no linear's A or B: a pool of "
                "LoRAs cannot hold it"
            )
        pairs.setdefault(name, {})[kind[0]] = list(shape)
    for name, pair in pairs.items():
        a, b = pair.get("A", []), pair.get("B", [])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise ValueError(f"the LoRA in {folder} has A {a} and B {b} at {name}: no LoRA's")
    if not pairs:
        raise ValueError(f"the LoRA in {folder} adapts nothing: its weights are empty")
    return {name: pair["A"][0] for name, pair in pairs.items()}


def _check_linears(what: str, linears: set[str], other: str, others: set[str]) -> None:
    """Raise ValueError unless two sets of linears are the same."""
    for one, name, two in ((what, linears - others, other), (other, others - linears, what)):
        if name:
            raise ValueError(
                f"{one} adapts {min(name)} and {two} does not ({len(linears)} and {len(others)} "
                "linears): all experts of a pool adapt the same linears"
            )


def _warn_of_another_base(loras: Sequence[SavedLora], base: nn.Module) -> None:
    here = str(getattr(base, "name_or_path", ""))
    for lora in loras:
        trained_on = str(lora.config.base_model_name_or_path or here)
        if here and Path(trained_on).name != Path(here).name:
            warnings.warn(
                f"the LoRA in {lora.folder} was trained on {trained_on!r} and becomes an expert on "
                f"{here!r}; it means nothing unless the two are the same model",
                stacklevel=3,
            )


def _fill(layers: dict[str, ReMixLayer], expert: int, lora: SavedLora) -> None:
    """Copy a LoRA into its place in every layer's pool, in which B is zero."""
    with safe_open(lora.folder / WEIGHTS_NAME, "pt") as file:
        for name, layer in layers.items():
            a: Tensor = file.get_tensor(f"{_ROOT}{name}.lora_A.weight")
            b: Tensor = file.get_tensor(f"{_ROOT}{name}.lora_B.weight")
            here = (layer.in_features, layer.out_features)
            if (a.shape[1], b.shape[0]) != here:
                raise ValueError(
                    f"{name} is {here[0]} -> {here[1]} in this model and {a.shape[1]} -> "
                    f"{b.shape[0]} for the LoRA in {lora.folder}, which was trained on "
                    f"{lora.config.base_model_name_or_path!r}: load that model"
                )
            rank = a.shape[0]
            layer.remix_lora_A["default"][expert, :rank].copy_(a)
            scale = lora.scaling(name) / layer.scaling["default"]
            layer.remix_lora_B["default"][expert, :, :rank].copy_(b.double() * scale)

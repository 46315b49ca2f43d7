"""A fixed choice of experts as a plain LoRA, which tools that know nothing of ReMix can load.

If every token of a linear takes the same k experts I, the layer is `W x + omega B A x` with the
chosen A's and B's side by side: one LoRA of rank k r, whose own scaling is omega (ReMix section
3.1). What is lost is the routing: see docs/ways-in-and-out.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from remix_model.forced import check_forced
from remix_model.site import RoutingSite, find_sites
from remix_model.stats import RoutingStats, recorded_stats
from remix_model.tuner.config import ReMixConfig
from remix_model.tuner.layer import ReMixLayer

MOST_FREQUENT = "most_frequent"
_ROOT = "base_model.model."  # of names in a PEFT model
_CARD = """---
library_name: peft
{base}tags: [lora]
---
# A LoRA exported from a ReMix adapter

Each linear of the [ReMix](https://arxiv.org/abs/2603.10160) adapter chose {top_k} of {num_experts}
LoRAs for every token. This is a plain LoRA that always applies the same {top_k}:

{chosen}

It equals the ReMix adapter where the router would have chosen these, and only there: measure it
before you use it in place of the adapter.
"""


def export_static_lora(
    model: PeftModel,
    selection: str | RoutingStats | Mapping[str, Sequence[int] | Tensor] = MOST_FREQUENT,
    directory: str | Path = "static_lora",
) -> dict[str, list[int]]:
    """Write a plain PEFT LoRA that always applies the same k experts of every linear.

    It equals `model` inside `force_selection` with the same experts, to rounding. Trained biases,
    `modules_to_save` and `trainable_token_indices` go with it.

    Args:
        model: A PEFT model with one active ReMix adapter.
        selection: The experts of every routed linear, by its name in `model.named_modules()` ([k]
            distinct experts each; with `router_sharing="block"`, of every block's first linear).
            Or `RoutingStats`: the k experts that most tokens took. "most_frequent": the same, from
            the last `record_routing(model)`.
        directory: Where the adapter is written; made if it is not there.

    Returns:
        The experts that were exported, by name, in ascending order.

    Raises:
        TypeError: The model is no PEFT model.
        ValueError: There is no ReMix adapter, or more than one is active; the selection lacks a
            linear, names an unknown one, or names experts that are not there; nothing was recorded;
            the directory holds an adapter.
    """
    folder = check_directory(directory)
    adapter, config = _active_adapter(model)
    sites = find_sites(model)
    _check_constant(sites)
    chosen = _resolve(selection, model, sites)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, ReMixLayer) and adapter in layer.sites
    }
    experts = _experts(layers, adapter, sites, chosen)
    tensors = _lora_tensors(get_peft_model_state_dict(model, adapter_name=adapter), experts)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(_card(config, chosen), encoding="utf-8")
    lora = _lora_config(config, adapter, layers)
    # Last: now it is whole.
    lora.save_pretrained(str(folder), auto_mapping_dict=_auto_mapping(model))
    return chosen


def _check_constant(sites: Mapping[str, RoutingSite]) -> None:
    """Raise ValueError where what the experts weigh depends on the token."""
    router = next(iter(sites.values())).router
    if router.learned:
        raise ValueError(
            f"a router of type {router.name!r} weighs its experts anew for every token, which no "
            "plain LoRA does: only fixed subsets of constant weight can be exported"
        )


def check_directory(directory: str | Path) -> Path:
    """Where an export may go.

    Raises:
        ValueError: It is a file, or holds an adapter.
    """
    folder = Path(directory).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter already: choose another folder")
    return folder


def most_frequent(stats: RoutingStats, top_k: int) -> dict[str, list[int]]:
    """The `top_k` experts that most tokens took, by layer, in ascending order."""
    return {
        layer.name: sorted(
            sorted(range(len(layer.expert_share)), key=lambda i: -layer.expert_share[i])[:top_k]
        )
        for layer in stats.layers
    }


def _active_adapter(model: nn.Module) -> tuple[str, ReMixConfig]:
    """Name and configuration of the one active ReMix adapter."""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{type(model).__name__} is no PEFT model: export takes what get_peft_model or "
            "PeftModel.from_pretrained returned (of a wrapped one, its .module)"
        )
    active = [name for name in model.active_adapters if name in model.peft_config]
    config = model.peft_config[active[0]] if len(active) == 1 else None
    if not isinstance(config, ReMixConfig):
        kinds = {name: str(model.peft_config[name].peft_type) for name in active}
        raise ValueError(
            f"the active adapters are {kinds}: activate one ReMix adapter with set_adapter"
        )
    return active[0], config


def _resolve(
    selection: Any, model: nn.Module, sites: Mapping[str, RoutingSite]
) -> dict[str, list[int]]:
    """The k experts of every site, in ascending order."""
    if isinstance(selection, str):
        if selection != MOST_FREQUENT:
            raise ValueError(
                f"selection={selection!r} is unknown; give {MOST_FREQUENT!r}, RoutingStats, or the "
                "experts of every linear by name"
            )
        selection = recorded_stats(model)
        if not selection.layers:
            raise ValueError(
                f"selection={MOST_FREQUENT!r} needs to know which experts are chosen: run your "
                "data through it in `with record_routing(model):` first, or give RoutingStats"
            )
    if isinstance(selection, RoutingStats):
        selection = most_frequent(selection, next(iter(sites.values())).top_k)
    missing = sorted(set(sites) - set(selection))
    unknown = sorted(set(selection) - set(sites))
    if missing or unknown:
        what, name = ("lacks", missing[0]) if missing else ("names unknown", unknown[0])
        raise ValueError(
            f"the selection {what} {name!r}; it must hold every routed linear of the model "
            f"({len(sites)}: {', '.join(list(sites)[:2])}, ...)"
        )
    chosen = {}
    for name, site in sites.items():
        index = _as_index(name, selection[name])
        check_forced(name, index, site.num_experts, site.top_k)
        if index.dim() != 1:
            raise ValueError(
                f"the selection for {name} is {list(index.shape)}; a LoRA holds one for all "
                f"tokens: [{site.top_k}]"
            )
        chosen[name] = sorted(index.tolist())
    return chosen


def _as_index(name: str, experts: Any) -> Tensor:
    """A selection as a tensor, whatever sequence it is."""
    try:
        return torch.as_tensor(experts)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the selection for {name} is {experts!r}; it must be the numbers of k experts"
        ) from None


def _experts(
    layers: Mapping[str, ReMixLayer],
    adapter: str,
    sites: Mapping[str, RoutingSite],
    chosen: Mapping[str, list[int]],
) -> dict[str, list[int]]:
    """The experts of every linear; those without a router have their block's."""
    leaders = {id(site.shared): name for name, site in sites.items() if site.shared is not None}
    experts = {}
    for name, layer in layers.items():
        site = layer.sites[adapter]
        leader = name if isinstance(site, RoutingSite) else leaders[id(site.shared)]
        experts[name] = chosen[leader]
    return experts


def _lora_tensors(
    state: Mapping[str, Tensor], experts: Mapping[str, list[int]]
) -> dict[str, Tensor]:
    """The tensors of PEFT's LoRA file, from those of ours."""
    tensors = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".remix_")
        if kind == "lora_A":  # [n, r, in] -> [k r, in]
            tensors[f"{name}.lora_A.weight"] = tensor[experts[name]].flatten(0, 1)
        elif kind == "lora_B":  # [n, out, r] -> [out, k r]
            side_by_side = tensor[experts[name]].transpose(0, 1).flatten(1)
            tensors[f"{name}.lora_B.weight"] = side_by_side
        elif kind != "router":
            tensors[key] = tensor
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _lora_config(config: ReMixConfig, adapter: str, layers: Mapping[str, ReMixLayer]) -> LoraConfig:
    """A LoRA of the same linears, of rank k r, with omega as its scaling."""
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        rank = ranks[name] = layer.top_k[adapter] * layer.r[adapter]
        alphas[name] = layer.scaling[adapter] * (math.sqrt(rank) if config.use_rslora else rank)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = config.lora_alpha
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=rank,
        rank_pattern={_short(name): own for name, own in ranks.items() if own != rank},
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number
        alpha_pattern={
            _short(name): own
            for name, own in alphas.items()
            if not math.isclose(own, alpha, rel_tol=1e-9)
        },
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        # By their whole names: the same linears, whatever chose them.
        target_modules=[_short(name) for name in layers],
        fan_in_fan_out=all(
            type(layer.get_base_layer()).__name__ == "Conv1D" for layer in layers.values()
        ),
        bias="lora_only" if config.bias == "remix_only" else config.bias,  # type: ignore[arg-type]
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
    )


def _auto_mapping(model: PeftModel) -> dict[str, str] | None:
    """The base model's class, as PEFT's own saving notes it where no task type tells."""
    if model.active_peft_config.task_type is not None:
        return None
    kind = type(model.get_base_model())
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _card(config: ReMixConfig, chosen: Mapping[str, list[int]]) -> str:
    base = config.base_model_name_or_path
    return _CARD.format(
        base=f"base_model: {json.dumps(str(base))}\n" if base else "",
        top_k=config.top_k,
        num_experts=config.num_experts,
        chosen="\n".join(f"- `{_short(name)}`: {experts}" for name, experts in chosen.items()),
    )


def _short(name: str) -> str:
    """A linear's name in the base model."""
    return name.removeprefix(_ROOT)

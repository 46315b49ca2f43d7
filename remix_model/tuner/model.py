"""`ReMixModel`: puts a `ReMixLayer` around every target linear of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn

from remix_model.granularity import SequencePass
from remix_model.parallel import CHECKPOINT_WRAPPER
from remix_model.site import RoutingSite
from remix_model.tuner.adapter_files import misfit
from remix_model.tuner.config import ReMixConfig
from remix_model.tuner.layer import CANNOT_ADD, CANNOT_MERGE, ReMixLayer, linear_features
from remix_model.tuner.loading import refuse_strays
from remix_model.tuner.mixed_batch import mixed_batch

_GATED = ["gate_proj", "up_proj", "down_proj"]
_TWO = ["fc1", "fc2"]
FEED_FORWARD_MODULES: dict[str, list[str]] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text",
            "smollm3", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2", "stablelm",
            "exaone4", "helium", "ministral", "seed_oss", "arcee", "hunyuan_v1_dense",
        ),
        _GATED,
    ),
    **dict.fromkeys(("phi", "opt", "xglm", "bart", "whisper"), _TWO),
    "phi3": ["gate_up_proj", "down_proj"],
    "glm": ["gate_up_proj", "down_proj"],
    "glm4": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "gpt_bigcode": ["c_fc", "mlp.c_proj"],
    "starcoder2": ["c_fc", "c_proj"],
    "gptj": ["fc_in", "fc_out"],
    "codegen": ["fc_in", "fc_out"],
    "gpt_neo": ["c_fc", "c_proj"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "bloom": ["dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["dense_h_to_4h", "dense_4h_to_h"],
    "t5": ["wi", "wi_0", "wi_1", "wo"],
}  # fmt: skip


class ReMixModel(BaseTuner):
    """A model whose target linears carry ReMix adapters. Made by `peft.get_peft_model`.

    Source: ReMix (arXiv 2603.10160) section 3.1.
    """

    prefix: str = "remix_"
    tuner_layer_cls = ReMixLayer
    target_module_mapping = FEED_FORWARD_MODULES

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, with errors that say which linears there are.

        Raises:
            ValueError: A name in target_modules or a number in layers_to_transform is not in the
                model, or nothing is left to adapt.
        """
        config: Any = self.peft_config[adapter_name]
        stacked = _stacked_names(model)
        fix = f"the linears of {type(model).__name__} are named {', '.join(_linear_names(model))}"
        if stacked:
            fix += f"; {', '.join(stacked)} hold all experts in one, which ReMix does not adapt"
        self._check_targets(model, config, fix)
        _check_layers(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            chosen = {
                name: getattr(config, name)
                for name in ("target_modules", "exclude_modules", "layers_to_transform")
                if getattr(config, name) is not None
            }
            raise NoMatchingPeftModuleError(f"{chosen} leaves nothing to adapt; {fix}") from error
        targets = config.target_modules if isinstance(config.target_modules, set) else ()
        left = [name for name in stacked if name.rpartition(".")[2] in targets]
        if left:
            warnings.warn(f"{', '.join(left)} are left alone: {fix}", stacklevel=2)
        self._connect(model, config, adapter_name)

    def _check_targets(self, model: nn.Module, config: Any, fix: str) -> None:
        """Raise ValueError when target_modules are neither given nor known, or not there."""
        model_type = self.get_model_config(model).get("model_type")
        known = FEED_FORWARD_MODULES.get(model_type or "", [])
        if config.target_modules is None and not known:
            raise ValueError(
                "Please specify `target_modules`: the feed-forward linears of model type "
                f"{model_type!r} are not known; {fix}"
            )
        if isinstance(config.target_modules, (set, list)):
            names = [name for name, _ in model.named_modules()]
            for target in sorted(set(config.target_modules) - set(known)):
                if not any(name == target or name.endswith(f".{target}") for name in names):
                    raise ValueError(f"target_modules names {target!r}, which is not there; {fix}")

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        if pattern in peft_config.rank_pattern:
            peft_config = copy(peft_config)
            peft_config.r = peft_config.rank_pattern[pattern]
        if isinstance(target, ReMixLayer):
            target.update_layer(adapter_name, peft_config)
            return
        try:
            layer = ReMixLayer(target, adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _connect(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Let the layers share what belongs to a model, or to a block of it.

        That is the flag by which the warning about untrained routers comes once, what a pass tells
        layers that route by sequence, and a block's router.
        """
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, ReMixLayer) and adapter_name in module.sites
        }
        if config.router_sharing == "block":
            _share_routers(layers, adapter_name)
        _check_whole_blocks(model, layers, adapter_name)
        warned = [False]
        known = [layer.sequence_pass for layer in layers.values()]
        sequence_pass = next((one for one in known if one is not None), None)
        if sequence_pass is None and config.routing_granularity == "sequence":
            sequence_pass = SequencePass()
            sequence_pass.watch(model)
        for name, layer in layers.items():
            layer.sequence_pass = sequence_pass
            for site in layer.sites.values():
                if isinstance(site, RoutingSite):
                    site.name = site.name or name
                    site.warned = warned
                    site.sequence_pass = sequence_pass if site.per_sequence else None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around every forward pass and generate()."""
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else mixed_batch(self.model, names, kwargs):
            yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: see CANNOT_ADD."""
        raise ValueError(CANNOT_ADD)

    def activated_parameters(self) -> int:
        """Adapter parameters that one token passes through: k of n LoRAs, and the routers."""
        total = 0
        for module in self.model.modules():
            if not isinstance(module, ReMixLayer):
                continue
            for name in (name for name in module.active_adapters if name in module.sites):
                for stacked in (module.remix_lora_A[name], module.remix_lora_B[name]):
                    # One A may be all experts'.
                    total += stacked[0].numel() * min(module.top_k[name], len(stacked))
                if name in module.remix_router:
                    total += module.remix_router[name].numel()
        return total

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """PEFT's, also of a model whose blocks FSDP's activation checkpointing has wrapped.

        The wrapper is in the modules' names and not in the state's, and PEFT would find nothing.
        """
        wrapped = {
            name.replace(CHECKPOINT_WRAPPER, ""): name for name, _ in model.named_parameters()
        }
        found = super()._get_adapter_state_dict(
            model,
            config,
            adapter_name,
            {wrapped.get(key, key): value for key, value in state_dict.items()},
            unwanted_adapter_names,
        )
        return {key.replace(CHECKPOINT_WRAPPER, ""): value for key, value in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        names = {  # which PEFT does not find in wrapped blocks either
            cls._remove_adapter_name_from_key(key, adapter_name): key
            for key in _adapter_shapes(model, cls.prefix, adapter_name)
        }
        remapped = {names.get(key, key): value for key, value in remapped.items()}
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
        refuse_strays(model, remapped, (f".{cls.prefix}", *biases))
        _check_loaded(model, config, remapped, cls.prefix, adapter_name)
        return remapped


def _check_layers(model: nn.Module, config: Any) -> None:
    """Raise ValueError for a number in layers_to_transform that no module's name has."""
    wanted = config.layers_to_transform
    numbers = {part for name, _ in model.named_modules() for part in name.split(".")}
    for number in [wanted] if isinstance(wanted, int) else wanted or ():
        if str(number) not in numbers:
            raise ValueError(
                f"layers_to_transform names layer {number}, and {type(model).__name__} has none "
                "of that number; the first is 0"
            )


def _share_routers(layers: dict[str, ReMixLayer], adapter_name: str) -> None:
    """The first layer of every parent module keeps its router; the others follow it."""
    leaders: dict[str, str] = {}
    for name, layer in layers.items():
        leader = leaders.setdefault(name.rpartition(".")[0], name)
        if leader != name and isinstance(layer.sites[adapter_name], RoutingSite):
            layer.follow(adapter_name, name, layers[leader], leader)


def _check_whole_blocks(model: nn.Module, layers: dict[str, ReMixLayer], adapter_name: str) -> None:
    """Raise ValueError where experts are to be whole blocks and not all of a block is adapted."""
    for name, layer in layers.items():
        site = layer.sites[adapter_name]
        if not (site.whole_blocks and isinstance(site, RoutingSite)):
            continue
        parent = name.rpartition(".")[0]
        children = dict(model.get_submodule(parent).named_children())
        left = [
            child
            for child, module in children.items()
            if (f"{parent}.{child}" if parent else child) not in layers  # of this adapter
            and (isinstance(module, ReMixLayer) or _is_linear(module))
        ]
        if left or site.shared is None:
            missing = f"{', '.join(left)} is not adapted" if left else "it has one linear"
            raise ValueError(
                f"router_type='{site.router.name}' mixes whole feed-forward blocks, and of "
                f"{parent or 'the model'} {missing}: name all of a block's linears in "
                "target_modules"
            )


def _is_linear(module: nn.Module) -> bool:
    try:
        linear_features(module)
    except ValueError:
        return False
    return True


def _linear_names(model: nn.Module) -> list[str]:
    """The last names of the model's linears, each once, in the model's order."""
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        names[name.rsplit(".", 1)[-1] if "base_layer" not in name else name.split(".")[-2]] = None
    return list(names)


def _stacked_names(model: nn.Module) -> list[str]:
    """The last two names of the parameters that hold the matrices of several experts."""
    names = (
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and ".experts." in name
    )
    return list(dict.fromkeys(names))


def replace_weights(
    model: nn.Module, config: ReMixConfig, loaded: dict[str, torch.Tensor], adapter_name: str
) -> None:
    """Copy another adapter's weights, keys as in model.state_dict(), over those of `adapter_name`.

    Raises:
        ValueError: They do not fit, or are not all the adapter's own.
    """
    _check_loaded(model, config, loaded, ReMixModel.prefix, adapter_name)
    others = [key for key in loaded if f".{ReMixModel.prefix}" not in key]
    if others:
        raise ValueError(
            f"only routed adapters are exchanged in place, and this one holds {others[0]} too: use "
            "load_adapter, under another name"
        )
    damaged = [key for key, tensor in loaded.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise ValueError(f"{damaged[0]} holds numbers that are not finite")
    with torch.no_grad():
        for key, tensor in loaded.items():
            model.get_parameter(key).copy_(tensor)


def _adapter_shapes(model: nn.Module, prefix: str, adapter_name: str) -> dict[str, torch.Size]:
    """The shapes of an adapter's weights, by their names in the model's state."""
    return {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if f".{prefix}" in key and key.endswith(f".{adapter_name}")
    }


def _check_loaded(
    model: nn.Module,
    config: ReMixConfig,
    loaded: dict[str, torch.Tensor],
    prefix: str,
    adapter_name: str,
) -> None:
    """Raise ValueError when adapter weights are missing, unknown or misshapen here."""
    expected = _adapter_shapes(model, prefix, adapter_name)
    found = {key: tensor.shape for key, tensor in loaded.items() if f".{prefix}" in key}
    trained_on, here = str(config.base_model_name_or_path), str(getattr(model, "name_or_path", ""))
    fix = f"the adapter was trained for base model {trained_on!r}; load that one"
    if trained_on == here:
        fix = "its adapter_config.json and its weights do not belong together"
    elif here and Path(trained_on).name != Path(here).name:
        warnings.warn(
            f"the adapter was trained on {trained_on!r} and is loaded on {here!r}; its results "
            "mean nothing unless the two are the same model",
            stacklevel=2,
        )
    difference = misfit(expected, found)
    if difference:
        raise ValueError(f"the adapter {difference}: {fix}")

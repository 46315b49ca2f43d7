"""`remix validate --adapter`: a saved adapter's files, checked without loading its base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open

from remix_cli.display import console, print_facts
from remix_cli.prepare import adapter_config, adapter_folder, skeleton
from remix_model import ReMixConfig
from remix_model.models import load_config
from remix_model.site import RoutedModule
from remix_model.tuner.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Shapes,
    check_fit,
    check_weights,
    misfit,
)
from remix_model.tuner.loading import named, refuse_strays


def check_adapter(place: str, overrides: Mapping[str, Any]) -> None:
    """Check a saved adapter and print what it is.

    Its files are read, its base model's configuration is, and shapes are compared on the meta
    device; nothing is loaded or changed.

    Args:
        place: Its folder.
        overrides: Options that were given; `model` names another base model.

    Raises:
        ValueError: A file is damaged, missing, or does not fit the others or the base model.
        OSError: The base model's configuration cannot be read.
    """
    folder = adapter_folder(place, routed=True)
    with named(folder):
        adapter = ReMixConfig.from_pretrained(str(folder))
        weights = folder / WEIGHTS_NAME
        shapes = check_weights(weights)
        check_fit(adapter, shapes, str(folder))
        config = adapter_config(folder, overrides)
        base = load_config(config.model, trust_remote_code=config.trust_remote_code)
        model = skeleton(config, base, adapter, torch.float32)
        _check_shapes(model, shapes, weights, config.model)
    linears = [name for name, part in model.named_modules() if isinstance(part, RoutedModule)]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
    print_facts(
        f"Adapter: {folder}",
        [
            ("base model", config.model),
            ("method", adapter.router_type),
            ("mixture", f"n={adapter.num_experts}, k={adapter.top_k}, r={adapter.r}"),
            ("adapted linears", f"{len(linears)} ({', '.join(kinds)})"),
            ("tensors", len(shapes)),
            ("parameters", sum(torch.Size(shape).numel() for shape in shapes.values())),
            ("activated parameters", model.base_model.activated_parameters()),
            ("size (MiB)", round(weights.stat().st_size / 2**20, 1)),
        ],
    )
    if _is_untrained(weights, shapes):
        console.print("every B is zero: the adapter changes nothing, it was not trained")
    console.print("the adapter is sound and fits its base model; nothing was changed")


def _check_shapes(model: Any, shapes: Shapes, weights: Path, base: str) -> None:
    """Raise ValueError unless these are the weights that an adapter of this model has."""
    wanted: Shapes = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    fix = f"give the base model that it was trained on with --model, or mend {CONFIG_NAME}"
    try:
        refuse_strays(model, shapes.keys() - wanted.keys(), ())
    except ValueError as error:
        raise ValueError(f"{weights} does not fit {base!r}: {error}; {fix}") from None
    trained = {name: shape for name, shape in shapes.items() if name in wanted}
    difference = misfit(wanted, trained)
    if difference:
        raise ValueError(f"{weights} does not fit {base!r}: it {difference}; {fix}")


def _is_untrained(weights: Path, shapes: Shapes) -> bool:
    """Whether all B are zero."""
    with safe_open(weights, framework="pt") as file:
        return not any(
            bool(file.get_tensor(name).any()) for name in shapes if name.endswith("remix_lora_B")
        )

"""Files of PEFT's own adapters: read with the checks that ReMix's have, and complete.

PEFT loads what a file happens to hold and only warns of the rest; here an adapter is loaded when
its weights are exactly those that its configuration describes, and no tensor is made before that
is known. PEFT saves an X-LoRA without its classifier (the LoRAs are named "0", "1", ..., and so are
the classifier's layers, which it takes for theirs): `adapter_state` has it.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from remix_model.tuner.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Shapes,
    check_weights,
    misfit,
    read_config,
)
from remix_model.tuner.loading import weights_file

PROMPT_ENCODER = "prompt_encoder.safetensors"
_CLASSIFIER = "internal_xlora_classifier"
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def add_adapter(base: Any, config: PeftConfig) -> PeftModel:
    """Put a new adapter on a model, which is changed; the configuration is not.

    Raises:
        ValueError: It does not fit the model.
    """
    if config.peft_type == PeftType.XLORA:
        base.config.use_cache = False  # every token takes two passes, and PEFT refuses a cache
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*for MLP")  # a P-tuning option we do not set
        warnings.filterwarnings("ignore", message=".*copying from a non-meta")
        try:
            return get_peft_model(base, copy.deepcopy(config))
        except RuntimeError as error:
            if config.peft_type != PeftType.XLORA:
                raise
            raise ValueError(f"X-LoRA's LoRAs do not fit the model: {error}") from error


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Inside, a PEFT model is its base model.

    Of learned prompts, PEFT's own `disable_adapter` exchanges the model's forward, and what a
    trainer has put around it meanwhile, mixed precision for one, is gone when it is left.
    """
    config, name = model.active_peft_config, model.active_adapter
    if not config.is_prompt_learning:
        with model.disable_adapter():
            yield
        return
    model.peft_config[name] = PeftConfig(task_type=config.task_type)
    try:
        yield
    finally:
        model.peft_config[name] = config


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return what an adapter's file holds, by name, for all but learned prompts."""
    if model.active_peft_config.peft_type == PeftType.XLORA:
        return {key: value for key, value in model.state_dict().items() if _CLASSIFIER in key}
    return get_peft_model_state_dict(model)


def complete_files(model: Any, folder: Path, *, resumable: bool) -> None:
    """Add to a folder in which PEFT has just saved a model what it leaves out.

    That is X-LoRA's classifier, and what makes P-tuning's prompt: an adapter has only the prompt.

    Args:
        model: The PEFT model.
        folder: Where it was saved. Copies of X-LoRA's LoRAs go: they stay where they were.
        resumable: Training is to go on from here, and needs what makes the prompt.
    """
    kind = model.active_peft_config.peft_type
    if kind == PeftType.XLORA:
        save_file(adapter_state(model), folder / WEIGHTS_NAME)
        for name in model.active_peft_config.adapters:
            shutil.rmtree(folder / name, ignore_errors=True)
    elif kind == PeftType.P_TUNING and resumable:
        save_file(model.prompt_encoder.state_dict(), folder / PROMPT_ENCODER)


def load_what_trains(model: Any, folder: Path) -> bool:
    """Load what `complete_files` has added; return whether there is nothing else to load.

    Raises:
        ValueError: It is missing, or another model's.
    """
    names = {PeftType.XLORA: WEIGHTS_NAME, PeftType.P_TUNING: PROMPT_ENCODER}
    kind = model.active_peft_config.peft_type
    if kind not in names:
        return False
    path = folder / names[kind]
    part = model if kind == PeftType.XLORA else model.prompt_encoder
    wanted = adapter_state(model) if kind == PeftType.XLORA else part.state_dict()
    found = check_weights(path)
    if found != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        raise ValueError(f"{path} holds other weights than this model trains: start the run again")
    part.load_state_dict(load_file(path), strict=False)
    return True


def load_peft_adapter(base: Any, folder: Path) -> PeftModel:
    """Load one of PEFT's own adapters from a local folder, for inference.

    Args:
        base: The model that it was trained on; it is changed.
        folder: As PEFT wrote it, with weights in safetensors.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: A file is missing or damaged, holds numbers that are not finite, or the weights
            are not those that the configuration describes for this model.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        shapes = check_weights(weights_file(folder, {}))
        _check_shapes(_expected(base, config, shapes), shapes, config)
        if config.peft_type == PeftType.XLORA:
            base.config.use_cache = False
        return PeftModel.from_pretrained(base, str(folder), config=config).eval()
    except _DAMAGE as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the adapter {folder} cannot be loaded: {kind}{error}") from error


def method_of(folder: Path) -> str | None:
    """Return the method, as `remix train --method` names it, that made an adapter; None: unknown.

    Raises:
        ValueError: Its configuration cannot be read.
    """
    saved = read_config(folder / CONFIG_NAME)
    kind = saved.get("peft_type")
    if kind == "LORA":
        return "dora" if saved.get("use_dora") else "rslora" if saved.get("use_rslora") else "lora"
    if kind == "REMIX":
        return str(saved.get("router_type", "remix"))
    names = {
        "IA3": "ia3",
        "PREFIX_TUNING": "prefix",
        "PROMPT_TUNING": "prompt",
        "P_TUNING": "ptuning",
        "VBLORA": "vblora",
        "XLORA": "xlora",
    }
    return names.get(kind) if isinstance(kind, str) else None


def _expected(base: Any, config: Any, shapes: Shapes) -> Shapes:
    """The shapes of the adapter's weights, from a model without memory."""
    if config.peft_type == PeftType.XLORA:
        _check_experts(config, shapes)
    with torch.device("meta"):
        model = add_adapter(type(base)(copy.deepcopy(base.config)), config)
    if config.is_prompt_learning:
        encoder: Any = model.prompt_encoder
        return {"prompt_embeddings": tuple(encoder["default"].embedding.weight.shape)}
    return {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}


def _check_experts(config: Any, shapes: Shapes) -> None:
    """Raise ValueError unless an X-LoRA's LoRAs are local, sound, and as many as it mixes."""
    from remix_model.from_lora import read_lora

    folders = config.adapters
    if not isinstance(folders, dict) or not all(isinstance(f, str) for f in folders.values()):
        raise ValueError(f"adapters={folders!r} must name the folders of the LoRAs")
    for folder in folders.values():
        read_lora(folder)
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    if config.xlora_depth > max(len(shapes), 1) or (
        config.xlora_depth > 1 and config.xlora_size > widest
    ):
        raise ValueError(
            f"xlora_depth={config.xlora_depth}, xlora_size={config.xlora_size} and the weights do "
            "not belong together"
        )


def _check_shapes(expected: Shapes, found: Shapes, config: Any) -> None:
    trained_on = config.base_model_name_or_path
    fix = f"load it on the model that it was trained on ({trained_on}), or copy it again"
    difference = misfit(expected, found)
    if difference:
        raise ValueError(f"it {difference}: {fix}")

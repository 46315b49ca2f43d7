"""An adapter's two files, checked before anything is built from them.

A file that was cut off, altered, or made to do harm is refused with its name and what is wrong with
it. Nothing in it is executed, and no tensor is made from a number in `adapter_config.json` that the
weights do not bear out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from remix_model.tuner.config import PEFT_TYPE, ReMixConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 2**24  # a real one has a few thousand
_DTYPES = ("F64", "F32", "F16", "BF16")

Shapes = dict[str, tuple[int, ...]]


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read an adapter_config.json.

    Raises:
        ValueError: It is no JSON object; or, of a ReMix adapter, it names a key twice or holds a
            number that JSON does not have.
    """
    if os.path.getsize(path) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes: it is no adapter's")
    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in values if names.count(name) > 1)
            problems.append(f"sets {twice!r} more than once")
        return values

    def constant(name: str) -> float:
        problems.append(f"holds {name}, which is no JSON number")
        return float(name)

    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    if problems and values.get("peft_type") == PEFT_TYPE:
        raise ValueError(f"{path} {problems[0]}")
    return values


def check_weights(path: str | os.PathLike) -> Shapes:
    """Read an adapter's weights, one tensor at a time, and return their shapes by name.

    Raises:
        ValueError: The file is no safetensors file of floating-point numbers, all of them finite.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: copy it again")
    shapes: Shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                stored = file.get_slice(name)
                if stored.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{path}: {name} is {stored.get_dtype()}; adapters hold one of "
                        f"{', '.join(_DTYPES)}"
                    )
                if not bool(file.get_tensor(name).isfinite().all()):
                    raise ValueError(f"{path}: {name} holds numbers that are not finite")
                shapes[name] = tuple(stored.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); the file is truncated or damaged: "
            "copy it again"
        ) from error
    return shapes


def misfit(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> str:
    """How an adapter's tensors differ from those that a model has: what "the adapter ..." does.

    Args:
        expected: The model's, shapes by name.
        found: The adapter's.

    Returns:
        The first difference; empty where there is none.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        kind, name = ("lacks", missing[0]) if missing else ("holds unknown", unknown[0])
        return f"{kind} {name} ({len(missing)} tensors missing, {len(unknown)} unknown)"
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            return f"holds {name} as {list(found[name])}, which needs to be {list(shape)}"
    return ""


def check_fit(config: ReMixConfig, shapes: Shapes, folder: str) -> None:
    """Raise ValueError unless the weights are of the pools that the configuration describes.

    Args:
        config: The adapter's.
        shapes: Of its weights, by name.
        folder: Where both are from, for the message.
    """
    for name, shape in shapes.items():
        wanted = _pool_shape(name.rpartition(".")[2], shape, config)
        if wanted is not None and wanted != shape:
            raise ValueError(
                f"{folder}: {name} is {list(shape)} and {CONFIG_NAME} describes {list(wanted)}; "
                "its adapter_config.json and its weights do not belong together"
            )


def _pool_shape(kind: str, shape: tuple[int, ...], config: ReMixConfig) -> tuple[int, ...] | None:
    """What n and r of the configuration make of a pool's tensor; None where they do not say."""
    n = config.num_experts
    known = {config.r, *(getattr(config, "rank_pattern", None) or {}).values()}
    if kind == "remix_lora_A":
        r = shape[1] if len(shape) == 3 and shape[1] in known else config.r
        return (1 if shape[:1] == (1,) else n, r, *shape[2:3])
    if kind == "remix_lora_B":
        r = shape[2] if len(shape) == 3 and shape[2] in known else config.r
        return (n, *shape[1:2], r)
    return None

"""Types of a configuration's fields, which a file may hold anything in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def check_fields(config: Any) -> None:
    """Raise ValueError unless the fields that say what is adapted are of their types.

    Args:
        config: A `ReMixConfig`.
    """
    for name, (is_right, wanted) in _FIELDS.items():
        value = getattr(config, name)
        if not is_right(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are(value: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple, set)) and all(map(is_one, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


_Check = tuple[Callable[[Any], bool], str]
_NAME: _Check = (_is_name, "a name, or None")
_FIELDS: dict[str, _Check] = {
    "base_model_name_or_path": _NAME,
    "revision": _NAME,
    "auto_mapping": (lambda v: v is None or isinstance(v, dict), "a mapping, or None"),
    "inference_mode": (lambda v: isinstance(v, bool), "True or False"),
    "layers_to_transform": (
        lambda v: v is None or _is_index(v) or _are(v, _is_index),
        "the index of a layer, or a list of them",
    ),
    "layers_pattern": (
        lambda v: v is None or _is_pattern(v) or _are(v, _is_pattern),
        "a regular expression, or a list of them",
    ),
    "modules_to_save": (lambda v: v is None or _are(v, _is_text), "a list of names"),
    "trainable_token_indices": (
        lambda v: (
            v is None
            or _are(v, _is_index)
            or (
                isinstance(v, dict)
                and _are(list(v), _is_text)
                and all(_are(indices, _is_index) for indices in v.values())
            )
        ),
        "a list of token indices, or one for each embedding's name",
    ),
    "router_kwargs": (lambda v: isinstance(v, dict), "a mapping"),
}

"""Values from a file or a flag, as the types of the options that they are for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin


def convert(
    key: str, value: Any, kinds: Sequence[Any], *, optional: bool, limits: Mapping[str, Any]
) -> Any:
    """Return a value as one of an option's types.

    Args:
        key: The option's name, for messages.
        value: From YAML, or from a flag.
        kinds: The types, the preferred one first.
        optional: Whether None is a value too.
        limits: "choices", "minimum" and "maximum", each may be None.

    Raises:
        ValueError: It is of another type, out of the limits, or not one of the choices.
    """
    if value is None and optional:
        return None
    for kind in kinds:
        converted = _convert(kind, value)
        if converted is not None:
            value = converted
            break
    else:
        expected = " or ".join(_kind_name(kind) for kind in kinds)
        if optional:
            expected += " or null"
        raise ValueError(f"{key} must be {expected}, got {value!r}")
    choices, minimum, maximum = (limits[name] for name in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise ValueError(one_of(key, value, choices))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{key} must be at least {minimum}, got {value!r}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{key} must be at most {maximum}, got {value!r}")
    return value


def one_of(key: str, value: Any, choices: Sequence[str]) -> str:
    """Return what to say of a value that is not one of the choices."""
    return f"{key} must be one of {', '.join(choices)}, got {value!r}{closest(str(value), choices)}"


def closest(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of words, or nothing.

    A slip of the finger comes first, then a word that holds this one (as with `--batch-size`),
    then what is like it.
    """
    words = list(words)
    part = word.strip("-")
    matches = (
        difflib.get_close_matches(word, words, n=1, cutoff=0.8)
        or [longer for longer in words if len(part) > 2 and part in longer]
        or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    )
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _convert(kind: Any, value: Any) -> Any:
    """Return value as kind where that loses nothing, else None."""
    if get_origin(kind) is Sequence:
        (inner,) = get_args(kind)
        if not isinstance(value, list) or not value:
            return None
        items = [_convert(inner, item) for item in value]
        return None if None in items else items
    if get_origin(kind) is Mapping:
        named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        return value if named else None
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
    if get_origin(kind) is Mapping:
        return "a mapping from names"
    if get_origin(kind) is Sequence:
        return "a list of " + {str: "names", int: "whole numbers"}[get_args(kind)[0]]
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]

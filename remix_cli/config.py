"""The run's configuration: a YAML file and flags over the defaults, checked key by key.

Flags win over the file, the file over the defaults. `options` has the options themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remix_cli.options import (
    FIELDS,
    PATHS,
    RunConfig,
    check_value,
    has_option,
    methods_with,
    option_fields,
    option_types,
    settle_method,
)
from remix_cli.values import closest

__all__ = [
    "RunConfig", "absolute_path", "build_config", "check_value", "closest", "has_option",
    "option_fields", "option_types", "read_yaml", "write_text", "write_yaml",
]  # fmt: skip

CONFIG_HEADER = "# Written by `remix train`: the configuration of the run in this folder.\n"


def build_config(
    overrides: Mapping[str, Any],
    file: str | Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge a base, a YAML file and overrides, the later ones winning, into a configuration.

    Raises:
        ValueError: An unknown key, a value of the wrong type, or an option that the method does not
            have: with the key and what would be right.
        OSError: The file cannot be read.
    """
    values, _ = merge(overrides, {} if file is None else read_yaml(file), base, place=file)
    return RunConfig(**{**(base or {}), **values})


def merge(
    overrides: Mapping[str, Any],
    in_file: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    place: str | Path | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Put flags over what a file says, and look whether the method has all these options.

    A flag that names another method than the file's switches with one word: what the file says of
    options that only its own method has is left out.

    Args:
        overrides: Of the flags.
        in_file: Of the file.
        base: What both are put over, for its method.
        place: The file, for messages.

    Returns:
        (the options that are given, the names that were left out).

    Raises:
        ValueError: The method is unknown, or does not have an option.
    """
    names = ("method", "router_type")
    chosen = next(
        (values for values in (overrides, in_file, base or {}) if any(n in values for n in names)),
        {},
    )
    method, files_own = _method(chosen), _method(in_file)
    for name in overrides:
        if not has_option(method, name):
            raise ValueError(_no_option(method, name))
    left_out = [name for name in in_file if not has_option(method, name)]
    if left_out and method == files_own:
        raise ValueError(f"{place}: {_no_option(method, left_out[0])}")
    unwanted = set(left_out) if chosen is in_file else {*left_out, *names}
    kept = {name: value for name, value in in_file.items() if name not in unwanted}
    if ("rank" in kept or "rank" in overrides) and ("r" in overrides or "top_k" in overrides):
        raise ValueError("rank, and r or top_k, which it would be the product of: give one of them")
    return {**kept, **overrides}, left_out


def _method(values: Mapping[str, Any]) -> str:
    return settle_method(values.get("method", "remix"), values.get("router_type", "remix"))


def _no_option(method: str, name: str) -> str:
    """Return that a method has no such option, and which have."""
    return f"method={method} has no option {name}: leave it out, or choose {methods_with(name)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file and check its keys and types.

    Raises:
        ValueError: It is not a mapping, or has an unknown key or a value of the wrong type.
        OSError: It cannot be read.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}: check the path")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = None if node is None else yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise ValueError(f"{path} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    names = [key.value for key, _ in node.value]  # type: ignore[union-attr]
    for key in values:
        if names.count(str(key)) > 1:
            raise ValueError(f"{path} sets {key!r} more than once: keep one of the lines")
        if key not in FIELDS:
            hint = closest(str(key).replace("-", "_"), FIELDS)
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
    try:
        return {key: check_value(key, value) for key, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def absolute_path(key: str, value: Any) -> Any:
    """Return a path among the values as an absolute one: a run is used from other folders too."""
    if key in PATHS and isinstance(value, list):
        return [absolute_path(key, item) for item in value]
    if key not in PATHS or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if not path.exists():
        return value
    path = path.absolute()
    return str(path.parent.resolve() / path.name)  # the name of a link tells a file's format


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write a configuration as `read_yaml` reads it, without what only this start meant."""
    import yaml

    values = {
        key: absolute_path(key, value)
        for key, value in config.values().items()
        if key not in ("overwrite", "resume")
    }

    class Dumper(yaml.SafeDumper):
        """Writes text with line breaks on one line, as people do."""

    Dumper.add_representer(
        str,
        lambda dumper, text: dumper.represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
        ),
    )
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, width=1000)
    write_text(CONFIG_HEADER + text, path)


def write_text(text: str, path: Path) -> None:
    """Write under a temporary name and rename it, so that readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)

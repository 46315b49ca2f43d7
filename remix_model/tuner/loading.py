"""Every door by which PEFT and transformers load an adapter, with a guard before it.

The guard reads and checks the files first (`adapter_files`), lets no layer be made that the weights
do not bear out, names the adapter in every error, and takes an adapter that could not be loaded
out of the model again.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

from remix_model.tuner.adapter_files import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    Shapes,
    check_fit,
    check_weights,
    read_config,
)
from remix_model.tuner.config import PEFT_TYPE, ReMixConfig

_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_loading: ContextVar[Shapes | None] = ContextVar("_loading", default=None)


def check_stored(config: ReMixConfig, *shapes: tuple[int | None, ...]) -> None:
    """Before a layer makes tensors: refuse a shape that the file which is being loaded has not.

    Args:
        config: The adapter's.
        shapes: Of the layer's A and B, and of its router's parameter; None stands for any size.

    Raises:
        ValueError: An adapter is being loaded and has no tensor of such a shape.
    """
    stored = _loading.get()
    if stored is None:
        return
    for shape in shapes:
        if not any(_matches(shape, other) for other in stored.values()):
            wanted = ["any" if size is None else size for size in shape]
            raise ValueError(
                f"this model needs adapter weights of {wanted}, and the file has none: the "
                f"adapter was trained for base model {config.base_model_name_or_path!r}; load "
                "that one"
            )


def _matches(shape: tuple[int | None, ...], other: tuple[int, ...]) -> bool:
    sizes = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(a is None or a == b for a, b in sizes)


def refuse_strays(model: Any, names: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise ValueError for weights that would be lost, or would replace the base model's own.

    Args:
        model: With the adapter's layers in it.
        names: Of the weights to be loaded, as the model names them.
        known: What stands in the names of weights that are the adapter's.
    """
    shared = []
    for kind in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # not every model has them
            shared.append(getattr(model, f"get_{kind}_embeddings")())
    embeddings = [f"{name}." for name, part in model.named_modules() if part in shared]
    known = (*known, ".modules_to_save.", ".token_adapter.", *embeddings)
    strays = sorted(name for name in names if not any(part in name for part in known))
    if _loading.get() is None:  # a state that the caller holds: biases as PEFT takes them
        strays = [name for name in strays if not name.endswith("bias")]
    if strays:
        raise ValueError(
            f"the adapter holds unknown {strays[0]} ({len(strays)} tensors): they are not weights "
            "that an adapter of this configuration trains"
        )


def guard_doors() -> None:
    """Put the guard before PEFT's and transformers' ways to load an adapter."""
    from peft import PeftConfig, PeftModel
    from transformers.integrations.peft import PeftAdapterMixin
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    # Each has a copy of the method, not the method itself.
    for auto_class in _BaseAutoModelClass.__subclasses__():
        if "from_pretrained" in vars(auto_class):
            _put_before(auto_class, "from_pretrained", _configured)
    _put_before(PeftConfig, "from_json_file", _strictly)
    _put_before(PeftConfig, "from_pretrained", _naming_place)
    _put_before(PeftModel, "from_pretrained", partial(_guarded, names=("model_id", "config")))
    _put_before(PeftModel, "load_adapter", partial(_guarded, names=("model_id", "")))
    names = ("peft_model_id", "peft_config")
    _put_before(PeftAdapterMixin, "load_adapter", partial(_guarded, names=names))


def _put_before(owner: type, name: str, guard: Callable[..., Any]) -> None:
    """Replace a method, or class method, by a guarded one."""
    method = inspect.getattr_static(owner, name)
    if isinstance(method, classmethod):
        setattr(owner, name, classmethod(guard(method.__func__)))
    else:
        setattr(owner, name, guard(method))


def _strictly(read: Callable[..., Any]) -> Callable[..., Any]:
    """Around `PeftConfig.from_json_file`."""

    @functools.wraps(read)
    def read_strictly(cls: Any, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = read_config(path_json_file).get("peft_type")
        known = isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING
        if cls is PeftConfig and not known:
            raise ValueError(
                f"{path_json_file} describes an adapter of type {kind!r}, which PEFT does not know"
            )
        result: dict[str, Any] = read(cls, path_json_file, **kwargs)
        return result

    return read_strictly


def _configured(load: Callable[..., Any]) -> Callable[..., Any]:
    """Around the auto classes' `from_pretrained`, which reads an adapter's configuration itself.

    What comes after, its base model found and loaded, is `load_adapter`, with a guard of its own.
    """

    @functools.wraps(load)
    def load_configured(cls: Any, place: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.fspath(place)
        path = os.path.join(folder, CONFIG_NAME)
        if os.path.isfile(path) and not os.path.exists(os.path.join(folder, "config.json")):
            with named(place):
                values = read_config(path)
                if values.get("peft_type") == PEFT_TYPE:
                    ReMixConfig.from_pretrained(folder)
        return load(cls, place, *args, **kwargs)

    return load_configured


def _naming_place(read: Callable[..., Any]) -> Callable[..., Any]:
    """Around `PeftConfig.from_pretrained`: errors of a ReMix configuration say where it is."""

    @functools.wraps(read)
    def read_naming_place(
        cls: Any, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> Any:
        place = pretrained_model_name_or_path
        if cls is not ReMixConfig and not _is_ours(place, {"subfolder": None, **kwargs}):
            return read(cls, place, *args, **kwargs)
        with named(place):
            return read(cls, place, *args, **kwargs)

    return read_naming_place


def _guarded(load: Callable[..., Any], names: tuple[str, str]) -> Callable[..., Any]:
    """Around a method that loads an adapter.

    Args:
        load: The method.
        names: Of its arguments with the folder or hub id, and with the configuration, if any.
    """
    place_name, config_name = names
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_guarded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        place, name = given.get(place_name), given.get("adapter_name") or "default"
        options = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        model = given.get("self", given.get("model"))
        config = given.get(config_name) or _adapters(model).get(name)
        ours = isinstance(config, ReMixConfig) or (config is None and _is_ours(place, options))
        if place is None or not ours or _loading.get() is not None:
            return load(*args, **kwargs)
        with named(place), _taken_back(model, name), _checked(place, options, config):
            result = load(*args, **kwargs)
            _require_all(result, name)
        return result

    return load_guarded


@contextmanager
def named(place: Any) -> Iterator[None]:
    """Have errors say which adapter it is."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, ValueError) and str(place) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the adapter {place} cannot be loaded: {kind}{error}") from error


@contextmanager
def _taken_back(model: Any, name: str) -> Iterator[None]:
    """Leave no adapter in the model whose weights did not come."""
    before = set(_adapters(model))
    try:
        yield
    except Exception:
        with suppress(Exception):  # the first error is the one to tell
            if name in _adapters(model) and not before:
                _unwrap(model)
            elif name in set(_adapters(model)) - before:
                model.delete_adapter(name)
        raise


def _unwrap(model: Any) -> None:
    """Take a first adapter's layers out of a model again."""
    from remix_model.tuner.layer import ReMixLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, ReMixLayer)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    if "peft_config" in model.__dict__:
        del model.peft_config


@contextmanager
def _checked(place: Any, options: Mapping[str, Any], config: ReMixConfig | None) -> Iterator[None]:
    """Check an adapter's files; inside, only layers that its weights bear out are made."""
    path = weights_file(place, options)
    if config is None:
        config = ReMixConfig.from_pretrained(place, **_hub_options(options))
    shapes = check_weights(path)
    check_fit(config, shapes, str(place))
    token = _loading.set(shapes)
    try:
        yield
    finally:
        _loading.reset(token)


def weights_file(place: Any, options: Mapping[str, Any]) -> str:
    """The file with an adapter's weights.

    Args:
        place: Its folder, or its id on the hub.
        options: Of `from_pretrained`.

    Raises:
        ValueError: There is none, or only a pickle.
    """
    path = _file(place, WEIGHTS_NAME, options)
    if path is not None:
        return path
    if _file(place, PICKLE_NAME, options) is not None:
        raise ValueError(
            f"{place} holds {PICKLE_NAME}, a pickle that can run code when read; ReMix "
            f"adapters are only read from {WEIGHTS_NAME}: save the adapter again with "
            "safe_serialization=True"
        )
    raise ValueError(f"{place} holds no {WEIGHTS_NAME}: is it an adapter's folder?")


def _adapters(model: Any) -> Mapping[str, Any]:
    """The configurations of the adapters in a model."""
    return getattr(model, "peft_config", None) or {}


def _require_all(result: Any, adapter_name: str) -> None:
    """Raise ValueError when transformers, which only logs it, missed weights or did not know some.

    Args:
        result: What a door gave back: PEFT's refuse by themselves.
        adapter_name: Whose weights; others' and the base model's may be named too.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        found = getattr(result, f"{kind}_keys", None)
        found = found if isinstance(found, (set, list)) else ()
        names = [str(key) for key in found]
        if kind == "missing":
            names = [key for key in names if _is_of(key, adapter_name)]
        if names:
            raise ValueError(f"{len(names)} tensors are {kind}, {min(names)} for one")


def _is_of(key: str, adapter_name: str) -> bool:
    """Whether a weight is that adapter's own."""
    own = ".remix_" in key and key.endswith(f".{adapter_name}")
    others = (f".modules_to_save.{adapter_name}.", f".trainable_tokens_delta.{adapter_name}")
    return own or any(part in key for part in others)


def _is_ours(place: Any, options: Mapping[str, Any]) -> bool:
    """Whether there is a readable configuration of a ReMix adapter."""
    path = None if place is None else _file(place, CONFIG_NAME, options)
    try:
        return path is not None and read_config(path).get("peft_type") == PEFT_TYPE
    except (ValueError, OSError):
        return False


def _file(place: Any, name: str, options: Mapping[str, Any]) -> str | None:
    """A file of an adapter: in its folder, or brought from the hub; None where there is none."""
    from huggingface_hub import hf_hub_download

    folder = os.path.join(os.fspath(place), options.get("subfolder") or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        return path if os.path.lexists(path) else None
    try:
        return str(hf_hub_download(place, name, **_hub_options(options)))
    except (OSError, ValueError):
        return None


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say where on the hub a file is, and how to get it."""
    from huggingface_hub import hf_hub_download

    known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}
    return {key: value for key, value in options.items() if key in known}

"""A plugin for pytest that turns PEFT's tests to ReMix.

What a test is parametrized with is replaced by `peft_cases`. Tests that are not parametrized with a
method, or only with ones that `peft_cases` does not replace, are of other methods and left out. A
test that `peft_cases.EXPECTED_FAILURES` names has to fail.
"""

from __future__ import annotations

import sys
import tempfile
import types
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any

import pytest

from conformance.peft_cases import CASES, EXPECTED_FAILURES, PAIRS, SMALL, TASKS, save_models
from remix_model import ReMixConfig

if find_spec("diffusers") is None:  # their helpers import it for tests of other methods
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    vars(sys.modules["diffusers"])["StableDiffusionPipeline"] = type("Unused", (), {})

_models: dict[str, list[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Make the models that stand in for those from the hub."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    _models.update(save_models(folder.name))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace what a test is parametrized with, before pytest reads it."""
    marks = metafunc.definition.own_markers
    for position, mark in enumerate(marks):
        if mark.name == "parametrize":
            file = metafunc.module.__name__.rpartition(".")[2]
            values = _values(mark.args[0], file, metafunc.function.__name__)
            if values is not None:
                marks[position] = pytest.mark.parametrize(mark.args[0], values).mark


def _values(names: str, file: str, test: str) -> list[Any] | None:
    if names == "model_id":
        return _models[file]
    if names == "config_cls,config_kwargs":
        return [(ReMixConfig, {"task_type": TASKS[file], **SMALL})]
    return PAIRS.get(test, CASES.get(names))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out the tests of other methods, and mark those that have to fail."""
    others = [item for item in items if not _is_ours(item)]
    items[:] = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=others)
    for item in items:
        item.module.set_init_weights_false = _random_start
    for pattern, error, reason in EXPECTED_FAILURES:
        matching = [item for item in items if fnmatch(item.name, pattern)]
        if not matching:
            raise pytest.UsageError(f"EXPECTED_FAILURES names {pattern!r}, which is no test")
        for item in matching:
            item.add_marker(pytest.mark.xfail(reason=reason, raises=error, strict=True))


def _is_ours(item: pytest.Function) -> bool:
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is ReMixConfig or isinstance(value, ReMixConfig) for value in given)


def _random_start(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Their helper knows the options of their methods by which an adapter is no no-op."""
    return {**kwargs, "init_lora_weights": False}


@pytest.fixture(autouse=True)
def mixed_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of mixed batches are for the methods that they name: ReMix stands in for LoRA there."""
    if "mixed_adapter_batches" in request.node.name:
        for module in (request.module, sys.modules[f"{request.module.__package__}.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", ReMixConfig)

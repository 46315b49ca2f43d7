"""Damaged adapters through every door: one clear error, no code run, nothing large allocated."""

from __future__ import annotations

import copy
import math
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.damage import DAMAGES, HARMLESS, canary

DOORS = ("from_pretrained", "load_adapter", "auto", "transformers", "transformers-auto")
CASES = [
    pytest.param(name, DOORS[index % len(DOORS)], id=name)
    for index, name in enumerate((*DAMAGES, *HARMLESS))
]
ALLOWED = 10**5  # numbers: the base model's largest tensor has 2048


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of an adapter, and the base model that it is for."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from remix_model import ReMixConfig

    root = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    config = ReMixConfig(
        r=3, num_experts=4, top_k=2, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(copy.deepcopy(base), config).save_pretrained(root / "adapter")
    return root / "adapter", base


def load(door: str, folder: Path, good: tuple[Path, Any]) -> Any:
    """Load an adapter by one of the ways that there are."""
    base = copy.deepcopy(good[1])
    if door == "from_pretrained":
        return PeftModel.from_pretrained(base, folder)
    if door == "load_adapter":
        model = PeftModel.from_pretrained(base, good[0])
        try:
            model.load_adapter(folder, "second")
        except Exception:
            assert list(model.peft_config) == ["default"], "what could not be loaded stayed"
            raise
        model.set_adapter("second")
        return model
    if door == "auto":
        return AutoPeftModelForCausalLM.from_pretrained(folder)
    if door == "transformers-auto":
        return AutoModelForCausalLM.from_pretrained(folder)
    base.load_adapter(str(folder))
    return base


class _Modest(TorchDispatchMode):
    """Fails before anything large is allocated."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        if all(isinstance(length, int) for length in size):
            assert math.prod(size) < ALLOWED, f"{func} makes {size}"
        return func(*args, **(kwargs or {}))


@contextmanager
def modest() -> Iterator[None]:
    """Fail when something large is allocated, by torch or else."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _Modest():
            yield
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**17  # KiB


def test_the_good_one_is_good(good: tuple[Path, Any]) -> None:
    for door in DOORS:
        with modest():
            assert_finite(load(door, good[0], good))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,door", CASES)
def test_damaged(name: str, door: str, good: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(good[0], folder)
    {**DAMAGES, **HARMLESS}[name](folder, random.Random(name))
    try:
        with modest():
            assert_finite(load(door, folder, good))
    except (ValueError, OSError) as error:
        # Where a hostile base model is looked for, transformers says what is wrong with its name.
        assert str(folder) in str(error) or name.startswith("base="), str(error)
        assert len(str(error).split()) > 4, str(error)
    else:
        assert name in HARMLESS, "it was loaded as if nothing were wrong with it"
    assert not canary(folder).exists(), "a pickle was run"


def assert_finite(model: Any) -> None:
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(8)[None]).logits.isfinite().all())


@pytest.mark.parametrize("pickled", [False, True], ids=["good", "pickle"])
def test_the_hub_is_a_door_too(pickled: bool, good: tuple[Path, Any], tmp_path: Path) -> None:
    """From its cache, as without a network."""
    repository = tmp_path / "models--me--adapter"
    shutil.copytree(good[0], repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    load_it = lambda: PeftModel.from_pretrained(  # noqa: E731
        copy.deepcopy(good[1]), "me/adapter", cache_dir=str(tmp_path)
    )
    if not pickled:
        assert_finite(load_it())
        DAMAGES["num_experts=1000000000"](repository / "snapshots" / "abc", random.Random(0))
        with modest(), pytest.raises(ValueError, match=r"me/adapter.*do not belong together"):
            load_it()
        return
    DAMAGES["pickle_alone"](repository / "snapshots" / "abc", random.Random(0))
    with pytest.raises(ValueError, match=r"me/adapter holds adapter_model\.bin, a pickle"):
        load_it()
    assert not canary(repository / "snapshots" / "abc").exists()


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200

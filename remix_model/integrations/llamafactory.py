"""LLaMA-Factory's supervised finetuning with ReMix in place of its LoRA.

    python -m remix_model.integrations.llamafactory config.yaml

The file is LLaMA-Factory's own, for `stage: sft` and `finetuning_type: lora`. Data, templates,
models and everything about training are LLaMA-Factory's; `lora_rank`, `lora_target`, `lora_dropout`
and `additional_target` say r, target_modules, lora_dropout and modules_to_save. A section `remix:`
may hold other fields of `ReMixConfig`, and the fields of `ReMixArguments` (`remix_num_selections`,
...) may stand beside LLaMA-Factory's. Several GPUs: `torchrun ... -m` in place of `python -m`.

LLaMA-Factory has no place for other methods, so three of its names are replaced while it runs: the
LoraConfig that it makes, the trainer, and the class of the training arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remix_model.tuner.config import ReMixConfig

_SECTION = "remix"
_FROM_LLAMAFACTORY = ("r", "target_modules", "lora_dropout", "modules_to_save")
# What the file must say, and what LLaMA-Factory takes where it says nothing.
_REQUIRED = {"stage": ("sft", "sft"), "finetuning_type": ("lora", "lora")}
# What would train otherwise than ReMix does, or not at all.
_REFUSED = (
    "packing",
    "neat_packing",
    "use_dora",
    "pissa_init",
    "use_unsloth",
    "use_kt",
    "use_mca",
    "use_hyper_parallel",
    "use_dft_loss",
    "use_eaft_loss",
    "use_asft_loss",
    "create_new_adapter",
)


def train(path: str | Path) -> None:
    """Train as a LLaMA-Factory file says, with a ReMix adapter and its trainer.

    Args:
        path: The YAML file.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        ValueError: The file asks for what ReMix cannot do, or has an unknown option of ReMix.
        OSError: The file cannot be read.
    """
    arguments, options = read_file(path)
    if find_spec("llamafactory") is None:
        raise ImportError("LLaMA-Factory is not installed: run `pip install llamafactory`")
    from llamafactory.train.tuner import run_exp

    with remix_inside(options):
        run_exp(arguments)


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(LLaMA-Factory's arguments, the fields of ReMixConfig) in a file; checked.

    Raises:
        ValueError: See `train`.
    """
    import yaml

    arguments = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(arguments, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(arguments).__name__}")
    options = arguments.pop(_SECTION, None) or {}
    known = {item.name for item in fields(ReMixConfig)} - set(_FROM_LLAMAFACTORY)
    for name in options:
        if name not in known:
            fix = (
                "LLaMA-Factory's lora_rank, lora_target, lora_dropout and additional_target say it"
                if name in _FROM_LLAMAFACTORY
                else "it is no field of ReMixConfig"
            )
            raise ValueError(f"{path}: {_SECTION}: {name}: {fix}")
    for name, (needed, default) in _REQUIRED.items():
        if arguments.get(name, default) != needed:
            raise ValueError(f"{path}: {name}={arguments[name]!r}: ReMix trains {name}: {needed}")
    for name in _REFUSED:
        if arguments.get(name):
            raise ValueError(
                f"{path}: {name}={arguments[name]!r} does not go with ReMix: leave it out"
            )
    return arguments, options


@contextmanager
def remix_inside(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, LLaMA-Factory's LoRA is ReMix's; `options` are further fields of ReMixConfig."""
    from llamafactory.hparams import parser
    from llamafactory.model import adapter
    from llamafactory.train.sft import workflow

    from remix_model.integrations._llamafactory import FactoryArguments, FactoryTrainer

    theirs = parser.TrainingArguments
    kinds = [FactoryArguments if kind is theirs else kind for kind in parser._TRAIN_ARGS]
    with ExitStack() as stack:
        stack.enter_context(_replaced(parser, "_TRAIN_ARGS", kinds))
        stack.enter_context(_replaced(adapter, "LoraConfig", _config_maker(options)))
        stack.enter_context(_replaced(workflow, "CustomSeq2SeqTrainer", FactoryTrainer))
        yield


def _config_maker(options: Mapping[str, Any]) -> Callable[..., ReMixConfig]:
    """What stands in LoraConfig's place."""

    def make(**given: Any) -> ReMixConfig:
        kept = {name: given[name] for name in (*_FROM_LLAMAFACTORY, "task_type")}
        return ReMixConfig(**kept, **options)

    return make


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m remix_model.integrations.llamafactory config.yaml")
    train(sys.argv[1])

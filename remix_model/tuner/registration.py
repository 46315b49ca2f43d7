"""Makes "REMIX" a PEFT method like any other, from outside PEFT."""

from __future__ import annotations

import functools
import os
from typing import Any

from remix_model.tuner.config import PEFT_TYPE, ReMixConfig
from remix_model.tuner.model import ReMixModel


def register() -> None:
    """Extend PEFT's enum, mappings and model card. Safe to call again.

    PEFT reads `.peft_type.value` in several places, so the enum itself gets a member: the two
    look-up tables that `enum` keeps are public behaviour of `Enum` only through its constructor,
    hence the direct assignment.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        PeftType._member_names_.append(PEFT_TYPE)
        type.__setattr__(PeftType, PEFT_TYPE, member)
    if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=ReMixConfig, model_cls=ReMixModel)
        _extend_model_card()
        _check_before_loading()


def _extend_model_card() -> None:
    """PEFT writes the card in PeftModel, out of a tuner's reach: add our sections after it."""
    from peft import PeftModel

    write_card = PeftModel.create_or_update_model_card

    @functools.wraps(write_card)
    def write_card_with_usage(self: Any, output_dir: str) -> None:
        from remix_model.card import write_model_card

        fresh = not os.path.exists(os.path.join(output_dir, "README.md"))
        write_card(self, output_dir)
        write_model_card(self, output_dir, fresh=fresh)

    setattr(PeftModel, write_card.__name__, write_card_with_usage)


def _check_before_loading() -> None:
    """PEFT reads a pickle where there is no safetensors file: refuse before it does."""
    from peft import PeftConfig, PeftModel

    load_adapter = PeftModel.load_adapter

    @functools.wraps(load_adapter)
    def load_adapter_safely(
        self: Any, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        folder = os.path.join(os.fspath(model_id), kwargs.get("subfolder") or "")
        if os.path.isdir(folder):
            config = self.peft_config.get(adapter_name)
            if config is None and os.path.isfile(os.path.join(folder, "adapter_config.json")):
                config = PeftConfig.from_pretrained(folder)
            if isinstance(config, ReMixConfig):
                check_adapter_file(folder)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    setattr(PeftModel, load_adapter.__name__, load_adapter_safely)


def check_adapter_file(folder: str) -> None:
    """Raise ValueError when a folder's adapter weights are missing, a pickle, or damaged."""
    path = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, "adapter_model.bin")):
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle that can run code when read; ReMix "
                "adapters are only read from adapter_model.safetensors: save the adapter again "
                "with safe_serialization=True"
            )
        raise ValueError(f"{folder} holds no adapter_model.safetensors: is it an adapter's folder?")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); the file is truncated or damaged: "
            "copy it again"
        ) from error

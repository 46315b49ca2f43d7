"""Makes "REMIX" a PEFT method like any other, from outside PEFT."""

from __future__ import annotations

import functools
import os
from typing import Any

from remix_model.tuner.adapter_files import check_weights
from remix_model.tuner.config import PEFT_TYPE, ReMixConfig
from remix_model.tuner.loading import guard_doors, weights_file
from remix_model.tuner.model import ReMixModel, replace_weights


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
        guard_doors()
        _enable_hotswap()


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


# What decides an adapter's output, or its training, beside its weights.
_BESIDE_WEIGHTS = [
    "top_k", "lora_alpha", "use_rslora", "lora_dropout", "bias", "routing_granularity",
    "router_sharing", "router_type", "router_kwargs", "router_temperature", "router_detach_input",
]  # fmt: skip


def _enable_hotswap() -> None:
    """PEFT knows how to exchange LoRA's weights in a model that runs: teach it ReMix's.

    In place, so that a compiled model stays as it is. Pools must be alike in shape.
    """
    from peft.utils import hotswap
    from peft.utils.peft_types import PeftType

    hotswap.CONFIG_KEYS_TO_CHECK[PeftType[PEFT_TYPE]] = _BESIDE_WEIGHTS
    swap = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def swap_weights(
        model: Any,
        state_dict: dict[str, Any],
        adapter_name: str,
        config: Any,
        *args: Any,
        **kw: Any,
    ) -> None:
        if isinstance(config, ReMixConfig):
            replace_weights(getattr(model, "_orig_mod", model), config, state_dict, adapter_name)
        else:
            swap(model, state_dict, adapter_name, config, *args, **kw)

    swap_adapter = hotswap.hotswap_adapter

    @functools.wraps(swap_adapter)
    def swap_checked(model: Any, place: Any, adapter_name: str, *args: Any, **kw: Any) -> None:
        if isinstance(getattr(model, "peft_config", {}).get(adapter_name), ReMixConfig):
            check_weights(weights_file(place, kw))
        swap_adapter(model, place, adapter_name, *args, **kw)

    setattr(hotswap, swap.__name__, swap_weights)
    setattr(hotswap, swap_adapter.__name__, swap_checked)

"""What kind of model it is that has routed layers, as far as the estimators must know."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model in which a position sees later ones, as far as it says so."""
    config = getattr(unwrapped(model), "config", None)
    name = next(
        (name for name, part in model.named_modules() if getattr(part, "is_causal", True) is False),
        "use_bidirectional_attention"
        if getattr(config, "use_bidirectional_attention", None) is True
        else None,
    )
    if name is not None:
        raise ValueError(
            f"credit='causal' charges a decision with later losses only, and {name} of "
            f"{type(model).__name__} attends to later positions too; use credit='sequence'"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that DDP and its like wrap."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a part of it."""
    return any(
        name.endswith("_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for name, module in model.named_modules()
    )


def check_decoder(model: nn.Module) -> None:
    """Raise ValueError for an encoder-decoder: its routed rows are not one sequence's positions."""
    model = unwrapped(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; routers are trained in "
            "decoder-only language models (with frozen routers, train it with any trainer)"
        )


def prompt_positions(model: nn.Module) -> tuple[int, int]:
    """How many positions a learned prompt of PEFT's takes: (in attention, before the logits).

    A prefix is only in the cache; other prompts run through the model, and have logits of their own
    in front of the sequence's.
    """
    model = unwrapped(model)
    config: Any = getattr(model, "active_peft_config", None)
    disabled = getattr(model, "_adapters_disabled", False)
    if disabled or not getattr(config, "is_prompt_learning", False):
        return 0, 0
    count = int(config.num_virtual_tokens)
    return count, 0 if config.peft_type == "PREFIX_TUNING" else count

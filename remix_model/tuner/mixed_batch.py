"""Another adapter for each row of a batch: `model(..., adapter_names=[...])`, as in PEFT's LoRA.

For inference. Names stand for rows in their order; `generate` may repeat every row (beams, several
sequences returned), and some models flatten [B, T] to rows. So a layer's rows are n groups of equal
size for n names, and group i is routed by adapter names[i], or by none if that is "__base__".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from remix_model.architecture import is_compiled
from remix_model.tuner.layer import ReMixLayer, wrong_length

BASE = "__base__"


@contextmanager
def mixed_batch(
    model: nn.Module, names: Sequence[str], options: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, passes of `model` take another adapter for each row.

    Args:
        model: The model with the adapters.
        names: Names of adapters, one a row; "__base__": none.
        options: Of `generate`, which tell how often it repeats a row.

    Raises:
        TypeError: names is not a list.
        ValueError: An adapter is not there, or the model trains or samples; in a pass, too many or
            too few names.
    """
    layers = [module for module in model.modules() if isinstance(module, ReMixLayer)]
    _check(model, names, layers)
    sizes = {len(names), len(names) * _copies(model, options)}

    def check_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = _rows(args, kwargs)
        if rows is not None and rows not in sizes:
            raise ValueError(wrong_length(names, rows))

    def give_names(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = list(names)
        if isinstance(module, AuxiliaryTrainingWrapper):  # which wants a name for each row
            given = [name for name in given for _ in range(len(args[0]) // len(given))]
        return args, {**kwargs, "adapter_names": given}

    with ExitStack() as hooks:
        takers = [
            module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        for module in (*layers, *takers):
            hooks.callback(module.register_forward_pre_hook(give_names, with_kwargs=True).remove)
        hooks.callback(model.register_forward_pre_hook(check_size, with_kwargs=True).remove)
        yield


def _check(model: nn.Module, names: Sequence[str], layers: Sequence[ReMixLayer]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise TypeError(f"adapter_names={names!r} must be a list of names, one for each row")
    if model.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval()."
        )
    known = {name for layer in layers for name in layer.sites}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are "
            f"{', '.join(sorted(known))}, and {BASE!r} for none"
        )
    if is_compiled(model):
        raise ValueError(
            "adapter_names= does not reach blocks that are compiled by themselves: compile the "
            "whole PEFT model, or none of it"
        )
    sites = [site for layer in layers for site, _ in layer.active_sites().values()]
    if any(site.records for site in sites):
        raise ValueError(
            "adapter_names= does not go with record_routing: record one adapter's rows at a time"
        )
    if any(site.state is not None for site in sites):
        raise ValueError(
            "adapter_names= takes the top k of every row's adapter and does not go with "
            "sample_routing: call the model outside of it"
        )


def _copies(model: nn.Module, options: Mapping[str, Any]) -> int:
    """How often `generate` repeats a row."""
    own = options.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(own, name, None) or 1 for name in names)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The batch's size, of a pass of the whole model."""
    first = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    given = (value for value in (*args, *first, *kwargs.values()) if isinstance(value, Tensor))
    return next((len(value) for value in given if value.dim() > 0), None)

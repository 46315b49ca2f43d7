"""The model card of a ReMix adapter: how to load it, what its routers do, how it was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remix_model.routers import Router, make_router
from remix_model.stats import RoutingStats, recorded_stats
from remix_model.tuner.config import ReMixConfig

_BEGIN, _END = "<!-- remix -->", "<!-- /remix -->"
CARD_HEADING = "## Loading this adapter"
_USAGE = """{heading}

{what} Import `remix_model` first, which teaches PEFT the method; without it loading
fails with `KeyError: 'REMIX'`.{own}

```python
import remix_model  # registers "REMIX" with PEFT
from peft import {auto}

model = {auto}.from_pretrained("path/or/hub-id/of/this/adapter")
```

It cannot be merged into its base: which LoRAs apply depends on the token. {export}
"""
_REMIX = """This is a [ReMix](https://arxiv.org/abs/2603.10160) adapter: a mixture of LoRAs with a
trained router."""
_OTHER = """This is a mixture of LoRAs of router type `{kind}`, made with
[ReMix](https://arxiv.org/abs/2603.10160)'s engine."""
_OWN = """ The type `{kind}` is none of its own: import the
module that registers it (`remix_model.register_router`) before loading, too."""
_EXPORT = """`remix export` writes a
plain LoRA of fixed ones for tools that know nothing of ReMix."""
_NO_EXPORT = """So do their
weights, so `remix export` has no plain LoRA for it."""


_PEFT_USAGE = """{heading}

This is an adapter of PEFT's own, of type {kind}. It is loaded and run without `remix_model`.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/or/hub-id/of/this/adapter")
```
"""


def write_model_card(
    model: Any,
    directory: str | Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> None:
    """Write, or bring up to date, what README.md says of a ReMix adapter.

    Of another adapter only when there are results or a set-up to tell.

    What people wrote around it stays. The experts' shares are those of the last
    `record_routing(model)`, if there was one.

    Args:
        model: The PEFT model that was saved there.
        directory: The adapter's folder, in which PEFT has written README.md.
        evaluation: Results by name, for a table.
        training: The set-up by name, for a table.
        fresh: README.md is only PEFT's blank form: its text goes, its metadata stay.
    """
    configs = {
        name: config
        for name, config in model.peft_config.items()
        if isinstance(config, ReMixConfig)
    }
    if not configs and not (evaluation or training):
        return
    path = Path(directory) / "README.md"
    card = path.read_text(encoding="utf-8")
    sections = [_usage(configs), _mixture(configs)] if configs else [_peft_usage(model)]
    sections += [_table("Evaluation", evaluation)]
    sections += [_routing(_stats(model))] if configs else []
    sections += [_table("Training", training)]
    ours = f"{_BEGIN}\n" + "\n".join(section for section in sections if section) + f"{_END}\n"
    if fresh:
        head = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
        versions = re.search(r"^### Framework versions\n.*", card, re.DOTALL | re.MULTILINE)
        parts = [
            head[0] if head else "",
            "# ReMix adapter\n" if configs else "# Adapter\n",
            ours,
            versions[0] if versions else "",
        ]
        card = "\n".join(part for part in parts if part)
    elif _BEGIN in card and _END in card:
        before, _, rest = card.partition(_BEGIN)
        card = before + ours + rest.partition(_END)[2].lstrip("\n")
    else:
        card = f"{card.rstrip()}\n\n{ours}"
    path.write_text(card.rstrip() + "\n", encoding="utf-8")


def _usage(configs: Mapping[str, ReMixConfig]) -> str:
    kinds = {"SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
    kind = str(getattr(next(iter(configs.values())).task_type, "value", "")) or "CAUSAL_LM"
    auto = kinds.get(kind, "AutoPeftModelForCausalLM")
    routers = [_router(config) for config in configs.values()]
    others = [router for router in routers if router.name != "remix"]
    own = [
        router.name for router in others if not type(router).__module__.startswith("remix_model.")
    ]
    return _USAGE.format(
        heading=CARD_HEADING,
        auto=auto,
        what=_OTHER.format(kind=others[0].name) if others else _REMIX,
        own=_OWN.format(kind=own[0]) if own else "",
        export=_NO_EXPORT if all(router.learned for router in routers) else _EXPORT,
    )


def _router(config: ReMixConfig) -> Router:
    return make_router(config.router_type, config.num_experts, config.top_k, config.router_kwargs)


def _peft_usage(model: Any) -> str:
    kind = model.active_peft_config.peft_type
    return _PEFT_USAGE.format(heading=CARD_HEADING, kind=getattr(kind, "value", kind))


def _mixture(configs: Mapping[str, ReMixConfig]) -> str:
    lines = ["## The mixture", ""]
    for name, config in configs.items():
        targets = config.target_modules
        targets = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
        adapter = f"`{name}`: " if len(configs) > 1 else ""
        lines.append(
            f"- {adapter}every {config.routing_granularity} takes {config.top_k} of "
            f"{config.num_experts} LoRAs of rank {config.r} (lora_alpha {config.lora_alpha:g}, "
            f"{'rsLoRA' if config.use_rslora else 'LoRA'} scaling), {_routers(config)}; adapted: "
            f"`{targets}`"
        )
    return "\n".join(lines) + "\n"


def _routers(config: ReMixConfig) -> str:
    place = "linear" if config.router_sharing == "module" else "block"
    router = _router(config)
    if router.random:
        return f"drawn at random for every {place}"
    kind = "" if router.name == "remix" else f" of type `{router.name}`"
    return f"one router{kind} a {place}"


def _stats(model: Any) -> RoutingStats:
    try:
        return recorded_stats(model)
    except ValueError:  # no ReMix adapter is active
        return RoutingStats([])


def _routing(stats: RoutingStats) -> str:
    """Every linear's experts, as shares of the tokens' choices."""
    if not stats.layers:
        return ""
    lines = [
        "## Routing",
        "",
        f"Share of each expert, in percent of all choices, over {stats.layers[0].tokens} tokens; "
        "effective number of experts; experts never chosen.",
        "",
        "| linear | share of experts 0, 1, ... | in use | never chosen |",
        "| --- | --- | --- | --- |",
    ]
    for layer in stats.layers:
        shares = " ".join(f"{100 * share:.0f}" for share in layer.expert_share)
        never = ", ".join(str(expert) for expert in layer.dead_experts) or "-"
        name = layer.name.removeprefix("base_model.model.")
        lines.append(f"| `{name}` | {shares} | {layer.share_ess:.1f} | {never} |")
    return "\n".join(lines) + "\n"


def _table(title: str, values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"## {title}", "", "|  |  |", "| --- | --- |", *rows]) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

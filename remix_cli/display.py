"""What a person reads: tables, samples and the routing of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from remix_model.stats import LayerStats, RoutingStats

console = Console(highlight=False, markup=False)  # paths and prompts may hold [brackets]
_BARS = "▁▂▃▄▅▆▇█"


def print_facts(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print a table of names and values."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(_format(value)))
    print_table(title, table)


def print_losses(title: str, losses: Sequence[tuple[str, float]]) -> None:
    """Print a table of losses and perplexities, each compared with the first."""
    table = Table()
    for heading in ("", "loss", "perplexity", "change of loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for i, (name, loss) in enumerate(losses):
        change = f"{loss - losses[0][1]:+.4f}" if i else ""
        perplexity = f"{math.exp(loss):.2f}" if loss < 100 else "-"
        table.add_row(name, f"{loss:.4f}", perplexity, change)
    print_table(title, table)


def print_routing(title: str, stats: RoutingStats, top_k: int) -> None:
    """Print the routing over some data, a row per layer and a column per kind of module.

    A bar is an expert's share of the tokens: the highest is 1 token in 1, `·` no token. Beside it
    stand the means over the layer's modules of the policy's entropy, as a share of the largest
    possible, and of the number of experts in use (the effective sample size of the shares).
    """
    rows: dict[str, list[LayerStats]] = {}
    for layer in stats.layers:
        rows.setdefault(_layer_and_kind(layer.name)[0], []).append(layer)
    kinds = list(dict.fromkeys(_layer_and_kind(layer.name)[1] for layer in stats.layers))
    table = Table(
        caption="bars: share of the tokens that each expert sees (· none); entropy: of the policy, "
        "100% is uniform; in use: effective number of experts; dead: experts never chosen",
        caption_justify="left",
    )
    for heading in ("layer", *kinds):
        table.add_column(heading)
    for heading in ("entropy", "in use", "dead"):
        table.add_column(heading, justify="right")
    for name, layers in rows.items():
        by_kind = {_layer_and_kind(layer.name)[1]: layer for layer in layers}
        bars = [
            share_bars(by_kind[kind].expert_share, top_k) if kind in by_kind else ""
            for kind in kinds
        ]
        num_experts = len(layers[0].expert_share)
        entropy = _mean([layer.entropy for layer in layers]) / max(math.log(num_experts), 1e-9)
        in_use = _mean([layer.share_ess for layer in layers])
        dead = sum(len(layer.dead_experts) for layer in layers)
        table.add_row(name, *bars, f"{entropy:.0%}", f"{in_use:.1f}/{num_experts}", str(dead))
    print_table(title, table)


def share_bars(shares: Sequence[float], top_k: int) -> str:
    """Draw each expert's share of the tokens as a bar: an expert can be in all of them."""
    levels = _BARS if console.encoding.startswith("utf") else "12345678"
    bars = ""
    for share in shares:
        of_tokens = min(1.0, share * top_k)
        bars += "·" if share == 0 else levels[min(len(levels) - 1, int(of_tokens * len(levels)))]
    return bars


def print_sample(prompt: str, answers: Sequence[tuple[str, str]]) -> None:
    """Print a prompt and what each model answers."""
    console.rule("prompt", align="left")
    console.print(Text(prompt), soft_wrap=True)
    for name, answer in answers:
        console.rule(name, align="left")
        console.print(Text(answer), soft_wrap=True)


def seconds(value: float) -> str:
    """Return a duration as "1:02:03" or "2:03"."""
    minutes, secs = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def print_table(title: str, table: Table) -> None:
    """Print a table under its title; rich's own titles wrap at the table's width."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def _layer_and_kind(name: str) -> tuple[str, str]:
    """Split "model.layers.3.mlp.up_proj" into ("3", "up_proj"); a name without a number is both."""
    match = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", name)
    return (match[1], match[2]) if match else (name, name.rsplit(".", 1)[-1])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

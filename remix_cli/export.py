"""`remix export`: a fixed choice of experts as a plain LoRA, and what that choice loses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from remix_cli.config import option_fields
from remix_cli.display import console, print_losses
from remix_cli.evaluate import held_out_rows, mean_loss
from remix_cli.prepare import adapter_config, adapter_folder, load_adapter, quiet_libraries
from remix_model import force_selection, record_routing
from remix_model.export import MOST_FREQUENT, check_directory, export_static_lora
from remix_model.tokens import DataCollator


def run(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Run the command; see `remix export --help`."""
    quiet_libraries()
    folder = adapter_folder(args.adapter, routed=True)
    config = adapter_config(folder, overrides)
    output = check_directory(args.output)
    by_data = args.selection == MOST_FREQUENT
    selection = args.selection if by_data else _read_selection(Path(args.selection).expanduser())
    measured = by_data or any(item.name in overrides for item in option_fields("data"))
    rows = held_out_rows(config, overrides) if measured else []

    model, tokenizer = load_adapter(folder, config)
    collator = DataCollator.for_tokenizer(tokenizer)
    losses: list[tuple[str, float]] = []

    def measure(name: str, context: Any) -> None:
        with context:
            losses.append((name, mean_loss(model, rows, collator, config, name)[0]))

    if measured:
        measure("base model", model.disable_adapter())
        measure("adapter", record_routing(model))
    chosen = export_static_lora(model, selection, output)
    if measured:
        forced = {
            name: torch.tensor(experts, device=model.device) for name, experts in chosen.items()
        }
        measure("exported LoRA", force_selection(model, forced))
        print_losses(f"Loss on {len(rows)} examples", losses)
    console.print(f"the plain LoRA is in {output}: load it with PEFT, without remix_model")


def _read_selection(path: Path) -> dict[str, Any]:
    """Read the experts of each linear."""
    if not path.is_file():
        raise ValueError(
            f"--selection {path} is no file: give JSON with the experts of each linear, or "
            f"{MOST_FREQUENT}"
        )
    try:
        selection = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(selection, dict):
        raise ValueError(
            f"{path} must hold an object, the experts of each linear by name, got "
            f"{type(selection).__name__}"
        )
    return selection

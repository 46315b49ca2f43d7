"""What a page takes for granted: names that its first Python block may use, by page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from remix_model import ReMixConfig, load_model
from remix_model.tokens import DataCollator


def _dataset() -> list[dict[str, list[int]]]:
    return [{"input_ids": [5 + i, 6, 7, 8], "labels": [-100, 6, 7, 8]} for i in range(4)]


def _model() -> Any:
    from peft import get_peft_model

    return get_peft_model(load_model("smollm2-135m"), ReMixConfig(num_experts=8, top_k=4, r=8))


def readme() -> dict[str, Any]:
    collator, dataset = DataCollator(0), _dataset()
    # The loops of the page train the model of its first block.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    my_data = '{"prompt": "2 + 3?", "response": "5"}\n' * 6
    Path("my.jsonl").write_text(my_data)
    return {
        "dataset": dataset,
        "collator": collator,
        "batches": [collator(dataset)],
        "optimizer": optimizer,
    }


def estimators() -> dict[str, Any]:
    from remix_model import sample_routing, token_losses

    return {
        "model": _model(),
        "batch": DataCollator(0)(_dataset()),
        "step": 0,
        "sample_routing": sample_routing,
        "token_losses": token_losses,
    }


def kernels() -> dict[str, Any]:
    return {"model": _model()}


def ways_in_and_out() -> dict[str, Any]:
    """A finished run, four trained LoRAs, and a configuration of one's own."""
    from peft import LoraConfig, get_peft_model

    from remix_cli import main

    Path("sums.jsonl").write_text('{"prompt": "2 + 3?", "response": "5"}\n' * 6)
    Path("mine.yaml").write_text("dataset: sums.jsonl\neval_size: 2\nmax_steps: 2\nr: 4\n")
    assert main(["train", "--config", "mine.yaml", "--output-dir", "runs/mine"]) == 0
    for name in ("math", "code", "chat", "law"):
        lora = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
        get_peft_model(load_model("smollm2-135m"), lora).save_pretrained(f"loras/{name}")
    return {"base": load_model("smollm2-135m"), "batches": [DataCollator(0)(_dataset())]}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/estimators.md": estimators,
    "docs/kernels.md": kernels,
    "docs/ways-in-and-out.md": ways_in_and_out,
}

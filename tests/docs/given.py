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


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/estimators.md": estimators,
    "docs/kernels.md": kernels,
}

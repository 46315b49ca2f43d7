"""Partly trained adapters: what estimators are compared on. Trained once, kept under runs/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from remix_model import ReMixConfig, ReMixTrainer, ReMixTrainingArguments, load_model
from remix_model.data import load_examples
from remix_model.models import load_tokenizer
from remix_model.tokens import DataCollator, tokenize

KEPT = Path(__file__).parents[2] / "runs" / "estimators"
SHARED = Path(__file__).parents[3] / "shared" / "models"
SMOLLM2 = "smollm2-135m"
BATCHES = 8
STORIES = 164  # of each dialect
TARGETS = ["gate_proj", "up_proj", "down_proj"]


def stories260k_folder() -> Path | None:
    """Where the tests look for it too; None where it is not."""
    folder = Path(os.environ.get("REMIX_TEST_MODELS") or SHARED) / "stories260k"
    return folder if folder.is_dir() else None


def partly_trained(
    name: str, all_labelled: bool = False
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model whose adapters have been trained for a few steps, and held-out batches for it.

    "stories260k": two dialects of its own stories, n=8, k=2, r=4, 40 steps; 8 batches [8, 64], all
    labelled. "smollm2-135m": HumanEval, n=8, k=2, r=8, 12 steps; 8 batches [2, 96];
    trained and measured on its responses, or on all tokens.
    """
    return _stories() if name == "stories260k" else _smollm2(all_labelled)


def _train(model: Any, rows: list[Any], folder: Path, steps: int, **arguments: Any) -> Any:
    base = model
    if (folder / "adapter_model.safetensors").exists():
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    config = arguments.pop("config")
    collator = arguments.pop("collator", None)
    torch.manual_seed(0)
    adapted: Any = get_peft_model(base, config)
    trainer = ReMixTrainer(
        model=adapted,
        args=ReMixTrainingArguments(
            output_dir=str(folder / "trainer"),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            max_steps=steps,
            logging_steps=4,
            **arguments,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collator,
    )
    trainer.train()
    adapted.save_pretrained(str(folder))
    return adapted


def _stories() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    folder = stories260k_folder()
    if folder is None:
        raise FileNotFoundError("stories260k: set REMIX_TEST_MODELS to the folder that holds it")
    base: Any = load_model(str(folder), dtype="float32", device="cpu").eval()
    torch.manual_seed(0)
    start = torch.full((2 * STORIES, 1), base.config.bos_token_id)
    stories = base.generate(
        start, do_sample=True, max_length=64, min_length=64, top_k=40, pad_token_id=0
    )
    shifted = 3 + (stories[:STORIES, 1:] - 3 + 17) % (base.config.vocab_size - 3)
    dialects = torch.stack((torch.cat((stories[:STORIES, :1], shifted), 1), stories[STORIES:]), 1)
    held_out = dialects[: 4 * BATCHES].flatten(0, 1).split(8)
    rows = [{"input_ids": row, "labels": row} for row in dialects[4 * BATCHES :].flatten(0, 1)]
    model = _train(
        base,
        rows,
        KEPT / "stories260k",
        40,
        config=ReMixConfig(r=4, num_experts=8, top_k=2, target_modules=TARGETS),
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        remix_num_selections=4,
    )
    return model, [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in held_out
    ]


def _smollm2(all_labelled: bool) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    tokenizer = load_tokenizer(SMOLLM2)
    rows = tokenize(load_examples("humaneval"), tokenizer, max_length=192, long_examples="drop")
    if all_labelled:
        rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
    rows.sort(key=lambda row: -sum(label != -100 for label in row["labels"][:96]))
    model = _train(
        load_model(SMOLLM2, dtype="float32", device="cpu"),
        rows[2 * BATCHES :],
        KEPT / (SMOLLM2 + ("-all-tokens" if all_labelled else "")),
        12,
        config=ReMixConfig(r=8, num_experts=8, top_k=2, target_modules=TARGETS),
        collator=DataCollator(0),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        remix_num_selections=2,
    )
    held_out = [{key: value[:96] for key, value in row.items()} for row in rows[: 2 * BATCHES]]
    return model, [DataCollator(0)(held_out[i : i + 2]) for i in range(0, len(held_out), 2)]

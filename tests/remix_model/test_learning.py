"""A real pretrained model learns two tasks at once; what the experts make of it is printed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from remix_model import (
    ReMixConfig,
    ReMixTrainer,
    ReMixTrainingArguments,
    record_routing,
    token_losses,
)

LENGTH = 32


def dialects(model, count):
    """The model's own stories in two dialects: token numbers shifted, and text backwards.

    Returns:
        (shifted [count, LENGTH], backwards [count, LENGTH]).
    """
    torch.manual_seed(0)
    prompt = torch.full((2 * count, 1), model.config.bos_token_id)
    stories = model.generate(
        prompt, do_sample=True, max_length=LENGTH, min_length=LENGTH, top_k=40, pad_token_id=0
    )
    words = 3 + (stories[:, 1:] - 3 + 17) % (model.config.vocab_size - 3)
    shifted = torch.cat((stories[:, :1], words), 1)
    backwards = torch.cat((stories[:, :1], stories[:, 1:].flip(1)), 1)
    return shifted[:count], backwards[count:]


def held_out_loss(model, rows):
    model.eval()
    with torch.no_grad():
        losses, mask = token_losses(model, {"input_ids": rows, "labels": rows})
    return float(losses.sum() / mask.sum())


def shares(model, rows):
    """Expert shares [layers, n] on some rows."""
    with record_routing(model) as record, torch.no_grad():
        model.eval()(input_ids=rows)
    return torch.tensor([layer.expert_share for layer in record.stats().layers]), record.stats()


@pytest.mark.slow
def test_a_pretrained_model_learns(stories260k, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    data = dialects(base, 72)
    train = torch.cat([rows[:64] for rows in data])
    held_out = [rows[64:] for rows in data]
    torch.manual_seed(0)
    config = ReMixConfig(r=4, num_experts=4, top_k=2, router_init_range=0.1)
    model = get_peft_model(base, config)
    before = [held_out_loss(model, rows) for rows in held_out]
    start = [shares(model, rows)[0] for rows in held_out]
    routers = {n: p.detach().clone() for n, p in model.named_parameters() if "router" in n}
    trainer = ReMixTrainer(
        model=model,
        args=ReMixTrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            per_device_train_batch_size=16,
            max_steps=20,
            logging_steps=10,
            learning_rate=1e-2,
            remix_num_selections=4,
            remix_router_learning_rate=3e-2,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in train],
    )
    trainer.train()
    after = [held_out_loss(model, rows) for rows in held_out]
    end = [shares(model, rows) for rows in held_out]
    with capsys.disabled():
        pairs = (f"{a:.2f} -> {b:.2f}" for a, b in zip(before, after, strict=True))
        print("\nheld-out loss, shifted and backwards:", ", ".join(pairs))
        for name, (left, right) in {
            "before": start,
            "after": [share for share, _ in end],
        }.items():
            apart = 0.5 * (left - right).abs().sum(1).mean()
            print(f"expert shares {name}: differ by {apart:.3f} between the dialects (0 to 1)")
            for layer in zip(left, right, strict=True):
                print("  ", " | ".join(" ".join(f"{v:.2f}" for v in s.tolist()) for s in layer))
        print("routing:", end[0][1].summary())
    for old, new in zip(before, after, strict=True):
        assert new < old - 0.5
    for name, router in routers.items():
        change = (model.get_parameter(name) - router).norm() / router.norm()
        assert float(change.detach()) > 0.01, name
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.5
    assert entries[-1]["remix/loss_spread"] > 0

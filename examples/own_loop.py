"""A loop without a trainer: python examples/own_loop.py [MODEL [OUTPUT_FOLDER]]."""

import sys

import torch
from peft import get_peft_model

from remix_model import ReMixConfig, load_model, load_tokenizer, sample_routing, token_losses

name, folder = [*sys.argv[1:], *("smollm2-135m", "runs/own_loop")[len(sys.argv) - 1 :]]
texts = [f"{n} times seven is {7 * n}, and {n} plus seven is {n + 7}." for n in range(8)]
model = get_peft_model(load_model(name), ReMixConfig(num_experts=8, top_k=2, r=8)).train()
tokenizer = load_tokenizer(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

for step in range(20):
    with sample_routing(model, num_selections=4, credit="causal", seed=step) as routing:
        losses, mask = token_losses(model, routing.expand(batch))
        loss = routing.loss(losses, mask)
    loss.backward()  # the adapters' gradient and, by RLOO, the routers'
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(folder)

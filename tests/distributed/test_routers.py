"""Learned weights on two ranks, each with half of the batch: the gradients of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from remix_model import sample_routing, token_losses
from remix_model.parallel import make_shardable
from tests.ranks import run_on_two_ranks

# Load balancing is of a rank's own tokens, so it is left out.
KINDS = {
    "mixlora": {"router_kwargs": {"load_balancing_coef": 0.0}},
    "mixlora_block": {"router_kwargs": {"load_balancing_coef": 0.0}},
    "hydralora": {"router_sharing": "block"},
    "mor": {},
}


def step(model, batch, items):
    with sample_routing(model, num_selections=1, seed=0) as routing:
        losses, mask = token_losses(model, routing.expand(batch))
        loss = routing.loss(losses, mask, items)
    loss.backward()


@pytest.mark.slow
def test_halves_of_a_batch(make_remix, make_batch, take_grads, assert_same, tmp_path):
    batch = make_batch((10, 7, 9, 8))
    items = (batch["labels"][:, 1:] != -100).sum()
    models = {kind: make_remix(router_type=kind, **KINDS[kind]).train() for kind in KINDS}
    torch.save((models, batch, items), tmp_path / "inputs.pt")
    run_on_two_ranks(_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind, model in models.items():
        step(model, batch, items)
        grads = take_grads(model)
        for results in ranks:
            assert_same(results[kind, "ddp"], grads, 2e-6)
            assert_same(results[kind, "fsdp2"], grads, 2e-6)


def _rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    results = {}
    for engine in ("ddp", "fsdp2"):
        models, batch, items = torch.load(f"{folder}/inputs.pt", weights_only=False)
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        for kind, model in models.items():
            wrapped = model
            if engine == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                make_shardable(model)
                for block in model.base_model.model.model.layers:
                    fully_shard(block)
                fully_shard(model)
            step(wrapped, half, items / 2)  # both average over the ranks
            results[kind, engine] = {
                n: p.grad.full_tensor() if engine == "fsdp2" else p.grad
                for n, p in model.named_parameters()
                if p.requires_grad
            }
    torch.save(results, f"{folder}/{rank}.pt")

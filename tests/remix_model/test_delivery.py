"""The router's gradient arrives however the backward pass runs: scaled, late, in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remix_model import (
    RoutedLoRALinear,
    force_selection,
    sample_routing,
    token_losses,
)
from tests.ranks import run_on_two_ranks

KINDS = ("off", "reentrant", "non-reentrant")


# What scales the loss scales the router's gradient ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_loss_scale(
    kind, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """A power of two, so the gradients are exactly that many times larger."""
    model = checkpointing(make_remix(), kind)
    loss, _ = sampled_loss(model, make_batch())
    (loss * 1024).backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want * 1024), name


def test_repeated_backward_with_another_scale(make_remix, make_batch, sampled_loss, take_grads):
    model = make_remix().train()
    loss, _ = sampled_loss(model, make_batch())
    (loss * 4).backward(retain_graph=True)
    first = take_grads(model)
    loss.backward()
    for name, want in take_grads(model).items():
        assert torch.equal(first[name], want * 4), name


def test_another_loss_delivers_no_second_time(make_remix, make_batch, take_grads):
    """An auxiliary loss with a backward pass of its own: the router is told by the routing loss."""
    model = make_remix().train()
    results = []
    for auxiliary in (False, True):
        with sample_routing(model, num_selections=3, seed=0) as routing:
            batch = routing.expand(make_batch())
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            loss = routing.loss(logits[:, :-1].square().mean(-1), batch["labels"][:, 1:] != -100)
        if auxiliary:
            logits.mean().backward(retain_graph=True)
        loss.backward()
        results.append({n: g for n, g in take_grads(model).items() if "router" in n})
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_one_large_batch(
    kind,
    make_remix,
    make_batch,
    sampled_loss,
    take_grads,
    checkpointing,
    random_selections,
    assert_same,
):
    """Two micro-batches, the whole's normaliser, same selections: the large batch's gradient."""
    model = checkpointing(make_remix(), kind)
    batch = make_batch((10, 7, 9, 10, 4))
    count = (batch["labels"][:, 1:] != -100).sum()
    index = random_selections(model, (3, 5, 10))  # [M, B, T, k]
    grads = []
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        total = 0.0
        for part in parts:
            micro = {k: v[part] for k, v in batch.items()}
            with force_selection(model, {n: i[:, part].flatten(0, 1) for n, i in index.items()}):
                loss, _ = sampled_loss(model, micro, num_items=count)
            loss.backward()
            total += float(loss.detach())
        grads.append((take_grads(model), total))
    assert_same(grads[1][0], grads[0][0], 2e-6)
    assert abs(grads[1][1] - grads[0][1]) < 1e-5


# In place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_may_be_scaled_in_place(
    kind, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """As training loops do: `loss /= accumulation_steps`."""
    model = checkpointing(make_remix(), kind)
    loss, _ = sampled_loss(model, make_batch())
    loss /= 2
    loss.backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want / 2), name


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["one-op", "dropout"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "top-k"])
@pytest.mark.filterwarnings("ignore:a ReMix model is being trained")
def test_a_layers_output_may_be_changed_in_place(dropout, sampled, take_grads):
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
        options |= {"router_init_range": 0.7, "lora_dropout": dropout}
        model = nn.Sequential(
            RoutedLoRALinear(nn.Linear(5, 6), **options),
            nn.ReLU(inplace=inplace),
            RoutedLoRALinear(nn.Linear(6, 3), **options),
        ).double()
        if sampled:
            with sample_routing(model, num_selections=2, seed=0) as routing:
                loss = routing.loss(model(routing.expand({"x": x})["x"]).square().sum(-1))
        else:
            loss = model(x).square().sum()
        loss.backward()
        results.append(take_grads(model))
    assert any(grad.any() for name, grad in results[0].items() if "router" in name) == sampled
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("plain", [True, False], ids=["routed_linear", "routed_lora"])
def test_delivery_copies_no_gradient(plain):
    """Were the op's output a view, its change in place would copy the gradient twice a layer."""
    layer = RoutedLoRALinear(
        nn.Linear(6, 10), num_experts=4, top_k=2, r=3, lora_dropout=0.0 if plain else 0.1
    )
    with sample_routing(layer, num_selections=2, seed=0) as routing:
        y = layer(routing.expand({"x": torch.randn(3, 5, 6)})["x"])
    assert not y._is_view()
    assert type(y.grad_fn).__name__ == "DeliverRouterGradientBackward"


# DDP ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("off", {}),
        ("off", {"grad_selections": 1}),
        ("reentrant", {"selection_chunk_size": 1}),
        ("non-reentrant", {"grad_selections": 2, "selection_chunk_size": 1, "credit": "causal"}),
    ],
    ids=["whole", "G1", "C1-reentrant", "G2-C1-causal-checkpointed"],
)
def test_ddp_equals_one_process(
    kind, options, make_remix, make_batch, take_grads, random_selections, assert_same,
    tmp_path,
):  # fmt: skip
    model, batch = make_remix(), make_batch((10, 7, 9, 8))
    index = random_selections(model, (3, 4, 10))  # [M, B, T, k]
    torch.save((model, batch, index, kind, options), tmp_path / "inputs.pt")
    _checkpointed(model, kind)
    with force_selection(model, {n: i.flatten(0, 1) for n, i in index.items()}):
        loss = _in_parts(model, batch, None, **options)
    loss.backward()
    want = take_grads(model)
    run_on_two_ranks(_ddp_rank, str(tmp_path))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), want, 2e-6)


def _ddp_rank(rank, folder):
    """One of two processes: half the batch, gradients averaged by DDP."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    torch.distributed.init_process_group("gloo")
    model, batch, index, kind, options = torch.load(f"{folder}/inputs.pt", weights_only=False)
    _checkpointed(model, kind)
    count = (batch["labels"][:, 1:] != -100).sum()
    half = slice(2 * rank, 2 * rank + 2)
    wrapped, reduced = nn.parallel.DistributedDataParallel(model), []

    def reduce(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, reduce)
    half_batch = {k: v[half] for k, v in batch.items()}
    with force_selection(model, {n: i[:, half].flatten(0, 1) for n, i in index.items()}):
        loss = _in_parts(wrapped, half_batch, count / 2, **options)  # DDP averages over two ranks
    loss.backward()
    assert reduced == [0], "gradients are reduced once, with the last part"
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, f"{folder}/{rank}.pt")


def _checkpointed(model, kind):
    model.train()
    if kind != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


def _in_parts(model, batch, num_items, **options):
    with sample_routing(model, num_selections=3, seed=0, **options) as routing:
        for part in routing.parts(batch):
            routing.add(*token_losses(model, part))
        return routing.loss(num_items=num_items)

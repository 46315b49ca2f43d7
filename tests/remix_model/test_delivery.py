"""The router's gradient arrives however the backward pass runs: checkpointed, scaled, late."""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from remix_model import (
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)

KINDS = ("off", "reentrant", "non-reentrant")
CHECKPOINTED = KINDS[1:]


@pytest.fixture
def grads_of(make_remix, make_batch, sampled_loss, take_grads, checkpointing):
    """grads_of(kind, seed=0): gradients of one sampled step under a kind of checkpointing."""

    def run(kind, seed=0, config=None, **options):
        model = checkpointing(make_remix(**(config or {})), kind)
        loss, _ = sampled_loss(model, make_batch(), seed=seed, **options)
        loss.backward()
        return take_grads(model)

    return run


# Activation checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"router_detach_input": False}, {}, id="undetached"),
        pytest.param({"router_temperature": 0.5}, {"logprob_tokens": "response"}, id="response"),
    ],
)
def test_checkpointing_changes_no_gradient(kind, config, options, grads_of, assert_same):
    want = grads_of("off", config=config, **options)
    assert all(float(grad.norm()) > 0 for grad in want.values())
    assert_same(grads_of(kind, config=config, **options), want, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_forced_selection_inside_sampling_is_replayed(
    kind, make_remix, make_batch, sampled_loss, take_grads, checkpointing, random_selections
):
    """The backward pass runs after force_selection has ended; its experts are still recomputed."""
    results = []
    for backward_inside in (True, False):
        model = checkpointing(make_remix(), kind)
        with force_selection(model, random_selections(model, (9, 10))):
            loss, _ = sampled_loss(model, make_batch())
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        results.append(take_grads(model))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_forced_selection_without_sampling_is_replayed(
    kind, make_remix, make_batch, take_grads, checkpointing, random_selections, assert_same
):
    """As above for a plain training pass: forced in the forward pass, so forced when recomputed."""
    results = []
    for when in ("off", kind):
        model = checkpointing(make_remix(), when)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with force_selection(model, random_selections(model)):
                loss = model(**make_batch()).loss
            loss.backward()
        results.append(take_grads(model))
    routerless = [{n: g for n, g in r.items() if "router" not in n} for r in results]
    assert_same(routerless[1], routerless[0], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_the_context(
    kind, grads_of, make_remix, make_batch, take_grads, checkpointing
):
    model = checkpointing(make_remix(), kind)
    with sample_routing(model, num_selections=3, seed=0) as routing:
        losses, mask = token_losses(model, routing.expand(make_batch()))
        routing.loss(losses, mask).backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-second", "second-first"])
def test_two_contexts_then_their_backward_passes(
    kind, order, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """Each backward pass replays its own context's draw, in either order."""
    model = checkpointing(make_remix(), kind)
    losses = [sampled_loss(model, make_batch(), seed=seed)[0] for seed in (0, 1)]
    for which in order:
        losses[which].backward()
        got = take_grads(model)
        for name, want in grads_of(kind, seed=which).items():
            assert torch.equal(got[name], want), (which, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True], ids=["loss-at-once", "losses-last"])
def test_one_backward_pass_for_two_contexts(
    kind, late, grads_of, make_remix, make_batch, take_grads, checkpointing, assert_same
):
    """(first + second).backward(): right, or refused where recomputation cannot tell."""
    model = checkpointing(make_remix(), kind)
    parts = []
    for seed in (0, 1):
        with sample_routing(model, num_selections=3, seed=seed) as routing:
            losses = token_losses(model, routing.expand(make_batch()))
            parts.append((routing, losses) if late else routing.loss(*losses))
    if late:
        parts = [routing.loss(*losses) for routing, losses in parts]
    try:
        sum(parts).backward()
    except RuntimeError as error:
        assert kind != "off"
        assert late  # else the first loss's recomputations are over before the second's begin
        assert "sample_routing" in str(error)
        return
    first, second = grads_of("off", seed=0), grads_of("off", seed=1)
    assert_same(take_grads(model), {n: first[n] + second[n] for n in first}, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsampled_pass_is_not_replayed_as_sampled(
    kind, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """A plain training step after a sampled one: top-k, recomputed too; router gradient zero."""

    def plain(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**make_batch()).loss.backward()
        return take_grads(model)

    want = plain(checkpointing(make_remix(), "off"))
    model = checkpointing(make_remix(), kind)
    sampled_loss(model, make_batch((10, 7, 9) * 3), num_selections=2)[0].backward()
    take_grads(model)
    sampled_loss(model, make_batch(), num_selections=2)  # whose backward pass never comes
    got = plain(model)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
        assert "router" not in name or not grad.any()


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_other_passes_between_forward_and_backward(
    kind, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """Generating or evaluating between the loss and its backward pass changes nothing."""
    model = checkpointing(make_remix(), kind)
    batch = make_batch()
    loss, _ = sampled_loss(model, batch)
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
        model.eval()
        model(input_ids=batch["input_ids"][:1])
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**batch)
    loss.backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_counted_once(
    kind, make_remix, make_batch, sampled_loss, checkpointing, take_grads
):
    model = checkpointing(make_remix(), kind)
    with record_routing(model) as record:
        loss, _ = sampled_loss(model, make_batch())
        loss.backward()
    for layer in record.stats().layers:
        assert layer.tokens == 3 * (10 + 7 + 9)


class Checkpointed(nn.Module):
    """Two routed modules, each call checkpointed; `calls` times over."""

    def __init__(self, kind: str, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
        options |= {"router_init_range": 0.7}
        self.first = RoutedLoRALinear(nn.Linear(5, 5), **options).double()
        self.second = RoutedLoRALinear(nn.Linear(5, 5), **options).double()
        self.kind, self.calls = kind, calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.block(x) if self.kind == "off" else self.checkpointed(x)
        return x

    def checkpointed(self, x):
        return checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")

    def block(self, x):
        return self.second(torch.tanh(self.first(x)))

    def sampled(self, x, seed=0):
        with sample_routing(self, num_selections=2, seed=seed) as routing:
            return routing.loss(self(routing.expand({"x": x})["x"]).square().sum(-1))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()


def test_a_module_run_twice(x, take_grads, assert_same):
    """Each call draws for itself, and its gradient is that of both draws."""
    model = Checkpointed("off", calls=2)
    with sample_routing(model, num_selections=2, seed=0) as routing:
        loss = routing.loss(model(routing.expand({"x": x})["x"]).square().sum(-1))
    loss.backward()
    got = take_grads(model)
    calls = routing.selections[model.first.site.stream]
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    # The same draws, replayed by an unrolled copy whose four modules share the parameters.
    parts = [nn.ModuleList([_twin(model.first), _twin(model.second)]) for _ in range(2)]
    unrolled = nn.ModuleList(parts)
    selections = {
        f"{call}.{i}": routing.selections[module.site.stream][call]
        for call in range(2)
        for i, module in enumerate((model.first, model.second))
    }
    with sample_routing(unrolled, num_selections=2, seed=0) as routing:
        h = routing.expand({"x": x})["x"]
        with force_selection(unrolled, selections):
            for first, second in parts:
                h = second(torch.tanh(first(h)))
        routing.loss(h.square().sum(-1)).backward()
    assert_same(got, take_grads(model), 1e-12)


def _twin(module: RoutedLoRALinear) -> RoutedLoRALinear:
    twin = RoutedLoRALinear(
        module.base_layer, num_experts=module.num_experts, top_k=module.top_k, r=module.r
    )
    twin.lora_A, twin.lora_B, twin.router = module.lora_A, module.lora_B, module.router
    return twin


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_module_run_twice_cannot_be_recomputed(kind, x):
    loss = Checkpointed(kind, calls=2).sampled(x)
    with pytest.raises(RuntimeError, match=r"ran 2 times .* one context for each forward pass"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_over_part_of_the_model_leaves_older_draws_alone(kind, x, take_grads):
    """A context on one module numbers modules anew; the whole model's draw is still replayed."""
    results = []
    for other_context in (False, True):
        model = Checkpointed(kind)
        loss = model.sampled(x)
        if other_context:
            with sample_routing(model.second, num_selections=2, seed=9) as routing:
                model.second(routing.expand({"x": x})["x"])
        loss.backward()
        results.append(take_grads(model))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_backward_pass_that_failed(kind, x, take_grads):
    """An exception in the backward pass does not make later plain passes replay its draw."""

    def plain(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.cat([x, x])).square().sum().backward()
        return take_grads(model)

    want = plain(Checkpointed(kind))
    model = Checkpointed(kind)
    loss = model.sampled(x)
    handle = model.first.lora_A.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    got = plain(model)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


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


# DDP ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_equals_one_process(
    make_remix, make_batch, sampled_loss, take_grads, random_selections, assert_same, tmp_path
):
    model, batch = make_remix().train(), make_batch((10, 7, 9, 8))
    index = random_selections(model, (3, 4, 10))  # [M, B, T, k]
    torch.save((model, batch, index), tmp_path / "inputs.pt")
    with force_selection(model, {n: i.flatten(0, 1) for n, i in index.items()}):
        loss, _ = sampled_loss(model, batch)
    loss.backward()
    want = take_grads(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.spawn(_ddp_rank, (port, str(tmp_path)), nprocs=2, join=False)
    if not any(ranks.join(timeout=10) for _ in range(30)):
        for process in ranks.processes:
            process.kill()
        pytest.fail("the two processes did not end within five minutes")
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), want, 2e-6)


def _ddp_rank(rank, port, folder):
    """One of two processes: half the batch, gradients averaged by DDP."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, batch, index = torch.load(f"{folder}/inputs.pt", weights_only=False)
    count = (batch["labels"][:, 1:] != -100).sum()
    half = slice(2 * rank, 2 * rank + 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with sample_routing(model, num_selections=3, seed=0) as routing:
        folded = routing.expand({k: v[half] for k, v in batch.items()})
        with force_selection(model, {n: i[:, half].flatten(0, 1) for n, i in index.items()}):
            losses, mask = token_losses(wrapped, folded)
        loss = routing.loss(losses, mask, num_items=count / 2)  # DDP averages over two ranks
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes never let an interpreter end by itself

"""Every estimator of the routers' gradient against plain autograd, and what each refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from remix_model import (
    force_selection,
    sample_routing,
    token_losses,
)
from remix_model.batch import prompt_positions
from remix_model.credit import advantage_scale, causal_returns, leave_one_out
from remix_model.eligibility import CAUSAL_BLOCKS, block_starts
from remix_model.granularity import pool
from remix_model.site import find_sites
from tests.helpers import selection_log_prob_eager
from tests.remix_model.step_helpers import CONFIGS, random, run


def log_prob(logits, index, unordered):
    """Of the order, or of the set: the sum over all orders."""
    orders = itertools.permutations(range(index.shape[-1])) if unordered else [...]
    each = [selection_log_prob_eager(logits, index[..., order]) for order in orders]
    return torch.stack(each).logsumexp(0)


# Credits ----------------------------------------------------------------------------------------


def test_causal_returns_are_a_double_loop():
    losses = random(3, 2, 5)
    want = torch.zeros_like(losses)
    for m, b in itertools.product(range(3), range(2)):
        for s in range(5):
            for t in range(s, 5):
                want[m, b, s] += losses[m, b, t]
    torch.testing.assert_close(causal_returns(losses), want)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_leave_one_out_by_hand(mean):
    returns = random(4, 3) + mean
    for m in range(4):
        others = torch.stack([returns[i] for i in range(4) if i != m]).mean(0)
        torch.testing.assert_close(leave_one_out(returns)[m], (returns[m] - others) / 4)


def test_advantage_scale_by_hand():
    losses = random(4, 3)
    spread = losses.std(0, correction=0)
    assert advantage_scale(losses, "none") == 1.0
    torch.testing.assert_close(advantage_scale(losses, "input"), 1 / spread[:, None] / 3)
    both = advantage_scale(losses, "batch")
    torch.testing.assert_close(
        both, torch.full((3, 1), 1 / float(spread.square().mean().sqrt()) / 3, dtype=torch.float64)
    )
    losses[:, 1] = torch.tensor([1.0, 1 + 2**-52, 1.0, 1 + 2**-52])  # as far apart as rounding
    scale = advantage_scale(losses, "input")
    assert scale[1] == 0 and scale[0] > 0


# The delivered gradient equals plain autograd's --------------------------------------------------


def surrogate_grads(
    model,
    batch,
    selections,
    *,
    credit,
    unordered,
    response,
    grad_selections=None,
    num_selections=3,
    num_items=None,
):
    """Autograd of mean loss + sum of advantage * log Q, written as loops over selections.

    Selections without a graph answer for blocks of positions under causal credit, as documented.
    """
    inputs, hooks = {}, []
    modules = dict(model.named_modules())
    for name in selections:

        def keep(module, args, name=name):
            inputs[name] = args[0].detach()

        hooks.append(modules[name].register_forward_pre_hook(keep))
    folded = {key: torch.cat([value] * num_selections) for key, value in batch.items()}
    model.eval()
    with force_selection(model, selections):
        logits = model(
            input_ids=folded["input_ids"], attention_mask=folded["attention_mask"]
        ).logits
    for hook in hooks:
        hook.remove()
    m, (b, t) = num_selections, batch["input_ids"].shape
    loss = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), folded["labels"][:, 1:], reduction="none"
    ).view(m, b, t - 1)
    loss = loss / (num_items or int((batch["labels"][:, 1:] != -100).sum()))
    fixed = nn.functional.pad(loss.detach(), (0, 1))
    returns = fixed.sum(-1, keepdim=True).expand(m, b, t).clone()
    if credit == "causal":
        for s in range(t):
            returns[..., s] = fixed[..., s:].sum(-1)
    advantages = leave_one_out(returns)
    graph = grad_selections or m
    if credit == "causal":
        starts = block_starts(t, CAUSAL_BLOCKS)
        for start, end in zip(starts, [*starts[1:], t], strict=True):
            advantages[graph:, :, start:end] = advantages[graph:, :, start : start + 1]
    counted = folded["attention_mask"].bool().view(m, b, t)
    if response:
        predicts = torch.zeros_like(folded["labels"], dtype=torch.bool)
        predicts[:, :-1] = folded["labels"][:, 1:] != -100
        counted = counted & predicts.view(m, b, t)
    total = loss[:graph].sum() / graph
    for name in selections:
        site, router = next(iter(modules[name].active_sites().values()))
        if site.per_sequence:
            read = pool(inputs[name], prompt_positions(folded), name)
            log_q = log_prob(read @ router.T, selections[name], unordered)
            total = total + (log_q.view(m, b) * advantages[..., 0]).sum()
        else:
            log_q = log_prob(inputs[name] @ router.T, selections[name], unordered)
            total = total + (log_q.view(m, b, t) * counted * advantages).sum()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


CASES = [
    pytest.param({}, {}, id="paper"),
    pytest.param({"credit": "causal"}, {}, id="causal"),
    pytest.param({"log_prob": "unordered"}, {}, id="unordered"),
    pytest.param({"credit": "causal", "log_prob": "unordered"}, {}, id="causal-unordered"),
    pytest.param({"credit": "causal", "logprob_tokens": "response"}, {}, id="causal-response"),
    pytest.param({"credit": "causal"}, {"num_items": 37}, id="causal-num-items"),
    pytest.param({"grad_selections": 1}, {}, id="G1"),
    pytest.param({"grad_selections": 2, "log_prob": "unordered"}, {}, id="G2-unordered"),
    pytest.param({"grad_selections": 1, "credit": "causal"}, {}, id="G1-causal"),
    pytest.param(
        {
            "grad_selections": 2,
            "credit": "causal",
            "log_prob": "unordered",
            "logprob_tokens": "response",
        },
        {"num_items": 41},
        id="G2-causal-unordered-response-num-items",
    ),
]


@pytest.mark.parametrize(("options", "extra"), CASES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_delivered_gradient_equals_autograd(
    options, extra, left, config, make_remix, make_batch, take_grads, assert_same
):
    model, batch = make_remix(**config).train(), make_batch((10, 7, 9))
    if left:
        batch = {key: value.flip(1) for key, value in batch.items()}
        batch["labels"][:, :-4] = -100
    _, _, selections = run(model, batch, **options, **extra)
    got = take_grads(model)
    want = surrogate_grads(
        model,
        batch,
        selections,
        credit=options.get("credit", "sequence"),
        unordered=options.get("log_prob") == "unordered",
        response=options.get("logprob_tokens") == "response",
        grad_selections=options.get("grad_selections"),
        **extra,
    )
    assert_same(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"credit": "causal", "log_prob": "unordered"},
        {"grad_selections": 1},
        {"selection_chunk_size": 1, "credit": "causal"},
    ],
    ids=["paper", "causal-unordered", "G1", "C1-causal"],
)
@pytest.mark.parametrize("change", ["padding", "order"])
def test_forced_gradients_do_not_depend_on(
    change, options, make_remix, make_batch, take_grads, assert_same, random_selections
):
    """... padding or the order of the batch, when the selections go along."""
    model, batch = make_remix().train(), make_batch((10, 7, 9))
    selections = random_selections(model, (3, 3, 10))
    flat = lambda s: {name: index.flatten(0, 1) for name, index in s.items()}  # noqa: E731
    with force_selection(model, flat(selections)):
        run(model, batch, **options)
    want = take_grads(model)
    if change == "order":
        order = torch.tensor([2, 0, 1])
        batch = {key: value[order] for key, value in batch.items()}
        selections = {name: index[:, order] for name, index in selections.items()}
    else:
        if options.get("grad_selections") and options.get("credit") == "causal":
            pytest.skip("blocks of positions depend on the length")
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {k: nn.functional.pad(v, (0, 3), value=fill[k]) for k, v in batch.items()}
        selections = {n: torch.cat((i, i[:, :, :3]), 2) for n, i in selections.items()}
    with force_selection(model, flat(selections)):
        run(model, batch, **options)
    assert_same(take_grads(model), want, 1e-6)


# Terms that bias ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1])
def test_regularizers_by_autograd(size, make_remix, make_batch, take_grads, assert_same):
    """What they add to the routers' gradient is that of their formulas, by autograd."""
    model, batch = make_remix(router_temperature=1.5).train(), make_batch()
    options = {"selection_chunk_size": size}
    inputs = {}
    modules = dict(model.named_modules())
    sites = find_sites(model)
    run(model, batch, **options)
    plain = take_grads(model)
    _, _, selections = run(
        model, batch, router_entropy_coef=0.3, load_balancing_coef=0.7, scale=2.0, **options
    )
    got = take_grads(model)
    hooks = [
        modules[name].register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].detach()})
        )
        for name in sites
    ]
    folded = {key: torch.cat([value] * 3) for key, value in batch.items()}
    model.eval()
    with force_selection(model, selections), torch.no_grad():
        model(input_ids=folded["input_ids"], attention_mask=folded["attention_mask"])
    for hook in hooks:
        hook.remove()
    total = 0.0
    for name, (_, router) in ((n, next(iter(modules[n].active_sites().values()))) for n in sites):
        x = inputs[name].unflatten(0, (3, -1))
        chosen = selections[name].long().unflatten(0, (3, -1))
        kept = folded["attention_mask"].bool().unflatten(0, (3, -1))
        for p in range(3):
            q = (x[p][kept[p]] @ router.T / 1.5).softmax(-1)
            share = nn.functional.one_hot(chosen[p][kept[p]], 4).sum((0, 1)) / kept[p].sum() / 2
            entropy = -(q * q.log()).sum(-1).mean()
            total = total + (-0.3 * entropy + 0.7 * 4 * (share * q.mean(0)).sum()) / 3
    total = 2.0 * total / len(sites)
    routers = {n: p for n, p in model.named_parameters() if "router" in n}
    grads = torch.autograd.grad(total, list(routers.values()))
    want = {n: 2 * plain[n] + g for n, g in zip(routers, grads, strict=True)}
    assert_same({n: got[n] for n in routers}, want)
    loras = [n for n in got if n not in routers]
    assert_same({n: got[n] for n in loras}, {n: 2 * plain[n] for n in loras})


def test_temperature_is_that_of_another_policy(make_remix, make_batch, take_grads, assert_same):
    """temperature=2 samples and scores as routers scaled by a half do."""
    batch, model = make_batch(), make_remix().train()
    _, _, hot = run(model, batch, temperature=2.0)
    got = take_grads(model)
    other = make_remix(router_temperature=2.0).train()
    _, _, same = run(other, batch)
    assert all(torch.equal(hot[name], same[name]) for name in hot)
    assert_same(got, take_grads(other))


# What it refuses ----------------------------------------------------------------------------------


def test_causal_credit_needs_positions(make_remix, make_batch):
    model, batch = make_remix().train(), make_batch()
    with sample_routing(model, 2, credit="causal", seed=0) as routing:
        losses, mask = token_losses(model, routing.expand(batch))
        with pytest.raises(ValueError, match=r"\[6\].*one loss a sequence.*credit='sequence'"):
            routing.loss(losses.sum(1))
        loss = routing.loss(losses[:, :4], mask[:, :4])
        with pytest.raises(ValueError, match=r"each of the layer's 10 positions.*had 4"):
            loss.backward()


def test_causal_credit_needs_a_causal_model(make_remix):
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM(
        BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
        )
    )
    model = make_remix(bert, target_modules=["intermediate.dense"])
    with (
        pytest.raises(ValueError, match=r"credit='causal'.*attends to later.*'sequence'"),
        sample_routing(model, 2, credit="causal", seed=0),
    ):
        pass
    with sample_routing(model, 2, credit="sequence", seed=0):
        pass

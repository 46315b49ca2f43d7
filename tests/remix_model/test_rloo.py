"""The router's gradient: against plain autograd, and against the enumerated expected loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import remix_model.site
from remix_model import (
    RoutedLoRALinear,
    force_selection,
    rloo_surrogate,
    sample_routing,
    token_losses,
)
from remix_model.random_state import mix_seed
from remix_model.site import find_sites
from tests.helpers import selection_log_prob_eager


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# rloo_surrogate itself -------------------------------------------------------------------------


@pytest.mark.parametrize("num_selections", [2, 3, 5])
def test_surrogate_by_hand(num_selections):
    losses = random(num_selections, 4).requires_grad_()
    log_probs = random(num_selections, 4, seed=1).requires_grad_()
    value = rloo_surrogate(losses, log_probs)
    torch.testing.assert_close(value, losses.mean(0).sum())
    value.backward()
    torch.testing.assert_close(losses.grad, torch.full_like(losses, 1 / num_selections))
    for m in range(num_selections):
        # (L_m - mean)/(M-1) is L_m minus the mean of the others, over M.
        others = [losses[i].detach() for i in range(num_selections) if i != m]
        baseline = torch.stack(others).mean(0)
        want = (losses[m].detach() - baseline) / num_selections
        torch.testing.assert_close(log_probs.grad[m], want)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((6,), (6,)), ((1, 3), (1, 3))])
def test_surrogate_refuses(shapes):
    with pytest.raises(ValueError, match=r"\[M, B\]|M >= 2"):
        rloo_surrogate(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# The delivered gradient equals the surrogate's ------------------------------------------------


def surrogate_grads(
    model, routing, folded, sequence_losses, temperature=1.0, detach=True, leaves=None
):
    """RLOO in plain autograd: the recorded selections forced, log Q from the layers' inputs.

    sequence_losses(model, folded) returns [M * B], divided by N. Gradients are those of the
    trainable parameters and of the tensors in `leaves`, by name.
    """
    inputs, hooks = {}, []
    selections = {}
    modules = dict(model.named_modules())
    for name, site in find_sites(model).items():
        (selections[name],) = routing.selections[site.stream]

        def keep(module, args, name=name):
            inputs[name] = args[0]

        hooks.append(modules[name].register_forward_pre_hook(keep))
    model.eval()
    with force_selection(model, selections):
        losses = sequence_losses(model, folded)
    for hook in hooks:
        hook.remove()
    counted = torch.ones(1, dtype=torch.bool)
    for mask in (routing.folded.valid, routing.folded.sampled):
        counted = counted if mask is None else counted & mask
    log_prob = 0.0
    for name, (_, router) in (
        (n, next(iter(modules[n].active_sites().values()))) for n in selections
    ):
        x = inputs[name].detach() if detach else inputs[name]
        z = x @ router.T / temperature
        log_prob = log_prob + (selection_log_prob_eager(z, selections[name]) * counted).sum(-1)
    shape = (routing.num_selections, -1)
    loss = rloo_surrogate(losses.view(shape), log_prob.view(shape))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | (leaves or {})
    grads = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, grads, strict=True)), loss


def language_loss(num_items):
    def losses(model, folded):
        inputs = {k: v for k, v in folded.items() if k != "labels"}
        logits, targets = model(**inputs).logits[:, :-1], folded["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return loss.sum(1) / num_items

    return losses


@pytest.mark.parametrize(
    ("sizes", "config", "options", "num_items"),
    [
        pytest.param((8, 8), {}, {}, None, id="full"),
        pytest.param((10, 7, 9), {}, {}, None, id="padding"),
        pytest.param((10, 7, 9), {}, {"num_selections": 2}, None, id="M2"),
        pytest.param((10, 7, 9), {"top_k": 1}, {}, None, id="k1"),
        pytest.param((10, 7, 9), {"top_k": 4}, {}, None, id="k4-of-4"),
        pytest.param((10, 7, 9), {}, {"logprob_tokens": "response"}, None, id="response"),
        pytest.param((10, 7, 9), {}, {}, 37, id="num-items"),
        pytest.param((10, 7, 9), {}, {}, torch.tensor(37), id="num-items-tensor"),
        pytest.param((10, 7, 9), {"router_temperature": 0.5}, {}, None, id="temperature"),
        pytest.param((10, 7, 9), {"router_detach_input": False}, {}, None, id="undetached"),
        pytest.param(
            (10, 7, 9),
            {"router_detach_input": False, "router_temperature": 2.0},
            {"logprob_tokens": "response", "num_selections": 4},
            None,
            id="undetached-temperature-response",
        ),
    ],
)
def test_delivered_gradient_equals_surrogate(
    sizes, config, options, num_items, make_remix, make_batch, take_grads, assert_same
):
    model, batch = make_remix(**config).train(), make_batch(sizes)
    with sample_routing(model, **{"num_selections": 3, "seed": 5, **options}) as routing:
        folded = routing.expand(batch)
        loss = routing.loss(*token_losses(model, folded), num_items)
    loss.backward()
    got = take_grads(model)
    count = int((batch["labels"][:, 1:] != -100).sum()) if num_items is None else int(num_items)
    want, surrogate = surrogate_grads(
        model,
        routing,
        folded,
        language_loss(count),
        config.get("router_temperature", 1.0),
        config.get("router_detach_input", True),
    )
    torch.testing.assert_close(loss.double(), surrogate, rtol=1e-6, atol=0)
    assert_same(got, want)


def test_delivered_gradient_of_sequence_losses(make_remix, make_batch, take_grads, assert_same):
    """[M * B] losses, one a sequence; the normaliser is then the number of sequences."""
    model, batch = make_remix().train(), make_batch()
    squares = lambda model, folded: (  # noqa: E731
        model(input_ids=folded["input_ids"], attention_mask=folded["attention_mask"])
        .logits[:, 4]
        .square()
        .mean(-1)
    )
    with sample_routing(model, num_selections=3, seed=5) as routing:
        folded = routing.expand(batch)
        loss = routing.loss(squares(model, folded))
    loss.backward()
    want, _ = surrogate_grads(model, routing, folded, lambda *a: squares(*a) / 3)
    assert_same(take_grads(model), want)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "undetached"])
@pytest.mark.parametrize("as_rows", [False, True], ids=["BTD", "rows"])
def test_delivered_gradient_of_plain_modules(detach, as_rows, assert_same, take_grads):
    """Without PEFT: two modules, input gradient included; also with rows [M B T, in]."""
    torch.manual_seed(0)
    options = {"num_experts": 5, "top_k": 2, "r": 2, "init_lora_weights": False}
    options |= {"router_init_range": 0.7, "router_detach_input": detach}
    model = nn.Sequential(
        RoutedLoRALinear(nn.Linear(6, 4), **options),
        nn.Tanh(),
        RoutedLoRALinear(nn.Linear(4, 3), **options),
    ).double()
    x = random(2, 3, 6).requires_grad_()
    with sample_routing(model, num_selections=3, seed=1) as routing:
        folded = routing.expand({"x": x})["x"]
        y = model(folded.flatten(0, 1) if as_rows else folded).view(6, 3, 3)
        routing.loss(y.square().sum(-1)).backward()
    got, dx = take_grads(model), x.grad
    if as_rows:
        routing.selections = {
            s: [i.view(6, 3, 2) for i in v] for s, v in routing.selections.items()
        }
    leaf = x.detach().clone().requires_grad_()
    want, _ = surrogate_grads(
        model,
        routing,
        {"x": torch.cat([leaf] * 3)},
        lambda model, folded: model(folded["x"]).square().sum((1, 2)) / 6,
        detach=detach,
        leaves={"dx": leaf},
    )
    assert_same({**got, "dx": dx}, want)


# Its mean over many draws equals the enumerated gradient of the expected loss -------------------


class Routed(nn.Module):
    """One or two routed modules, the positions mixed causally between them."""

    def __init__(self, layers: int, n: int, k: int, detach: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"num_experts": n, "top_k": k, "r": 2, "init_lora_weights": False}
        options |= {"router_init_range": 0.7, "router_detach_input": detach}
        self.layers = nn.ModuleList(
            RoutedLoRALinear(nn.Linear(4, 4), **options) for _ in range(layers)
        ).double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)).cumsum(1)
        return x.sum(-1)


def enumerated_gradient(model, x, target, parameters):
    """d/d parameters of the sum over all J of Q(J) L(J), every position of every layer drawing.

    Where a layer detaches the router's input, so does this.
    """
    n, k = model.layers[0].num_experts, model.layers[0].top_k
    orders = torch.tensor(list(itertools.permutations(range(n), k)))
    positions = x.shape[1]
    sites = positions * len(model.layers)
    joint = torch.tensor(list(itertools.product(range(len(orders)), repeat=sites)))
    index = orders[joint].view(len(joint), len(model.layers), positions, k)
    log_q, hidden = 0.0, x.expand(len(joint), -1, -1)
    selections = {f"layers.{i}": index[:, i] for i in range(len(model.layers))}
    model.eval()
    with force_selection(model, selections):
        for i, layer in enumerate(model.layers):
            routed = hidden.detach() if layer.router_detach_input else hidden
            log_q = log_q + selection_log_prob_eager(routed @ layer.router.T, index[:, i]).sum(-1)
            hidden = torch.tanh(layer(hidden)).cumsum(1)
    losses = (hidden.sum(-1) - target).square().sum(-1) / positions
    torch.testing.assert_close(log_q.exp().sum().item(), 1.0)
    return torch.autograd.grad((log_q.exp() * losses).sum(), parameters)


def projected_errors(model, num_selections, positions=2, replicas=400, seeds=64):
    """(mean sampled - enumerated) / standard error, on 8 random directions of routers and of LoRAs.

    64 seeds x 400 copies of one input: 25600 independent RLOO estimates.
    """
    x, target = random(1, positions, 4, seed=3), random(1, positions, seed=4)
    groups = {
        "router": [layer.router for layer in model.layers],
        "lora": [p for layer in model.layers for p in (layer.lora_A, layer.lora_B)],
    }
    parameters = groups["router"] + groups["lora"]
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    exact = flat(enumerated_gradient(model, x, target, parameters))
    model.train()
    draws = []
    for seed in range(seeds):
        with sample_routing(model, num_selections=num_selections, seed=seed) as routing:
            batch = routing.expand({"x": x.expand(replicas, -1, -1)})
            loss = routing.loss((model(batch["x"]) - target).square())
        draws.append(flat(torch.autograd.grad(loss, parameters)))
    draws = torch.stack(draws)
    edge = sum(p.numel() for p in groups["router"])
    errors = {}
    for name, part in (("router", slice(0, edge)), ("lora", slice(edge, None))):
        directions = random(exact[part].numel(), 8, seed=9)
        sampled = draws[:, part] @ directions
        spread = sampled.std(0) / seeds**0.5
        errors[name] = (sampled.mean(0) - exact[part] @ directions) / spread
    return errors


@pytest.mark.parametrize(
    ("layers", "n", "k", "num_selections", "detach"),
    [
        pytest.param(1, 4, 1, 2, True, id="1layer-n4-k1-M2"),
        pytest.param(1, 4, 2, 4, True, id="1layer-n4-k2-M4"),
        pytest.param(2, 3, 1, 4, True, id="2layers-n3-k1-M4"),
        pytest.param(2, 3, 2, 2, True, id="2layers-n3-k2-M2"),
        pytest.param(2, 3, 2, 4, False, id="2layers-n3-k2-M4-undetached"),
        pytest.param(2, 4, 2, 4, True, id="2layers-n4-k2-M4"),
    ],
)
def test_mean_gradient_is_that_of_the_expected_loss(layers, n, k, num_selections, detach):
    errors = projected_errors(Routed(layers, n, k, detach), num_selections)
    for name, error in errors.items():
        assert error.abs().max() < 4.0, (name, error)


def test_a_shared_stream_is_detected(monkeypatch):
    """One stream for both layers correlates their draws: the same comparison must notice."""
    monkeypatch.setattr(
        remix_model.site, "mix_seed", lambda seed, stream, call: mix_seed(seed, 0, call)
    )
    errors = projected_errors(Routed(2, 3, 2), num_selections=4)
    assert errors["router"].abs().max() > 8.0


def test_a_shared_stream_passes_with_one_layer(monkeypatch):
    """... and only two layers can notice it, which is why the test above exists."""
    monkeypatch.setattr(
        remix_model.site, "mix_seed", lambda seed, stream, call: mix_seed(seed, 0, call)
    )
    errors = projected_errors(Routed(1, 3, 2), num_selections=4)
    assert errors["router"].abs().max() < 4.0

"""Every estimator's mean is the gradient of the expected loss, which tiny models let us enumerate.

Two layers, each of two routed modules in a causal model of a few positions: every joint choice of
experts is run once, weighted by its probability, and differentiated. Thousands of sampled steps
must average to that, within 4 standard errors on 8 random directions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from remix_model import RoutedLoRALinear, force_selection, sample_routing
from remix_model.granularity import pool
from remix_model.site import find_sites
from tests.helpers import selection_log_prob_eager

REPLICAS, SEEDS = 400, 64  # 25600 draws


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Mixer(nn.Module):
    """Layers of routed modules, side by side and one after another; later positions see earlier."""

    def __init__(self, layers: int, wide: bool, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"r": 2, "init_lora_weights": False, "router_init_range": 0.9, **options}
        make = lambda: RoutedLoRALinear(nn.Linear(3, 3), **options)  # noqa: E731
        self.layers = nn.ModuleList(
            nn.ModuleList(make() for _ in range(2 if wide else 1)) for _ in range(layers)
        ).double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(sum(module(x) for module in layer)).cumsum(1)
        return x.sum(-1)


def losses_of(model, x, target):
    """[rows, T]: the loss from every position."""
    return (model(x) - target).square() / x.shape[1]


def prompt_of(x):
    """The first position: what sequence routing reads."""
    return (torch.arange(x.shape[1]) == 0).expand(len(x), -1)


def exact_gradient(model, x, target, parameters):
    """d/d parameters of sum_J Q(J) L(J), over all joint choices J."""
    sites = find_sites(model)
    site = next(iter(sites.values()))
    orders = torch.tensor(list(itertools.permutations(range(site.num_experts), site.top_k)))
    width = 1 if site.per_sequence else x.shape[1]
    decisions = width * len(sites)
    assert decisions <= 8
    joint = torch.tensor(list(itertools.product(range(len(orders)), repeat=decisions)))
    index = orders[joint].view(len(joint), len(sites), width, site.top_k)
    forced = {
        name: index[:, i, 0] if site.per_sequence else index[:, i] for i, name in enumerate(sites)
    }
    rows, seen, hooks = x.expand(len(joint), -1, -1), {}, []
    modules = dict(model.named_modules())
    for name in sites:
        keep = lambda module, args, name=name: seen.update({name: args[0].detach()})  # noqa: E731
        hooks.append(modules[name].register_forward_pre_hook(keep))
    model.eval()
    with force_selection(model, forced):
        # Outside sampling a plain module reads the whole input; its experts are forced anyway.
        losses = losses_of(model, rows, target).sum(1)
    for hook in hooks:
        hook.remove()
    log_q = 0.0
    for name in sites:
        read = pool(seen[name], prompt_of(rows), name) if site.per_sequence else seen[name]
        log_q = log_q + selection_log_prob_eager(
            read @ modules[name].router.T, forced[name]
        ).reshape(len(joint), -1).sum(1)
    torch.testing.assert_close(log_q.exp().sum().item(), 1.0)
    return torch.autograd.grad((log_q.exp() * losses).sum(), parameters)


def errors_of(model, positions, num_selections=4, **options):
    """(mean - exact) / standard error on 8 directions, of the routers and of the LoRAs."""
    x, target = random(1, positions, 3, seed=3), random(1, positions, seed=4)
    groups = {"router": [], "lora": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["router" if "router" in name else "lora"].append(parameter)
    parameters = groups["router"] + groups["lora"]
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    exact = flat(exact_gradient(model, x, target, parameters))
    model.train()
    draws = []
    batch = {"x": x.expand(REPLICAS, -1, -1)}
    batch["prompt_mask"] = prompt_of(batch["x"])
    for seed in range(SEEDS):
        with sample_routing(model, num_selections, seed=seed, **options) as routing:
            for part in routing.parts(batch):
                routing.add(losses_of(model, part["x"], target))
            loss = routing.loss(num_items=REPLICAS)
        draws.append(flat(torch.autograd.grad(loss, parameters)))
    draws = torch.stack(draws)
    edge = sum(p.numel() for p in groups["router"])
    result = {}
    for name, part in (("router", slice(0, edge)), ("lora", slice(edge, None))):
        directions = random(exact[part].numel(), 8, seed=9)
        sampled = draws[:, part] @ directions
        result[name] = (sampled.mean(0) - exact[part] @ directions) / sampled.std(0) * SEEDS**0.5
    return result


# Every credit with every probability, with and without forward-only selections; and of the other
# granularity, and of G = 3, as many as let every two choices meet.
COMBINATIONS = [
    pytest.param(
        {"credit": credit, "log_prob": log_prob, "grad_selections": grad},
        granularity,
        id=f"{credit}-{log_prob}-G{grad or 'all'}-{granularity}",
    )
    for credit, log_prob, grad, granularity in (
        *itertools.product(("sequence", "causal"), ("ordered", "unordered"), (None, 1), ("token",)),
        ("causal", "unordered", 3, "token"),
        ("sequence", "ordered", 1, "sequence"),
        ("sequence", "unordered", 3, "sequence"),
        ("causal", "ordered", 3, "sequence"),
        ("causal", "unordered", None, "sequence"),
    )
]


@pytest.mark.parametrize(("options", "granularity"), COMBINATIONS)
def test_unbiased(options, granularity):
    per_sequence = granularity == "sequence"
    model = Mixer(2, wide=per_sequence, num_experts=3, top_k=2, routing_granularity=granularity)
    errors = errors_of(model, positions=3, **options)
    for name, error in errors.items():
        assert error.abs().max() < 4.0, (name, error)


@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (4, 1, {"credit": "causal"}),
        (4, 3, {"credit": "causal", "log_prob": "unordered", "grad_selections": 2}),
        (3, 2, {"credit": "causal", "selection_chunk_size": 2}),
        (3, 2, {"logprob_tokens": "all", "selection_chunk_size": 1, "log_prob": "unordered"}),
        (3, 2, {"num_selections": 2, "credit": "causal", "grad_selections": 1}),
    ],
    ids=["n4-k1-causal", "n4-k3-all-three", "chunks-causal", "chunks-unordered", "M2-G1-causal"],
)
def test_unbiased_in_other_sizes(n, k, options):
    model = Mixer(1, wide=True, num_experts=n, top_k=k)
    errors = errors_of(model, positions=2, **options)
    for name, error in errors.items():
        assert error.abs().max() < 4.0, (name, error)


@pytest.mark.parametrize(
    "options", [{"advantage_norm": "input"}, {"router_entropy_coef": 1.0}], ids=str
)
def test_a_biased_estimator_is_detected(options):
    """The same comparison notices what is documented to bias."""
    errors = errors_of(Mixer(2, wide=False, num_experts=3, top_k=2), positions=3, **options)
    assert errors["router"].abs().max() > 8.0


def test_causal_credit_in_a_model_that_is_not_causal_is_detected():
    """Positions that see later ones: what causal credit leaves out is then not noise."""

    class Backwards(Mixer):
        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(sum(module(x) for module in layer)).flip(1).cumsum(1).flip(1)
            return x.sum(-1)

    model = Backwards(2, wide=False, num_experts=3, top_k=2)
    errors = errors_of(model, positions=3, credit="causal")
    assert errors["router"].abs().max() > 8.0

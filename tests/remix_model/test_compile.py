"""`torch.compile` changes nothing: the routers' gradient is no constant of the compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remix_model import RoutedLoRALinear, sample_routing
from tests.remix_model.trainer_helpers import logged, parameters

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_layers():
    torch.manual_seed(0)
    options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
    options |= {"router_init_range": 0.7, "router_detach_input": False}
    return nn.Sequential(
        RoutedLoRALinear(nn.Linear(5, 6), **options),
        nn.Tanh(),
        RoutedLoRALinear(nn.Linear(6, 3), **options),
    ).double()


def test_plain_modules(take_grads, assert_same):
    """Two steps, so that the second runs what the first compiled."""
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    grads = []
    for compiled in (False, True):
        model = make_layers().train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in (0, 1):
            with sample_routing(model, num_selections=2, seed=seed) as routing:
                loss = routing.loss(run(routing.expand({"x": x})["x"]).square().sum(-1))
            loss.backward()
            grads.append(take_grads(model))
    for eager, compiled in zip(grads[:2], grads[2:], strict=True):
        assert all(grad.any() for grad in eager.values())
        assert_same(compiled, eager, 1e-12)


def test_trainer(make_trainer, make_remix, make_llama, assert_same):
    runs = []
    for compiled in (False, True):
        model = make_remix(make_llama(layers=1), target_modules=["down_proj"])
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = make_trainer(model, max_steps=1, optim="sgd", learning_rate=1.0, **options)
        trainer.train()
        runs.append((trainer, parameters(model)))
    (eager, want), (compiled, got) = runs
    norms = logged(eager, "remix/grad_norm_router")
    assert norms[0] > 0
    assert logged(compiled, "remix/grad_norm_router") == pytest.approx(norms, rel=1e-4)
    assert_same(got, want)

"""The frozen linear under an adapter: whoever watches or replaces its forward pass is honoured."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from remix_model import ReMixConfig, RoutedLoRALinear

POOL = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}


def peft_model(base):
    return get_peft_model(nn.Sequential(base), ReMixConfig(**POOL, target_modules=["0"]))


def plain_module(base):
    return nn.Sequential(RoutedLoRALinear(base, **POOL))


@pytest.fixture(params=[peft_model, plain_module], ids=["peft", "plain"])
def adapted(request):
    """(a model of one adapted linear, that linear)."""
    torch.manual_seed(0)
    base = nn.Linear(5, 3).double()
    return request.param(base).double().eval(), base


def replace_forward(base, call):
    original = base.forward
    base.forward = lambda x: (call(), original(x))[1]


def replace_by_a_subclass(base, call):
    """As quantised linears are."""

    class Counted(nn.Linear):
        def forward(self, x):
            call()
            return super().forward(x)

    base.__class__ = Counted


WATCHERS = {
    "forward-hook": lambda base, call: base.register_forward_hook(lambda *a: call()),
    "forward-pre-hook": lambda base, call: base.register_forward_pre_hook(lambda *a: call()),
    "backward-hook": lambda base, call: base.register_full_backward_hook(lambda *a: call()),
    "backward-pre-hook": lambda base, call: base.register_full_backward_pre_hook(lambda *a: call()),
    "replaced-forward": replace_forward,
    "subclass": replace_by_a_subclass,
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_watched_linears_run(watch, adapted, assert_same):
    """Called once, and nothing else changes: neither the output nor any gradient."""
    model, base = adapted
    x = torch.randn(4, 5, dtype=torch.float64)
    results, calls = [], []
    for watched in (False, True):
        if watched:
            watch(base, lambda: calls.append(1))
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
        results.append({"y": y.detach(), "dx": leaf.grad, **grads})
        model.zero_grad()
    assert calls == [1]
    assert_same(results[1], results[0], 1e-12)


def test_a_replaced_forward_decides(adapted):
    model, base = adapted
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        want = model(x) + 1
        original = base.forward
        base.forward = lambda x: original(x) + 1
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_offloaded_weights(adapted):
    """accelerate keeps all weights elsewhere, and brings in each module's around its forward."""
    from accelerate import cpu_offload

    model, _ = adapted
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        cpu_offload(model, torch.device("cpu"))
        for _ in range(2):
            assert {p.device.type for p in model.parameters()} == {"meta"}
            torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_an_offloaded_language_model(make_remix, make_batch):
    from accelerate import cpu_offload

    model, ids = make_remix().eval(), make_batch()["input_ids"]
    with torch.no_grad():
        want = copy.deepcopy(model)(input_ids=ids).logits
        cpu_offload(model, torch.device("cpu"))
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

"""The profile by kind: every operator's time is counted once, and where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.bench_profile import KINDS, kind_of, ops_of, profiling_cost_ns, ranges, times_of
from remix_model import RoutedLoRALinear, sample_routing

N, R, VOCABULARY = 6, 7, 89


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = RoutedLoRALinear(nn.Linear(24, 40), num_experts=N, top_k=2, r=R)
        self.two = RoutedLoRALinear(nn.Linear(40, 24), num_experts=N, top_k=2, r=R)
        self.head = nn.Linear(24, VOCABULARY).requires_grad_(False)

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(x))))


@pytest.fixture
def step():
    model, x = Tiny(), torch.randn(3, 20, 24)

    def run():
        with sample_routing(model, 2, seed=0) as routing:
            folded = routing.expand({"x": x})
            losses = model(**folded).logsumexp(-1)
            loss = routing.loss(losses, torch.ones_like(losses))
        loss.backward()
        model.zero_grad()

    return run


def test_every_kind_is_found(step):
    found = times_of(step, VOCABULARY, N * R)
    assert set(found) <= set(KINDS)
    missing = set(KINDS) - set(found)
    assert missing == {"attention", "LoRA"}
    assert all(seconds > 0 for seconds in found.values())


def test_products_go_to_the_matrix_they_multiply_by(step):
    step()
    with ranges(), torch.profiler.profile(record_shapes=True) as profiler:
        step()
    products = [op for op in ops_of(profiler) if op.name in ("aten::mm", "aten::addmm_")]
    kinds = [kind_of(op, VOCABULARY, N * R) for op in products]
    # Two layers. Forward: A, B. Backward: dH, dB; dA, and dx where the input wants it.
    assert kinds.count("expand") == 2 * (1 + 2)
    assert kinds.count("shrink") == 2 * (1 + 1) + 1
    assert kinds.count("router") == 2 * 2


def test_ranges_leave_nothing_behind(step):
    from remix_model.layer import Pool

    before = Pool.linear
    with pytest.raises(RuntimeError), ranges():
        assert Pool.linear is not before
        raise RuntimeError
    assert Pool.linear is before


def test_decoding_is_told_apart():
    """One row goes another way: its products have other names and no ranges of their own."""
    model, x = Tiny().eval(), torch.randn(1, 1, 24)
    with ranges(), torch.no_grad(), torch.profiler.profile(record_shapes=True) as profiler:
        model(x)
    found = [(op.name, kind_of(op, VOCABULARY, N * R)) for op in ops_of(profiler)]
    assert found.count(("aten::mv", "router")) == 2
    assert found.count(("aten::mv", "shrink")) == 2 * 2
    assert found.count(("aten::addmv_", "shrink")) == 2 * 2  # inside mv
    assert found.count(("aten::addmv_", "expand")) == 2 * 2
    assert found.count(("aten::topk", "sampling")) == 2
    assert found.count(("aten::linear", "base GEMM")) == 2


def test_what_profiling_costs_is_taken_off(step):
    """A cost far above any operator's time leaves only what calls no others."""
    assert 0 < profiling_cost_ns(300) < 1_000_000
    whole, rest = (times_of(step, VOCABULARY, N * R, cost_ns=cost) for cost in (0, 10**9))
    assert rest["our Python"] < whole["our Python"] / 2
    assert rest["other Python"] < whole["other Python"] / 2
    assert 0.0 < sum(rest.values()) < sum(whole.values())

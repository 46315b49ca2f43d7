"""Choosing experts, and what trains the choice: noise and top k, log-probabilities, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from remix_kernels import sample_top_k, selection_log_prob
from remix_kernels.ops import selection_log_prob_bwd

ROWS = 4096
POOLS = [(8, 2), (8, 4), (32, 8), (64, 8)]  # (n, k)


@pytest.fixture
def logits(pool: tuple[int, int], device: str) -> torch.Tensor:
    return torch.randn(ROWS, pool[0], generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"n{p[0]}-k{p[1]}")
def test_sample_top_k(
    pool: tuple[int, int],
    logits: torch.Tensor,
    timed: Callable[[Callable[[], object]], None],
) -> None:
    drawn = sample_top_k(logits, pool[1], seed=0)
    keys = drawn.sort(1).values
    assert bool((keys[:, 1:] > keys[:, :-1]).all())
    timed(lambda: sample_top_k(logits, pool[1], seed=0))


@pytest.mark.parametrize("unordered", [False, True], ids=["ordered", "unordered"])
@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"n{p[0]}-k{p[1]}")
def test_log_prob_gradient(
    pool: tuple[int, int],
    unordered: bool,
    logits: torch.Tensor,
    timed: Callable[[Callable[[], object]], None],
) -> None:
    index = sample_top_k(logits, pool[1], seed=0)
    weights = torch.randn(ROWS, device=logits.device)
    z = logits.double().requires_grad_()
    (selection_log_prob(z, index, unordered=unordered) * weights).sum().backward()
    found = selection_log_prob_bwd(logits, index, weights, unordered=unordered)
    torch.testing.assert_close(found.double(), z.grad, rtol=1e-3, atol=1e-4)
    timed(lambda: selection_log_prob_bwd(logits, index, weights, unordered=unordered))

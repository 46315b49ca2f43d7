"""Theorem 1's simulation: the formula, the law of the logits, and the committed row."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.common import rows_of
from benchmarks.theorem1 import BASE, STATED, effective_size, router_weights, summary


def test_effective_size():
    assert effective_size(torch.tensor([0.0, 3.0, 0.0])) == 1
    assert effective_size(torch.full((8,), 0.2)) == pytest.approx(8)
    assert effective_size(torch.tensor([2.0, 1.0])) == pytest.approx(9 / 5)


def test_logits_are_independent_normals_of_the_stated_size():
    logits = router_weights(sigma=0.1, n=4, D=64, samples=4000).log()
    differences = logits[:, :-1] - logits[:, 1:]  # N(0, 2 sigma^2 D), neighbours at -1/2
    spread = differences.std(0) / math.sqrt(2 * 0.1**2 * 64)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.05, rtol=0)
    correlation = torch.corrcoef(differences.T)
    assert correlation[0, 1] == pytest.approx(-0.5, abs=0.05)
    assert correlation[0, 2] == pytest.approx(0, abs=0.05)


def test_summary_counts():
    weights = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.5, 0.5, 0.0]]).double()
    row = summary(weights)
    assert row["p_ess_at_most_2"] == "0.6667"
    assert row["p_at_most_two_above_0.1"] == "0.6667"
    assert row["p_at_most_two_above_0.01"] == "0.3333"
    assert summary(weights[:, :2])["p_at_most_two_above_0.01"] == "1.0000"


def test_the_committed_row_is_what_the_code_gives():
    committed = {(r["sigma"], r["n"], r["D"]): r for r in rows_of("theorem1", "sigma", "n", "D")}
    row = committed[tuple(str(value) for value in BASE.values())]
    assert float(row["p_ess_at_most_2"]) > STATED
    again = float(summary(router_weights(**BASE, samples=2000))["p_ess_at_most_2"])
    assert again == pytest.approx(float(row["p_ess_at_most_2"]), abs=0.01)

"""routed_linear and the frozen linear alone, at every default cell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.layers.cells import DEFAULT, Cell
from benchmarks.layers.peers import PEERS
from benchmarks.layers.problem import Problem


@pytest.mark.parametrize("variant", ["frozen", "remix"])
@pytest.mark.parametrize("cell", DEFAULT, ids=str)
def test_routed_linear(
    cell: Cell,
    variant: str,
    timed: Callable[[Callable[[], object]], None],
    device: str,
    dtype: torch.dtype,
) -> None:
    problem = Problem(cell, device, dtype)
    forward = PEERS[variant](problem)
    if variant == "remix":
        problem.check(variant, forward)
    timed(problem.run(forward))

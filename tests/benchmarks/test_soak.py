"""The soak: what grows is seen through noise, and a cycle does what it says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.soak import ALLOWED, growth, soak


def rows(grown: str = "", cycles: int = 60) -> list[dict[str, float]]:
    """Noise, a jump in the first third, odd cycles; and one thing that grows by twice its limit."""
    rng = random.Random(0)
    made = []
    for cycle in range(cycles):
        row = {name: 100 + allowed * rng.uniform(-0.3, 0.3) for name, allowed in ALLOWED.items()}
        for name, allowed in ALLOWED.items():
            row[name] += 50 * allowed * (cycle > cycles // 4) + 99 * allowed * (cycle % 20 == 19)
        if grown:
            row[grown] += 3 * ALLOWED[grown] * cycle / cycles
        made.append(row)
    return made


@pytest.mark.parametrize("grown", ["", *ALLOWED])
def test_growth_is_seen_through_noise(grown: str) -> None:
    found = {name for name, amount in growth(rows(grown)).items() if amount > ALLOWED[name]}
    assert found == ({grown} if grown else set())


def test_cycles_are_measured(tmp_path: Path) -> None:
    measured = soak(tmp_path, 0, steps=1, results=None, at_least=2)
    assert len(measured) == 2
    assert all(0 < row["loss"] < 10 and row["rss_mib"] > 50 for row in measured)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

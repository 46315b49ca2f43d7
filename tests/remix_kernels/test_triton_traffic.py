"""In the interpreter: what each kernel loads and stores is what its formula says, in any order.

Floating-point bytes of unmasked lanes, counted where the interpreter touches memory. And the
programs of a grid run in a random order give the same bits: nothing depends on another program.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from remix_kernels import routed_linear, routed_lora, sample_top_k, selection_log_prob
from tests.helpers import Case, make_inputs, run

pytestmark = [
    pytest.mark.usefixtures("strict_triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
]
# dH and dB in one pass, over several blocks of rows and chunks of columns
SMALL_POOL = Case(T=36, in_features=20, out_features=70, n=3, k=1, r=3)
CASES = [
    Case(T=34, in_features=40, out_features=40),
    Case(T=40, in_features=34, out_features=47, n=3, r=20, options=("number",)),
    Case(T=9, in_features=40, out_features=40, options=("M3", "base")),
    Case(T=9, in_features=40, out_features=40, n=5, r=17, options=("linear", "sharedA")),
    SMALL_POOL,
]
STRATEGIES = ["dense", "grouped", "gather"]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(bytes touched, bytes by formula) of each kernel that runs inside."""
    from triton.runtime.interpreter import InterpreterBuilder

    from benchmarks.traffic import FORMULAS
    from remix_kernels._launch import observe

    touched: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    running = [""]

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        running[0] = kernel.fn.__name__
        expected[running[0]] += FORMULAS[running[0]](arguments)
        return True

    def count(pointers: Any, mask: Any) -> None:
        element = pointers.get_element_ty()
        if element.is_floating():
            touched[running[0]] += int(mask.data.sum()) * element.primitive_bitwidth // 8

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch, observe(note):
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield touched, expected


def passes(case: Case, strategy: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if strategy == "gather":  # two programs a (row, slot)
        case = replace(case, T=min(case.T, 4))
    inputs, dy = make_inputs(case, dtype, "cpu")
    op = routed_linear if case.is_linear else routed_lora
    return run(
        lambda **kwargs: op(**kwargs, strategy=strategy, backend="triton"),
        inputs,
        case.trained,
        dy,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_is_the_formulas(
    case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as (touched, expected):
        passes(case, strategy)
    assert touched and touched == +expected


def test_traffic_of_the_k_extended_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMIX_GEMM", "triton")
    with counted(monkeypatch) as (touched, expected):
        passes(Case(T=40, options=("linear",)), "dense", torch.bfloat16)
    assert touched == expected


def test_traffic_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(70, 9, requires_grad=True)
    with counted(monkeypatch) as (touched, expected):
        index = sample_top_k(z, 3, seed=1, backend="triton")
        for unordered in (False, True):
            selection_log_prob(z, index, unordered=unordered, backend="triton").sum().backward()
    assert len(touched) == 5 and touched == expected


@contextmanager
def shuffled(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order."""
    from triton.runtime.interpreter import InterpreterBuilder

    real_dim, real_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        order[:] = range(nx * ny * nz)
        random.Random(seed).shuffle(order)
        real_dim(self, nx, ny, nz)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        place = order[(x * ny + y) * nz + z]
        real_index(self, place // (ny * nz), place // nz % ny, place % nz)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
        patch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
        yield


@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [*CASES[1:3], SMALL_POOL], ids=str)
def test_any_order_of_programs_gives_the_same_bits(
    case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = passes(case, strategy)
    with shuffled(monkeypatch, seed=1):
        again = passes(case, strategy)
    assert all(torch.equal(again[name], straight[name]) for name in straight)


def test_grouped_reads_its_operands_about_once_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, by the formulas: within 1.2 of k ordered read-modify-write passes."""
    from benchmarks import traffic
    from remix_kernels import _configs

    monkeypatch.setattr(_configs, "arch", lambda device: "sm_90")
    ratios = {
        row["shape"]: float(row["over_plan"])
        for row in traffic.table()
        if (row["strategy"], row["pass"]) == ("grouped", "forward")
    }
    assert len(ratios) == 5
    assert all(0.99 <= ratio <= 1.2 for ratio in ratios.values()), ratios

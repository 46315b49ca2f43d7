"""The Triton backend against fp64 by the same rule and on the same kinds of problems as PyTorch's.

Without a GPU the kernels run in Triton's interpreter (conftest.py asks for it), where operands of
bf16 are widened before they are multiplied; on a GPU as they are. Full-size shapes are in
test_triton_gpu.py; what the interpreter cannot show (legality, registers, tensor cores) is in
benchmarks/compile_report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from remix_kernels import routed_linear, routed_lora
from tests.helpers import Case, assert_all_accurate, make_inputs, param_id, run, solve

STRATEGIES = ["dense", "grouped", "gather"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Case(T=40)
CASES = [
    SMALL,
    Case(T=1),
    Case(T=1, options=("row",)),
    replace(SMALL, T=33),
    replace(SMALL, in_features=71),
    replace(SMALL, out_features=55),
    replace(SMALL, n=1, k=1),
    Case(T=9, n=64),
    replace(SMALL, k=1),
    Case(T=20, k=8),
    replace(SMALL, r=1),
    replace(SMALL, r=3),
    Case(T=20, in_features=40, out_features=30, n=3, r=20),
    replace(SMALL, in_features=1, out_features=1),
    Case(T=80, options=("idle",)),
    Case(T=80, options=("one",)),
    replace(SMALL, k=1, options=("one",)),
    replace(SMALL, options=("number",)),
    replace(SMALL, options=("sharedA",)),
    replace(SMALL, n=1, k=1, options=("sharedA",)),
    replace(SMALL, options=("xT",)),
    replace(SMALL, options=("BT",)),
    replace(SMALL, options=("batch", "xT")),
    Case(T=20, options=("M3",)),
    Case(T=20, options=("M3", "sharedA")),
    Case(T=20, options=("M3", "batch", "xT", "BT")),
    Case(T=1, options=("M3", "row", "number")),
    replace(SMALL, options=("base",)),
    replace(SMALL, options=("expanded",)),
    Case(T=20, options=("M3", "base", "number")),
    replace(SMALL, options=("linear",)),
    replace(SMALL, options=("linear", "nobias")),
    replace(SMALL, options=("linear", "sharedA", "number", "batch")),
    Case(T=20, options=("linear", "M3")),
    replace(SMALL, options=("linear", "trained")),
    replace(SMALL, options=("int32",)),
    Case(T=6, n=64, k=5, options=("uint8", "linear")),
]
HALF_CASES = [
    SMALL,
    Case(T=1, in_features=71, out_features=55),
    Case(T=12, k=8, r=3, options=("number", "base")),
    Case(T=20, options=("sharedA", "linear", "M3")),
    Case(T=9, n=32, options=("BT", "xT")),
]
PROBLEMS = [(case, torch.float32) for case in CASES]
PROBLEMS += [(case, dtype) for case in HALF_CASES for dtype in (torch.float16, torch.bfloat16)]

pytestmark = pytest.mark.usefixtures("strict_triton", "nan_in_empty")


def op_of(case: Case, strategy: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = routed_linear if case.is_linear else routed_lora
    return lambda **inputs: op(**inputs, strategy=strategy, backend="triton")


def few_rows(case: Case, strategy: str) -> Case:
    """Gather runs two programs a (row, slot): fewer rows show as much."""
    return replace(case, T=min(case.T, 4)) if strategy == "gather" else case


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case,dtype", PROBLEMS, ids=param_id)
def test_error_is_at_most_twice_eagers(case: Case, dtype: torch.dtype, strategy: str) -> None:
    case = few_rows(case, strategy)
    inputs, dy, eager, truth = solve(case, dtype, DEVICE)
    actual = run(op_of(case, strategy), inputs, case.trained, dy)
    assert actual["y"].dtype == dtype
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize(
    "options", [("linear",), ("linear", "M3"), ("linear", "nobias")], ids="-".join
)
def test_the_k_extended_gemm(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen product in our own kernel: forward, and its transpose for dx."""
    monkeypatch.setenv("REMIX_GEMM", "triton")
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(T=70, out_features=40, options=options)
        inputs, dy, eager, truth = solve(case, dtype, DEVICE)
        assert_all_accurate(run(op_of(case, "dense"), inputs, case.trained, dy), eager, truth)


@pytest.mark.parametrize(
    "options",
    [("linear",), ("linear", "M3"), ("base",), ("number",), ("linear", "sharedA", "BT")],
    ids="-".join,
)
def test_large_pools_are_added_in_cublas(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's addmm for y and dx; ours where M selections share the frozen product."""
    monkeypatch.setattr("remix_kernels._configs.CUBLAS_ABOVE", 16)
    used = kernels_of_one_pass(Case(T=24, in_features=40, out_features=30, options=options))
    assert ("_dense_fwd_expand_kernel" in used) == ("M3" in options)
    monkeypatch.setenv("REMIX_GEMM", "triton")
    assert "_dense_fwd_expand_kernel" in kernels_of_one_pass(Case(T=24, options=options))


def kernels_of_one_pass(case: Case) -> set[str]:
    """The kernels that a dense forward and backward pass launches, its results checked."""
    from remix_kernels._launch import observe

    used: set[str] = set()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        used.add(kernel.fn.__name__)
        return True

    for dtype in (torch.float32, torch.bfloat16):
        inputs, dy, eager, truth = solve(case, dtype, DEVICE)
        with observe(note):
            actual = run(op_of(case, "dense"), inputs, case.trained, dy)
        assert_all_accurate(actual, eager, truth)
    return used


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=lambda pair: "-".join(map(param_id, pair)),
)
def test_adapters_in_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], strategy: str) -> None:
    case = few_rows(Case(T=12, options=("linear", "M3", "BT")), strategy)
    inputs, dy, eager, truth = solve(case, dtypes[0], DEVICE, dtypes[1])
    assert_all_accurate(run(op_of(case, strategy), inputs, case.trained, dy), eager, truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_rows(strategy: str) -> None:
    case = Case(T=0, options=("linear",))
    inputs, dy = make_inputs(case, torch.float32, DEVICE)
    actual = run(op_of(case, strategy), inputs, case.trained, dy)
    assert actual["y"].shape == (0, case.out_features)
    assert all(float(value.abs().sum()) == 0.0 for value in actual.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_does_not_depend_on_the_others(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the frozen product in our own kernel (dense)."""
    monkeypatch.setenv("REMIX_GEMM", "triton")
    case = Case(T=40, n=4, options=("linear",) if strategy == "dense" else ())
    inputs, _ = make_inputs(case, torch.float32, DEVICE)
    op = op_of(case, strategy)
    whole = op(**inputs)
    rows = ("x", "top_k_index", "top_k_weights")
    part = {k: v[7:12] if k in rows else v for k, v in inputs.items()}
    assert torch.equal(op(**part), whole[7:12])


def far_apart(tensor: Tensor) -> Tensor:
    """The same numbers, the last of the first dimension over 2^31 elements behind the first.

    The memory between is never touched, so it takes none.
    """
    stride = 2**31 // (tensor.shape[0] - 1) + 64
    untouched = numpy.empty(stride * tensor.shape[0], dtype=numpy.int16)
    storage = torch.from_numpy(untouched).view(torch.float16)
    strides = (stride, *tensor[0].stride())
    far = storage.as_strided(tensor.shape, strides)
    return far.copy_(tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory that is never touched")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "base", "dy"])
def test_rows_more_than_2_to_31_elements_apart(name: str, strategy: str) -> None:
    case = Case(T=3, in_features=20, out_features=24, n=3, k=2, r=3, options=("base",))
    inputs, dy, eager, truth = solve(case, torch.float16, DEVICE)
    if name == "dy":
        dy = far_apart(dy)
    else:
        inputs = {**inputs, name: far_apart(inputs[name])}
    assert_all_accurate(run(op_of(case, strategy), inputs, case.trained, dy), eager, truth)

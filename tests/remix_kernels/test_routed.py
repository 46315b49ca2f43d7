"""routed_lora and routed_linear: every strategy against fp64, one axis off the grid at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remix_kernels import reference, routed_linear, routed_lora, torch_grouped
from tests.helpers import (
    DEVICES,
    OTHER_DTYPES,
    Case,
    assert_accurate,
    assert_all_accurate,
    in_fp64,
    make_inputs,
    param_id,
    routed_linear_eager,
    routed_lora_eager,
    run,
    solve,
)

STRATEGIES = ["dense", "grouped", "gather"]
CASES = [
    Case(),
    Case(T=1),
    Case(T=1, options=("row",)),
    Case(in_features=71),
    Case(out_features=55),
    Case(n=1, k=1),
    Case(n=64),
    Case(k=1),
    Case(k=8),
    Case(r=1),
    Case(r=3),
    Case(in_features=1, out_features=1),
    Case(options=("idle",)),
    Case(options=("one",)),
    Case(k=1, options=("one",)),
    Case(options=("number",)),
    Case(options=("sharedA",)),
    Case(n=1, k=1, options=("sharedA",)),
    Case(options=("xT",)),
    Case(options=("BT",)),
    Case(options=("batch", "xT")),
    Case(options=("M1",)),
    Case(options=("M3",)),
    Case(options=("M3", "sharedA")),
    Case(options=("M3", "batch", "xT", "BT")),
    Case(T=1, options=("M3", "row", "number")),
    Case(options=("base",)),
    Case(options=("expanded",)),
    Case(options=("M3", "base", "number")),
    Case(options=("linear",)),
    Case(options=("linear", "nobias")),
    Case(options=("linear", "sharedA", "number", "batch")),
    Case(options=("linear", "M3")),
    Case(options=("linear", "trained")),
    Case(options=("linear", "nobias", "trained", "M3")),
    Case(options=("int32",)),
    Case(n=64, k=5, options=("uint8", "linear")),
]
SMALL_CASES = [  # for the other dtypes: half precision is emulated on most CPUs
    Case(T=12),
    Case(T=1, in_features=71, out_features=55),
    Case(T=12, k=8, r=3, options=("number", "base")),
    Case(T=12, k=1, options=("one", "linear")),
    Case(T=12, options=("sharedA", "linear", "M3")),
    Case(T=12, n=64, options=("BT", "xT")),
    Case(T=64, n=64, k=64, options=("sharedA",)),
]
PROBLEMS = [(case, torch.float32) for case in CASES]
PROBLEMS += [(case, dtype) for case in SMALL_CASES for dtype in OTHER_DTYPES]


def op_of(case: Case, **choice: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = routed_linear if case.is_linear else routed_lora
    return lambda **inputs: op(**inputs, **choice)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case,dtype", PROBLEMS, ids=param_id)
def test_error_is_at_most_twice_eagers(
    case: Case, dtype: torch.dtype, device: str, strategy: str
) -> None:
    inputs, dy, eager, truth = solve(case, dtype, device)
    actual = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    assert actual["y"].dtype == dtype
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [(), ("linear", "M3"), ("sharedA", "BT")], ids="-".join)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=lambda pair: "-".join(map(param_id, pair)),
)
def test_adapters_in_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], options: tuple[str, ...], device: str, strategy: str
) -> None:
    case = Case(T=12, options=options)
    inputs, dy, eager, truth = solve(case, dtypes[0], device, dtypes[1])
    actual = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    assert actual["y"].dtype == dtypes[0]
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [("one",), ("sharedA",)], ids="-".join)
def test_a_gradient_summed_over_many_rows_is_rounded_once(
    options: tuple[str, ...], strategy: str
) -> None:
    """bf16 adapters under fp32 x: a sum kept in bf16 would lose what each row adds."""
    case = Case(T=1000, k=1, options=options)
    inputs, dy = make_inputs(case, torch.float32, "cpu", torch.bfloat16)
    eager = run(routed_lora_eager, inputs, case.trained, dy)
    truth = run(routed_lora_eager, in_fp64(inputs), case.trained, dy.double())
    assert_all_accurate(run(op_of(case, strategy=strategy), inputs, case.trained, dy), eager, truth)


@pytest.mark.parametrize("strategy,T", [("dense", 1024), ("grouped", 1024), ("gather", 32)])
@pytest.mark.parametrize("device", DEVICES)
def test_large(device: str, strategy: str, T: int) -> None:
    case = Case(T, 576, 1536, n=8, k=4, r=8, options=("linear",))
    inputs, dy = make_inputs(case, torch.float32, device)
    eager = run(routed_linear_eager, inputs, case.trained, dy)
    truth = run(routed_linear_eager, in_fp64(inputs), case.trained, dy.double())
    actual = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize("options", [("linear", "M3"), ("sharedA",), ("idle",)], ids="-".join)
def test_grouped_as_on_cuda(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one expert at a time, and no turn for those without."""
    case = Case(T=5, n=64, k=2, options=options)
    turns, batches = [], torch_grouped.batches

    def one_each(offsets: list[int], most: int) -> list[torch_grouped.Batch]:
        turns.append(batches(offsets, 0))
        return turns[-1]

    monkeypatch.setattr(torch_grouped, "batches", one_each)
    inputs, dy, eager, truth = solve(case, torch.float32, "cpu")
    assert_all_accurate(
        run(op_of(case, strategy="grouped"), inputs, case.trained, dy), eager, truth
    )
    for batch in (batch for turn in turns for batch in turn):
        assert len({0, *batch.ends}) == 2
    assert 1 < len(turns[0]) <= inputs["top_k_index"].numel()


@pytest.mark.parametrize("options", [(), ("linear", "M3"), ("base", "sharedA")], ids="-".join)
def test_reference_backend_is_the_reference(options: tuple[str, ...]) -> None:
    case = Case(T=8, options=options)
    inputs, _ = make_inputs(case, torch.float32, "cpu")
    specification = reference.routed_linear_ref if case.is_linear else reference.routed_lora_ref
    assert torch.equal(op_of(case, backend="reference")(**inputs), specification(**inputs))


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("number",),
        ("batch", "sharedA"),
        ("M3",),
        ("base",),
        ("linear",),
        ("linear", "trained"),
        ("linear", "M3"),
    ],
    ids="-".join,
)
def test_no_rows(options: tuple[str, ...], device: str, strategy: str) -> None:
    """An empty result, and a gradient of zeros for everything trained."""
    case = Case(T=0, options=options)
    inputs, dy = make_inputs(case, torch.float32, device)
    results = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    assert results.pop("y").shape == dy.shape
    for name, grad in results.items():
        assert grad.shape == inputs[name[1:]].shape
        assert not grad.any(), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options", [(), ("M3", "sharedA"), ("linear", "trained"), ("base",)], ids="-".join
)
def test_each_gradient_alone(options: tuple[str, ...], strategy: str) -> None:
    """What else is trained changes no gradient, and what is frozen gets none."""
    case = Case(T=20, options=options)
    inputs, dy = make_inputs(case, torch.float32, "cpu")
    op = op_of(case, strategy=strategy)
    together = run(op, inputs, case.trained, dy)
    for name in case.trained:
        leaves = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        leaves[name].requires_grad_()
        op(**leaves).backward(dy)
        for other, leaf in leaves.items():
            if isinstance(leaf, Tensor) and other != name:
                assert leaf.grad is None, other
        grad = leaves[name].grad
        assert grad is not None
        assert_accurate(grad, together[f"d{name}"], together[f"d{name}"].double(), name)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "options", [(), ("M3", "sharedA"), ("base",), ("linear", "trained", "M3")], ids="-".join
)
def test_without_gradients(
    options: tuple[str, ...], mode: Callable[[], Any], device: str, strategy: str
) -> None:
    """The same bits as with them, and still nothing written to."""
    case = Case(options=options)
    inputs, dy = make_inputs(case, torch.float32, device)
    op = op_of(case, strategy=strategy)
    expected = run(op, inputs, case.trained, dy)["y"]
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    with mode():
        y = op(**inputs)
    assert torch.equal(y, expected)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"the op wrote to {name}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
@pytest.mark.parametrize(
    "options", [("number",), ("M3", "linear"), ("base", "batch")], ids="-".join
)
def test_dy_of_any_layout(options: tuple[str, ...], layout: str, strategy: str) -> None:
    case = Case(options=options)
    inputs, dy = make_inputs(case, torch.float64, "cpu")
    dy = dy[..., :1].expand_as(dy) if layout == "expanded" else dy.mT.contiguous().mT
    op = op_of(case, strategy=strategy)
    actual, packed = (run(op, inputs, case.trained, d) for d in (dy, dy.contiguous()))
    assert_all_accurate(actual, packed, packed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [(), ("M3", "sharedA"), ("linear", "M3")], ids="-".join)
def test_the_same_call_gives_the_same_bits(
    options: tuple[str, ...], device: str, strategy: str
) -> None:
    case = Case(options=options)
    inputs, dy = make_inputs(case, torch.float32, device)
    first, second = (
        run(op_of(case, strategy=strategy), inputs, case.trained, dy) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [(), ("linear",), ("linear", "trained"), ("base",)], ids="-".join
)
def test_under_autocast(options: tuple[str, ...], device: str, strategy: str) -> None:
    """fp32 tensors under autocast to bf16, as in a Trainer with bf16=True."""
    case = Case(T=12, options=options)
    inputs, dy, _, truth = solve(case, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    _, _, eager, _ = solve(case, torch.bfloat16, device)
    assert_all_accurate(actual, eager, truth)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any one operation inside allocated."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, stored)
        return result


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options", [("linear",), ("sharedA",), ("linear", "M3"), ("base", "M1")], ids="-".join
)
def test_no_tensor_is_larger_than_one_operand(options: tuple[str, ...], strategy: str) -> None:
    """Neither [T, k, in] nor [T, k, r, in] nor [T, n, out] is ever materialised."""
    case = Case(64, 96, 80, n=8, k=4, r=4, options=options)
    inputs, dy = make_inputs(case, torch.float32, "cpu")
    rows, rank = math.prod(dy.shape[:-1]), case.n * case.r
    width_in, width_out = case.in_features, case.out_features
    sizes = (rows, width_in, width_out)
    bound = max(width_in * width_out, *(rank * size for size in sizes), rows * max(sizes[1:]))
    with LargestTensor() as largest:
        run(op_of(case, strategy=strategy), inputs, case.trained, dy)
    assert largest.numel <= bound
    with LargestTensor() as largest:  # the recorder does see a backward pass, and a gather
        routed = inputs["lora_A"].requires_grad_()[torch.zeros(64, 4, dtype=torch.long)]
        routed.sum().backward()
    assert largest.numel >= 64 * 4 * 4 * width_in > bound


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivative_is_refused(strategy: str) -> None:
    """A wrong one would be silent."""
    inputs, _ = make_inputs(Case(T=5), torch.float32, "cpu")
    x = inputs["x"].requires_grad_()
    loss = routed_lora(**inputs, strategy=strategy).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 12))
    choices = ["M1 M3", "idle one", "sharedA", "xT", "BT", "number", "int32"]
    options = [draw(st.sampled_from(["", *choice.split()])) for choice in choices]
    frozen = ["", "base", "linear", "linear nobias", "linear trained"]
    options += draw(st.sampled_from(frozen)).split()
    return Case(
        T=draw(st.integers(1, 9)),
        in_features=draw(st.integers(1, 20)),
        out_features=draw(st.integers(1, 20)),
        n=n,
        k=draw(st.integers(1, n)),
        r=draw(st.integers(1, 6)),
        options=tuple(option for option in options if option),
    )


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(case=cases())
def test_strategies_agree_exactly_on_whole_numbers(case: Case) -> None:
    """Sums of small whole numbers are exact in fp64 in any order, so every bit must agree."""
    inputs, dy = make_inputs(case, torch.float64, "cpu")
    inputs = {
        k: (v * 8).round() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    dy = (dy * 8).round()
    truth = run(op_of(case, backend="reference"), inputs, case.trained, dy)
    for strategy in STRATEGIES:
        actual = run(op_of(case, strategy=strategy), inputs, case.trained, dy)
        for name in truth:
            assert torch.equal(actual[name], truth[name]), f"{strategy}: {name}"


def test_uninitialised_memory_is_nan() -> None:
    """The fixture that the other tests rely on."""
    x = torch.ones(2, dtype=torch.bfloat16)
    strided = torch.empty_strided((2,), (1,))
    for empty in (torch.empty(2), torch.empty_like(x), x.new_empty(2), strided):
        assert empty.isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()

"""selection_log_prob of sets: against enumeration, exact arithmetic, and one method the other."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from remix_kernels import reference, sample_top_k, selection_log_prob, torch_unordered
from remix_kernels._launch import KernelError
from remix_kernels._log_prob import LogProb
from remix_kernels.ops import TORCH_SCORES, selection_log_prob_bwd
from tests.helpers import (
    DEVICES,
    Inputs,
    assert_all_accurate,
    in_fp64,
    param_id,
    routing,
    run,
    unordered_log_prob_eager,
)
from tests.remix_kernels.test_triton import DEVICE, far_apart

log_prob_of_set = functools.partial(selection_log_prob, unordered=True)
truth_of_set = functools.partial(reference.selection_log_prob_ref, unordered=True)
BACKENDS = ["torch", "triton"]
SHAPES = [(70, 8, 2), (20, 8, 4), (50, 8, 1), (1, 5, 3), (9, 64, 3), (12, 9, 5), (30, 3, 2)]


def problem(
    T: int, n: int, k: int, scale: float, dtype: torch.dtype, device: str = DEVICE
) -> tuple[Inputs, Tensor]:
    """Arguments and a signed dy."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(T, n, generator=generator) * scale).to(device, dtype)
    index = routing(T, n, k, (), generator).to(device)
    return {"logits": logits, "top_k_index": index}, torch.randn(T, generator=generator).to(device)


def assert_right(inputs: Inputs, dy: Tensor, backend: str) -> None:
    """Forward and gradient against enumeration in fp64, by the accuracy rule."""
    op = functools.partial(log_prob_of_set, backend=backend)
    actual = run(op, inputs, ("logits",), dy)
    eager = run(unordered_log_prob_eager, inputs, ("logits",), dy)
    truth = run(truth_of_set, in_fp64(inputs), ("logits",), dy.double())
    assert actual["y"].dtype == torch.float32
    assert_all_accurate(actual, eager, truth)


@pytest.fixture(autouse=True)
def strict(strict_triton: None) -> None:
    """A kernel that fails raises."""


# Against enumeration


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=param_id)
@pytest.mark.parametrize("T,n,k", SHAPES, ids=param_id)
def test_against_the_reference(T: int, n: int, k: int, dtype: torch.dtype, backend: str) -> None:
    assert_right(*problem(T, n, k, 1.5, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", [0.0, 30.0, 1e3, 1e4], ids=lambda v: f"scale{v:g}")
def test_extreme_logits(scale: float, k: int, backend: str) -> None:
    assert_right(*problem(24, 7, k, scale, torch.float32), backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T,n,k", SHAPES, ids=param_id)
def test_fp64(T: int, n: int, k: int, device: str) -> None:
    """Enumeration in fp64 is itself rounded: to 1e-13 of the largest term, not by the rule."""
    inputs, dy = problem(T, n, k, 1.5, torch.float64, device)
    actual = run(log_prob_of_set, inputs, ("logits",), dy)
    truth = run(truth_of_set, inputs, ("logits",), dy)
    assert actual["y"].dtype == torch.float64
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n,k", [(5, 2), (6, 4), (4, 3)], ids=param_id)
def test_all_sets_together_are_certain(n: int, k: int, backend: str) -> None:
    sets = torch.tensor(list(itertools.combinations(range(n), k)), device=DEVICE)
    logits = torch.randn(n, device=DEVICE).expand(len(sets), n).contiguous().requires_grad_()
    log_prob = log_prob_of_set(logits, sets, backend=backend)
    total = log_prob.exp().sum()
    assert abs(float(total.detach()) - 1.0) < 1e-6
    # and the score has the mean 0
    score = torch.autograd.grad(total, logits)[0].sum(0)
    assert float(score.abs().max()) < 1e-6


# Against exact arithmetic


@functools.cache  # a truth for every method
def exact(logits: tuple[float, ...], chosen: tuple[int, ...]) -> float:
    """log P by inclusion and exclusion: sum over S in I of (-1)^|S| / (1 + a(S)), in decimals.

    As many as the cancellation takes. Experts with the same logit are counted, not listed, so
    that large sets of few different logits are quick.
    """
    rest = [z for e, z in enumerate(logits) if e not in chosen]
    groups = Counter(logits[e] for e in chosen)
    unlikely = sum(max(0.0, max(rest) - z) + 5.0 for z in groups.elements())
    with localcontext() as context:
        context.prec = 60 + int(unlikely / 2.0) + len(chosen)
        total = sum(Decimal(z).exp() for z in rest)
        a = [Decimal(z).exp() / total for z in groups]
        probability = Decimal(0)
        for picks in itertools.product(*(range(m + 1) for m in groups.values())):
            ways = math.prod(map(math.comb, groups.values(), picks))
            sign = -1 if sum(picks) % 2 else 1
            drawn = sum((x * j for x, j in zip(a, picks, strict=True)), Decimal(0))
            probability += sign * ways / (1 + drawn)
        return float(probability.ln())


def relative_error_of_p(log_prob: Tensor, truth: list[float]) -> float:
    wanted = torch.tensor(truth, dtype=torch.float64)
    return float((log_prob.double().cpu() - wanted).expm1().abs().max())


ROWS = {
    "mixed": [80.0, -80.0, 3.5, 0.0, -2.0, 79.0, -79.5, 0.25, 1.0],
    "ties": [2.0] * 9,
    "ties-apart": [80.0, 80.0, 80.0, -80.0, -80.0, -80.0, 0.0, 0.0, 0.0],
    "one-huge": [80.0, 0.0, 0.5, -0.5, 1.0, -1.0, 0.1, 0.2, 0.3],
    "one-tiny": [-80.0, 0.0, 0.5, -0.5, 1.0, -1.0, 0.1, 0.2, 0.3],
    "steps": [-80.0, -60.0, -40.0, -20.0, 0.0, 20.0, 40.0, 60.0, 80.0],
}


@pytest.mark.parametrize("method", ["recursion", "integral", "triton"])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_against_exact_arithmetic(
    row: list[float], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P to 1e-11 in fp64, also at logits of 80; log P to a few roundings in fp32."""
    if method == "integral":
        monkeypatch.setattr(torch_unordered, "MAX_RECURSION", 0)
    for k in range(1, 7):
        sets = list(itertools.combinations(range(9), k))[:: 1 + 7 * (k > 1)]
        truth = [exact(tuple(row), chosen) for chosen in sets]
        index = torch.tensor(sets, device=DEVICE)
        dtype = torch.float32 if method == "triton" else torch.float64
        logits = torch.tensor(row, dtype=dtype, device=DEVICE).expand(len(sets), -1)
        backend = "triton" if method == "triton" else "torch"
        actual = log_prob_of_set(logits, index, backend=backend)
        if method == "triton":
            wanted = torch.tensor(truth)
            torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert relative_error_of_p(actual, truth) < 1e-11


@pytest.mark.parametrize("k", [9, 16, 32, 48, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=param_id)
def test_large_sets_against_exact_arithmetic(k: int, dtype: torch.dtype) -> None:
    """Likely ones and unlikely ones, up to all but one of 64."""
    levels = [(0.0, 0.0), (3.0, -3.0), (30.0, -30.0), (-8.0, 9.0), (0.0, 80.0)]
    rows = [level * 32 for level in levels]
    sets = [tuple(range(k)), tuple(range(64 - k, 64))]
    if k <= 32:  # all alike: the likeliest and the unlikeliest set
        sets += [tuple(range(0, 2 * k, 2)), tuple(range(1, 2 * k, 2))]
    for chosen in sets:
        truth = [exact(row, chosen) for row in rows]
        index = torch.tensor(chosen).expand(len(rows), -1)
        actual = log_prob_of_set(torch.tensor(rows, dtype=dtype), index, backend="torch")
        if dtype == torch.float64:
            assert relative_error_of_p(actual, truth) < 1e-11
        else:
            triton = log_prob_of_set(
                torch.tensor(rows, device=DEVICE), index.to(DEVICE), backend="triton"
            )
            for value in (actual, triton.cpu()):
                torch.testing.assert_close(value, torch.tensor(truth), rtol=1e-6, atol=1e-6)


# The recursion against the integral


def sets_of(k: int, scale: float, rows: int = 64) -> Tensor:
    """log a of sets likely and unlikely."""
    generator = torch.Generator().manual_seed(k)
    log_a = torch.randn(k, rows, generator=generator, dtype=torch.float64) * scale
    return log_a + torch.linspace(-4.0, 4.0, rows, dtype=torch.float64) * scale


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 80.0], ids=lambda v: f"scale{v:g}")
@pytest.mark.parametrize("k", range(1, 13))
def test_the_recursion_and_the_integral_agree(k: int, scale: float) -> None:
    """P, and every part of the gradient, to 1e-11 at any size and likelihood of the set."""
    log_a = sets_of(k, scale)
    by_recursion = torch_unordered.subset_tables(log_a)[0][-1] + log_a.clamp_max(0.0).sum(0)
    grad, total = torch_unordered.subset_grad(log_a)
    by_integral, mean = torch_unordered.integrate(log_a)
    assert float((by_integral - by_recursion).expm1().abs().max()) < 1e-11
    torch.testing.assert_close(mean, grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mean.sum(0), total, rtol=1e-11, atol=1e-11)
    single, mean = torch_unordered.integrate(log_a.float())
    torch.testing.assert_close(single.double(), by_recursion, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(mean.double(), grad, rtol=0.0, atol=1e-5 + 1e-6 * scale)


# Gradients


@pytest.mark.parametrize("n,k", [(5, 1), (6, 3), (6, 5), (11, 9), (12, 10)], ids=param_id)
def test_gradcheck(n: int, k: int) -> None:
    inputs, _ = problem(3, n, k, 1.0, torch.float64, "cpu")
    index, logits = inputs["top_k_index"], inputs["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: log_prob_of_set(z, index), (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=param_id)
def test_bwd_is_autograds(dtype: torch.dtype, k: int, backend: str) -> None:
    inputs, dy = problem(40, 11, k, 1.0, dtype)
    op = functools.partial(log_prob_of_set, backend=backend)
    want = run(op, inputs, ("logits",), dy)["dlogits"]
    logits, index = inputs.values()
    got = selection_log_prob_bwd(
        logits, index.T.contiguous().T, dy, unordered=True, backend=backend
    )
    assert got.dtype == dtype and torch.equal(got, want)
    ordered = selection_log_prob_bwd(logits, index, dy, backend=backend)
    assert not torch.allclose(ordered.float(), want.float(), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 10])
def test_the_gradient_of_a_row_sums_to_zero(k: int, backend: str) -> None:
    """Adding a number to all logits changes nothing."""
    inputs, dy = problem(40, 16, k, 3.0, torch.float32)
    op = functools.partial(log_prob_of_set, backend=backend)
    dlogits = run(op, inputs, ("logits",), dy)["dlogits"]
    assert float(dlogits.sum(1).abs().max()) < 2e-5


def test_the_score_of_the_set_is_the_mean_of_the_ordered_scores() -> None:
    """Given the set: the conditional expectation that takes away the order's variance."""
    orders = torch.tensor(list(itertools.permutations([4, 0, 2])))
    logits = torch.randn(6, dtype=torch.float64).expand(len(orders), -1).clone().requires_grad_()
    ordered = selection_log_prob(logits, orders)
    (score,) = torch.autograd.grad(ordered.sum(), logits)
    want = (ordered.detach().softmax(0)[:, None] * score).sum(0)
    (got,) = torch.autograd.grad(log_prob_of_set(logits[0], orders[0]), logits)
    torch.testing.assert_close(got[0], want)


# Special sets and layouts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 4, 5, 7, 12])
def test_all_experts_are_certain(n: int, backend: str) -> None:
    inputs, dy = problem(6, n, n, 50.0, torch.bfloat16)
    actual = run(functools.partial(log_prob_of_set, backend=backend), inputs, ("logits",), dy)
    assert actual["y"].dtype == torch.float32
    assert not actual["y"].any() and not actual["dlogits"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_has_no_order(backend: str) -> None:
    inputs, dy = problem(40, 8, 1, 3.0, torch.float32)
    ordered = run(selection_log_prob, in_fp64(inputs), ("logits",), dy.double())
    actual = run(functools.partial(log_prob_of_set, backend=backend), inputs, ("logits",), dy)
    eager = run(selection_log_prob, inputs, ("logits",), dy)
    assert_all_accurate(actual, eager, ordered)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 9])
def test_experts_at_minus_infinity_count_for_nothing(k: int, backend: str) -> None:
    inputs, dy = problem(10, k + 2, k, 1.0, torch.float32)
    op = functools.partial(log_prob_of_set, backend=backend)
    without = run(op, inputs, ("logits",), dy)
    padded = torch.nn.functional.pad(inputs["logits"], (0, 3), value=float("-inf"))
    with_it = run(op, {**inputs, "logits": padded}, ("logits",), dy)
    torch.testing.assert_close(with_it["y"], without["y"])
    torch.testing.assert_close(with_it["dlogits"][:, : k + 2], without["dlogits"])
    assert not with_it["dlogits"][:, k + 2 :].any()
    only = padded.scatter(1, inputs["top_k_index"], 0.0).masked_fill(padded != 0.0, -math.inf)
    only.scatter_(1, inputs["top_k_index"], 0.0)  # nothing else is left: certain
    certain = run(op, {**inputs, "logits": only}, ("logits",), dy)
    assert float(certain["y"].abs().max()) < 1e-5
    assert float(certain["dlogits"].abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [3, 9])
def test_nan_stays_nan(k: int, backend: str) -> None:
    inputs, _ = problem(4, 12, k, 1.0, torch.float32)
    logits, index = inputs.values()
    drawn, other = logits.clone(), logits.clone()
    drawn[1, index[1, 0]] = float("nan")
    other[2].scatter_(0, index[2], 0.0, reduce="add")
    other[2, next(e for e in range(12) if e not in index[2].tolist())] = float("nan")
    for z, row in ((drawn, 1), (other, 2)):
        wrong = log_prob_of_set(z, index, backend=backend).isnan()
        assert wrong.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [3, 9])
def test_leading_dimensions_and_layouts(k: int, backend: str) -> None:
    inputs, _ = problem(24, 12, k, 1.0, torch.float32)
    logits, index = inputs.values()
    op: Callable[..., Tensor] = functools.partial(log_prob_of_set, backend=backend)
    flat = op(logits, index)
    assert torch.equal(op(logits.view(2, 3, 4, 12), index.view(2, 3, 4, k)), flat.view(2, 3, 4))
    assert torch.equal(op(logits.T.contiguous().T, index), flat)
    assert torch.equal(op(logits, index.T.contiguous().T), flat)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(op(logits, index.to(dtype)), flat)
    torch.testing.assert_close(op(logits[0], index[0]), flat[0])
    torch.testing.assert_close(op(logits, index.flip(1)), flat)  # a set has no order
    none = logits[:0].requires_grad_()
    empty = op(none, index[:0])
    assert empty.shape == (0,)
    assert torch.autograd.grad(empty.sum(), none)[0].shape == (0, 12)


@pytest.mark.parametrize("k", [3, 10])
def test_blocks_change_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the recursion and nodes of the integral in many small parts."""
    inputs, dy = problem(37, 12, k, 2.0, torch.float64, "cpu")
    whole = run(log_prob_of_set, inputs, ("logits",), dy)
    monkeypatch.setattr(torch_unordered, "_chunk", lambda log_a: 5 * 2**k if k < 9 else 7 * 370)
    parts = run(log_prob_of_set, inputs, ("logits",), dy)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory that is never touched")
def test_rows_more_than_2_to_31_elements_apart() -> None:
    inputs, dy = problem(3, 8, 3, 1.0, torch.float16)
    far = {**inputs, "logits": far_apart(inputs["logits"])}
    op = functools.partial(log_prob_of_set, backend="triton")
    near = run(op, inputs, ("logits",), dy)
    for name, value in run(op, far, ("logits",), dy).items():
        assert torch.equal(value, near[name])


@pytest.mark.parametrize("failing", ["fwd", "bwd"])
def test_a_failing_kernel_is_replaced(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both passes and in the caller's own."""
    from remix_kernels import triton_unordered

    launch = triton_unordered.launch

    def fail(kernel: Any, *args: Any, **kwargs: Any) -> None:
        if failing in kernel.fn.__name__:
            raise KernelError("_unordered: planted")
        launch(kernel, *args, **kwargs)

    inputs, dy = problem(20, 8, 3, 1.0, torch.float32)
    op = functools.partial(log_prob_of_set, backend="triton")
    want = run(log_prob_of_set, {**inputs, "backend": "torch"}, ("logits",), dy)
    monkeypatch.setattr(triton_unordered, "launch", fail)
    with pytest.raises(KernelError, match="planted"):
        run(op, inputs, ("logits",), dy)
    monkeypatch.setenv("REMIX_STRICT", "0")
    monkeypatch.setattr("remix_kernels._fallback._warned", set())
    with pytest.warns(UserWarning, match="planted"):
        got = run(op, inputs, ("logits",), dy)
    replaced = "y" if failing == "fwd" else "dlogits"
    assert torch.equal(got[replaced], want[replaced])
    torch.testing.assert_close(got["dlogits"], want["dlogits"])
    logits, index = inputs.values()
    alone = selection_log_prob_bwd(logits, index, dy, unordered=True, backend="triton")
    torch.testing.assert_close(alone, want["dlogits"])


@pytest.mark.parametrize("k", [2, 9])
def test_one_graph(k: int) -> None:
    """Under torch.compile, as the ordered one."""
    inputs, dy = problem(5, 12, k, 1.0, torch.float32, "cpu")
    logits, index = inputs.values()

    def call(z: Tensor) -> Tensor:
        return LogProb.apply(z, index, TORCH_SCORES[True])

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    want = run(call, {"z": logits}, ("z",), dy)
    got = run(compiled, {"z": logits}, ("z",), dy)
    assert all(torch.equal(got[name], want[name]) for name in want)
    after = run(log_prob_of_set, inputs, ("logits",), dy)  # nothing fake was kept
    assert torch.equal(after["y"], want["y"])


def test_sets_are_drawn_at_their_probability() -> None:
    draws, n, k = 2**15, 5, 2
    logits = torch.tensor([1.5, 0.0, -1.0, 0.5, 0.2])
    index = sample_top_k(logits.expand(draws, -1), k, seed=5).sort(1).values
    for chosen in itertools.combinations(range(n), k):
        hits = int((index == torch.tensor(chosen, dtype=index.dtype)).all(1).sum())
        p = float(log_prob_of_set(logits, torch.tensor(chosen)).exp())
        assert abs(hits - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5, chosen

"""selection_log_prob against enumeration and the reference, its gradient against autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from remix_kernels import reference, sample_top_k, selection_log_prob
from tests.helpers import (
    DEVICES,
    Inputs,
    assert_accurate,
    assert_all_accurate,
    in_fp64,
    param_id,
    routing,
    run,
    selection_log_prob_eager,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(
    T: int, n: int, k: int, scale: float, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Inputs, Tensor]:
    """Arguments and a signed dy."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(T, n, generator=generator) * scale).to(dtype)
    index = routing(T, n, k, (), generator)
    dy = torch.randn(T, generator=generator)
    inputs = {"logits": logits.to(device), "top_k_index": index.to(device)}
    return inputs, dy.double().to(device) if dtype == torch.float64 else dy.to(device)


def assert_right(inputs: Inputs, dy: Tensor) -> None:
    """Forward and gradient against the reference in fp64, by the accuracy rule."""
    trained = ("logits",)
    actual = run(selection_log_prob, inputs, trained, dy)
    eager = run(selection_log_prob_eager, inputs, trained, dy)
    truth = run(reference.selection_log_prob_ref, in_fp64(inputs), trained, dy.double())
    fp64 = inputs["logits"].dtype == torch.float64
    assert actual["y"].dtype == (torch.float64 if fp64 else torch.float32)
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=param_id)
@pytest.mark.parametrize(
    "T,n,k", [(50, 8, 2), (50, 8, 1), (50, 8, 8), (1, 5, 3), (50, 1, 1), (20, 64, 6)], ids=param_id
)
def test_against_the_reference(T: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    assert_right(*problem(T, n, k, 1.5, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("scale", [0.0, 30.0, 1e3, 1e4], ids=lambda v: f"scale{v:g}")
def test_extreme_logits(scale: float, k: int, device: str) -> None:
    assert_right(*problem(50, 8, k, scale, torch.float32, device))


@pytest.mark.parametrize("device", DEVICES)
def test_one_sided_logits(device: str) -> None:
    """The certain draw, and the one of probability e^-20000."""
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0], [1e4, -1e4, 0.0, 0.0]], device=device)
    index = torch.tensor([[0, 2], [1, 0]], device=device)
    dy = torch.tensor([1.0, -1.0], device=device)
    assert_right({"logits": logits, "top_k_index": index}, dy)


def test_an_expert_at_minus_infinity_counts_for_nothing() -> None:
    inputs, dy = problem(10, 6, 2, 1.0, torch.float64)
    index = inputs["top_k_index"] % 4
    index[:, 1] = (index[:, 0] + 1) % 4
    padded = inputs["logits"].clone()
    padded[:, 4:] = float("-inf")
    with_it = run(selection_log_prob, {"logits": padded, "top_k_index": index}, ("logits",), dy)
    few = {"logits": inputs["logits"][:, :4], "top_k_index": index}
    without = run(selection_log_prob, few, ("logits",), dy)
    assert_accurate(with_it["y"], without["y"], without["y"])
    assert_accurate(with_it["dlogits"][:, :4], without["dlogits"], without["dlogits"])
    assert not with_it["dlogits"][:, 4:].any()


@pytest.mark.parametrize("n,k", [(5, 3), (4, 4), (6, 1)], ids=param_id)
def test_probabilities_of_all_ordered_selections(n: int, k: int) -> None:
    """Each is the product of q_i / (what is left), and together they are 1."""
    orders = torch.tensor(list(itertools.permutations(range(n), k)))
    logits = torch.randn(n, generator=torch.Generator().manual_seed(1)).expand(len(orders), n)
    drawn = logits.double().softmax(1).gather(1, orders)
    truth = (drawn / (1 - drawn.cumsum(1) + drawn)).prod(1)
    actual = selection_log_prob(logits, orders).exp()
    eager = selection_log_prob_eager(logits, orders).exp()
    assert_accurate(actual, eager, truth)
    assert_accurate(actual.sum(), eager.sum(), torch.ones((), dtype=torch.float64), "sum")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("n,k", [(5, 3), (4, 4), (4, 1)], ids=param_id)
def test_probabilities_of_all_sets(n: int, k: int, backend: str) -> None:
    """unordered=True: every set has the sum over its orders, and all sets together are 1."""
    z = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.combinations(range(n), k):
        orders = torch.tensor(list(itertools.permutations(chosen)))
        ordered = selection_log_prob(z.expand(len(orders), n), orders).logsumexp(0)
        index = torch.tensor(chosen)
        unordered = selection_log_prob(z, index, unordered=True, backend=backend)
        assert_accurate(unordered, ordered, ordered)
        total += unordered.exp()
    assert_accurate(total, total.new_ones(()), total.new_ones(()), "sum")


def test_gradcheck() -> None:
    inputs, _ = problem(6, 5, 3, 1.0, torch.float64)
    index = inputs["top_k_index"]
    logits = inputs["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selection_log_prob(z, index), (logits,))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64, torch.uint8], ids=param_id)
def test_leading_dimensions(index_dtype: torch.dtype) -> None:
    inputs, _ = problem(24, 8, 3, 1.0, torch.float32)
    logits, index = inputs["logits"], inputs["top_k_index"].to(index_dtype)
    flat = selection_log_prob(logits, index)
    nested = selection_log_prob(logits.view(2, 3, 4, 8), index.view(2, 3, 4, 3))
    assert torch.equal(nested, flat.view(2, 3, 4))
    assert torch.equal(selection_log_prob(logits.T.contiguous().T, index), flat)
    assert torch.equal(selection_log_prob(logits[0], index[0]), flat[0])
    assert selection_log_prob(logits[:0], index[:0]).shape == (0,)


def test_no_rows_have_a_gradient() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    selection_log_prob(logits, torch.zeros(0, 2, dtype=torch.int32)).sum().backward()
    assert logits.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=param_id)
def test_reference_backend_is_the_reference(dtype: torch.dtype) -> None:
    inputs, _ = problem(6, 5, 3, 1.0, dtype)
    logits, index = inputs["logits"], inputs["top_k_index"]
    z = logits if dtype == torch.float64 else logits.float()
    expected = reference.selection_log_prob_ref(z, index)
    assert torch.equal(selection_log_prob(logits, index, backend="reference"), expected)


def test_mean_score_of_draws_is_zero() -> None:
    """E[d log Q / d z] = 0 over draws from Q: draw and probability are of one distribution."""
    draws = 2**16
    logits = torch.tensor([1.5, 0.0, -1.0, 0.5]).expand(draws, -1).contiguous().requires_grad_()
    index = sample_top_k(logits, 2, seed=23)
    (score,) = torch.autograd.grad(selection_log_prob(logits, index).sum(), logits)
    score = score.double()
    assert bool((score.mean(0).abs() < 5 * score.std(0) / draws**0.5).all())

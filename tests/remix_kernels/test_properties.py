"""Random valid arguments agree with the reference in fp64; random invalid ones raise.

HYPOTHESIS_PROFILE=thorough tries thousands of each.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from remix_kernels import reference, routed_linear, routed_lora, sample_top_k, selection_log_prob
from tests.helpers import relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
STRATEGIES = ["auto", "dense", "grouped", "gather"]
Arguments = dict[str, Any]


def rows(shape: tuple[int, ...], n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, n, generator=generator).argsort(-1)[..., :k]


@st.composite
def strided(draw: Any, tensor: Tensor) -> Tensor:
    """The same numbers with other strides: transposed, sliced with a step, or with a gap."""
    kind = draw(st.sampled_from(["plain", "transposed", "step", "gap"]))
    if kind == "plain" or tensor.dim() < 2 or tensor.numel() == 0:
        return tensor
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)
    view = wide[..., ::2] if kind == "step" else wide[..., : tensor.shape[-1]]
    return view.copy_(tensor)


@st.composite
def problems(draw: Any, linear: bool) -> Arguments:
    """Valid arguments of a routed op."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, width, out, r = (draw(st.integers(1, top)) for top in (9, 17, 17, 6))
    k = draw(st.integers(1, n))
    lead = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    selections = draw(st.sampled_from([None, None, 1, 3]))
    dtype = draw(st.sampled_from(DTYPES))
    other = draw(st.sampled_from([dtype, torch.float32]))
    shared = draw(st.booleans())

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = lead if selections is None else (selections, *lead)
    index = rows(shape, n, k, generator).to(draw(st.sampled_from(INDEX_DTYPES)))
    arguments: Arguments = {
        "x": draw(strided(numbers(*lead, width))),
        "lora_A": draw(strided(numbers(1 if shared else n, r, width, dtype=other) / width**0.5)),
        "lora_B": draw(strided(numbers(n, out, r, dtype=other))),
        "top_k_index": draw(strided(index)),
        "top_k_weights": draw(
            st.sampled_from([0.5, 2, -1.5, draw(strided(numbers(*shape, k, dtype=other)))])
        ),
    }
    if linear:
        arguments["weight"] = draw(strided(numbers(out, width) / width**0.5))
        arguments["bias"] = draw(st.sampled_from([None, numbers(out)]))
    elif draw(st.booleans()):
        arguments["base"] = draw(strided(numbers(*shape, out)))
    return arguments


def gradients(op: Any, arguments: Arguments, dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """The result of an op, and the gradient of every input that has one."""
    trained = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    y = op(**{**arguments, **trained}, **options)
    grads = torch.autograd.grad(y, list(trained.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


def agrees(op: Any, truth: Any, arguments: Arguments, strategy: str) -> None:
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected_y = truth(**wide)
    dy = torch.randn(expected_y.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = gradients(truth, wide, dy)
    actual = gradients(op, arguments, dy, backend="torch", strategy=strategy)
    # A wrong number, not a rounded one: terms of different sign may cancel, so the bound is wide.
    eps = torch.finfo(arguments["x"].dtype).eps
    if arguments["lora_A"].dtype != torch.float64:
        eps = max(eps, torch.finfo(torch.float32).eps)
    for name, value in actual.items():
        assert value.shape == expected[name].shape
        scale = float(expected[name].norm()) + 1e-3 * float(dy.norm()) + 1e-3
        error = float((value.double() - expected[name]).norm())
        assert error <= 200 * eps * scale * (1 + math.log2(1 + value.numel())), name


@given(problems(linear=False), st.sampled_from(STRATEGIES))
def test_routed_lora(arguments: Arguments, strategy: str) -> None:
    agrees(routed_lora, reference.routed_lora_ref, arguments, strategy)


@given(problems(linear=True), st.sampled_from(STRATEGIES))
def test_routed_linear(arguments: Arguments, strategy: str) -> None:
    agrees(routed_linear, reference.routed_linear_ref, arguments, strategy)


@st.composite
def policies(draw: Any) -> tuple[Tensor, int]:
    """Logits of every size, and k."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 12))
    lead = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 30.0, 1000.0]))
    logits = torch.randn(*lead, n, generator=generator) * scale
    return draw(strided(logits.to(draw(st.sampled_from(DTYPES))))), draw(st.integers(1, n))


SEEDS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-5, 5))
OFFSETS = st.one_of(st.integers(0, 2**62), st.integers(0, 5), st.integers(2**32 - 3, 2**32 + 3))


@given(policies(), SEEDS, OFFSETS, st.integers(0, 3))
def test_sample_top_k(policy: tuple[Tensor, int], seed: int, offset: int, split: int) -> None:
    """As the reference draws, or where keys agree to fp32's last bits, as good as that."""
    logits, k = policy
    index = sample_top_k(logits, k, seed=seed, offset=offset, backend="torch")
    assert index.shape == (*logits.shape[:-1], k) and index.dtype == torch.int32
    assert all(len(set(row)) == k for row in index.reshape(-1, k).tolist())
    z = logits.reshape(-1, logits.shape[-1]).float()
    expected = sample_top_k(z, k, seed=seed, offset=offset, backend="reference")
    if not torch.equal(index.reshape(-1, k), expected):
        keys = keys_of(z.double(), seed, offset)
        got = keys.gather(-1, index.reshape(-1, k).long())
        want = keys.gather(-1, expected.long())
        assert bool(((got - want).abs() <= 1e-5 * (1 + want.abs())).all())
    rest = sample_top_k(z[split:], k, seed=seed, offset=offset + split, backend="torch")
    assert torch.equal(rest, index.reshape(-1, k)[split:])


def keys_of(z: Tensor, seed: int, offset: int) -> Tensor:
    """z + Gumbel noise, as the reference makes it."""
    words = [
        [reference.philox_words(seed, offset + t, e // 4)[e % 4] for e in range(z.shape[1])]
        for t in range(z.shape[0])
    ]
    u = ((torch.tensor(words, dtype=torch.float64) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return z - (-torch.log1p(-u.view(z.shape))).log()


@given(policies(), st.booleans(), st.integers(0, 99))
def test_selection_log_prob(policy: tuple[Tensor, int], unordered: bool, seed: int) -> None:
    logits, k = policy
    assume(not unordered or k <= 5)  # the reference sums over k! orders
    logits = logits.detach()
    index = rows(logits.shape[:-1], logits.shape[-1], k, torch.Generator().manual_seed(seed))
    wide = logits.double().requires_grad_()
    narrow = logits.requires_grad_()
    expected = selection_log_prob(wide, index, unordered=unordered, backend="reference")
    actual = selection_log_prob(narrow, index, unordered=unordered, backend="torch")
    assert actual.shape == expected.shape
    assert bool((actual <= 1e-3 * (1 + actual.abs())).all())
    eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
    size = 1 + float(logits.detach().double().abs().max()) if logits.numel() else 1.0
    assert bool(((actual.double() - expected).abs() <= 100 * eps * k * size).all())
    (want,) = torch.autograd.grad(expected.sum(), wide)
    (got,) = torch.autograd.grad(actual.sum(), narrow)
    allowed = 4 * torch.finfo(logits.dtype).eps + 1000 * eps * size
    assert bool(((got.double() - want).abs() <= allowed * k).all())


# Invalid arguments


BAD: list[Any] = [
    None,
    "x",
    [1.0],
    True,
    2.5,
    -1,
    10**30,
    10**400,
    float("nan"),
    torch.ones(()),
    torch.ones(2, 3, 4, 5),
    torch.ones(3, 0),
    torch.ones(6, 2, dtype=torch.complex64),
    torch.ones(6, 2, dtype=torch.bool),
    torch.zeros(6, 2, dtype=torch.int64),
    torch.full((6, 2), 99),
    torch.full((6, 2), -1),
    torch.ones(6, 10, dtype=torch.float8_e4m3fn),
    torch.ones(6, 10).to_sparse(),
    torch.ones(6, 10, device="meta"),
    torch.quantize_per_tensor(torch.ones(6, 10), 0.1, 0, torch.qint8),
]
VALID: dict[Any, Arguments] = {
    routed_lora: {
        "x": torch.ones(6, 10),
        "lora_A": torch.ones(4, 3, 10),
        "lora_B": torch.ones(4, 12, 3),
        "top_k_index": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [2, 0], [0, 3]]),
        "top_k_weights": 1.0,
        "base": None,
        "backend": "torch",
        "strategy": "auto",
    },
    sample_top_k: {"logits": torch.ones(6, 4), "k": 2, "seed": 0, "offset": 0, "backend": "torch"},
    selection_log_prob: {
        "logits": torch.ones(6, 4),
        "top_k_index": torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [2, 0], [0, 3]]),
        "backend": "torch",
    },
}
VALID[routed_linear] = {
    **{name: value for name, value in VALID[routed_lora].items() if name != "base"},
    "weight": torch.ones(12, 10),
    "bias": None,
}


@st.composite
def mistakes(draw: Any) -> tuple[Any, Arguments]:
    """An op, and arguments of which up to three are of any kind."""
    op = draw(st.sampled_from(list(VALID)))
    names = draw(st.lists(st.sampled_from(list(VALID[op])), min_size=1, max_size=3, unique=True))
    wrong = {name: draw(st.sampled_from(BAD)) for name in names}
    return op, {**VALID[op], **wrong}


@given(mistakes())
def test_anything_else_is_refused_or_right(mistake: tuple[Any, Arguments]) -> None:
    """Whatever is not refused with a ValueError or TypeError is what the reference makes of it."""
    op, arguments = mistake
    try:
        actual = op(**arguments)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 10
        return
    if actual.device.type == "meta":  # it has a shape and no numbers
        return
    expected = op(**{**arguments, "backend": "reference"})
    assert actual.shape == expected.shape
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        assert relative_error(actual.nan_to_num(), expected.nan_to_num().double()) < 1e-5
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_policy_that_is_no_number_is_not_drawn_from(value: float, backend: str) -> None:
    logits = torch.zeros(5, 4)
    logits[3, 2] = value
    with pytest.raises(ValueError, match=r"logits.*row 3.*not.*number"):
        sample_top_k(logits, 2, seed=0, backend=backend)


def test_an_expert_may_be_ruled_out() -> None:
    """By a logit of -inf, as long as k others are left."""
    logits = torch.zeros(50, 4)
    logits[:, 1] = float("-inf")
    assert 1 not in sample_top_k(logits, 3, seed=0)

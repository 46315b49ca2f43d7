"""sample_top_k and its generator: the same draw everywhere, at exactly the Plackett-Luce rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from remix_kernels import reference, sample_top_k
from remix_kernels._philox import philox_uint32
from remix_kernels.torch_sampling import exponential
from tests.helpers import DEVICES, assert_accurate, param_id

CPU = torch.device("cpu")
# (seed, first row): all 64 bits of both count, and a seed may be any integer.
COUNTERS = [
    (0, 0),
    (1, 7),
    (2**32, 0),
    (2**63 + 5, 2**32 - 3),
    (-1, 2**40 + 1),
    (2**64 - 1, 2**62),
    (-(2**70), 0),
]


def logits_of(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * scale


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 for any counter and key, written for the published vectors below."""
    mask, (c0, c1, c2, c3), (k0, k1) = 0xFFFFFFFF, counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


# The generator


@pytest.mark.parametrize(
    "counter,key,words",
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    """Random123's kat_vectors, against the generator that then checks the package's two."""
    parsed = [tuple(int(word, 16) for word in text.split()) for text in (counter, key, words)]
    assert philox4x32(parsed[0], parsed[1]) == parsed[2]


def test_philox_zero_vector_through_the_package() -> None:
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox_words(0, 0, 0) == words
    assert tuple(philox_uint32(0, 0, 1, 4, CPU)[0].tolist()) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed,offset", COUNTERS)
def test_philox_layout(seed: int, offset: int, device: str) -> None:
    """Key = seed, counter = (row, row's high half, expert // 4, 0), word = expert % 4."""
    mask = 0xFFFFFFFF
    got = philox_uint32(seed, offset, 5, 10, torch.device(device)).tolist()
    for row, words in enumerate(got, start=offset):
        key = (seed & mask, (seed >> 32) & mask)
        blocks = [philox4x32((row & mask, row >> 32, block, 0), key) for block in range(3)]
        assert words == list(itertools.chain(*blocks))[:10]
        assert [reference.philox_words(seed, row, block) for block in range(3)] == blocks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("below", [1.0, 2.0**-6, 2.0**-12], ids=["all", "small", "smaller"])
def test_exponential(below: float, device: str) -> None:
    """-log(1 - u), accurate in its logarithm too: small values are large Gumbels."""
    rows, columns = 2**18, 4
    place = torch.device(device)
    u = (philox_uint32(5, 0, rows, columns, place).double() + 0.5) * 2.0**-32
    truth, eager = (-torch.log1p(-v.clamp(max=1 - 2.0**-24)) for v in (u, u.float()))
    actual = exponential(5, 0, rows, columns, place)
    assert actual.dtype == torch.float32
    assert bool((actual > 0).all())
    chosen = u < below
    assert_accurate(actual[chosen], eager[chosen], truth[chosen], "exponential")
    assert_accurate(-actual[chosen].log(), -eager[chosen].log(), -truth[chosen].log(), "Gumbel")


@pytest.mark.parametrize(
    "seeds", [(0, 1), (1, 2), (7, 7 + 2**32), (-1, 2**63 - 1), (123, 123 ^ 2**31)], ids=str
)
def test_streams_of_two_seeds_are_independent(seeds: tuple[int, int]) -> None:
    first, second = (exponential(s, 0, 2**16, 4, CPU).log().flatten() for s in seeds)
    assert abs(correlation(first, second)) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize("lag", [(1, 0), (2, 0), (0, 1), (0, 4), (1, 1)], ids=str)
def test_rows_and_experts_are_independent(lag: tuple[int, int]) -> None:
    noise = exponential(11, 2**32 - 2**15, 2**16, 8, CPU).log()
    down, right = lag
    first = noise[: noise.shape[0] - down, : noise.shape[1] - right].flatten()
    second = noise[down:, right:].flatten()
    assert abs(correlation(first, second)) < 5 / math.sqrt(first.numel())


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])


# The draw


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed,offset", COUNTERS)
@pytest.mark.parametrize("n,k", [(1, 1), (5, 2), (8, 8), (64, 5)], ids=param_id)
def test_equals_the_reference(n: int, k: int, seed: int, offset: int, device: str) -> None:
    logits = logits_of(40, n, scale=2.0)
    expected = reference.sample_top_k_ref(logits, k, seed=seed, offset=offset)
    index = sample_top_k(logits.to(device), k, seed=seed, offset=offset, backend="torch")
    assert index.dtype == expected.dtype == torch.int32
    assert torch.equal(index.cpu(), expected)
    index = sample_top_k(logits, k, seed=seed, offset=offset, backend="reference")
    assert torch.equal(index, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [0, 1, 7, 200])
def test_a_split_draws_what_the_whole_draws(start: int, device: str) -> None:
    logits, offset = logits_of(200, 8).to(device), 2**32 - 50
    whole = sample_top_k(logits, 3, seed=9, offset=offset)
    part = sample_top_k(logits[start:], 3, seed=9, offset=offset + start)
    assert torch.equal(part, whole[start:])


def test_threads_change_nothing() -> None:
    logits, threads = logits_of(50_000, 8), torch.get_num_threads()
    draws = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            draws.append(sample_top_k(logits, 3, seed=4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])


def test_rows_are_counted_over_leading_dimensions() -> None:
    logits = logits_of(3, 4, 5, 8)
    flat = sample_top_k(logits.view(-1, 8), 2, seed=1)
    assert torch.equal(sample_top_k(logits, 2, seed=1), flat.view(3, 4, 5, 2))
    assert torch.equal(sample_top_k(logits.mT.contiguous().mT, 2, seed=1), flat.view(3, 4, 5, 2))
    assert torch.equal(sample_top_k(logits[0, 0, 0], 2, seed=1), flat[0])
    assert sample_top_k(logits[:0], 2, seed=1).shape == (0, 4, 5, 2)


def test_logits_are_taken_in_fp32_and_left_alone() -> None:
    logits = logits_of(100, 8).bfloat16().requires_grad_()
    before = logits.detach().clone()
    index = sample_top_k(logits, 2, seed=1)
    assert not index.requires_grad
    assert torch.equal(index, sample_top_k(before.float(), 2, seed=1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seeds", [(0, 1), (5, 5 + 2**32), (3, -3)], ids=str)
def test_seeds_draw_differently(seeds: tuple[int, int]) -> None:
    first, second = (sample_top_k(torch.zeros(1000, 8), 1, seed=s) for s in seeds)
    agreements = int((first == second).sum())  # binomial(1000, 1/8)
    assert abs(agreements - 125) < 5 * math.sqrt(1000 * 1 / 8 * 7 / 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n,k", [(8, 8), (64, 40), (5, 3)], ids=param_id)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4, 1e30], ids=lambda v: f"scale{v:g}")
def test_a_row_holds_no_expert_twice(scale: float, n: int, k: int, device: str) -> None:
    index = sample_top_k(logits_of(2000, n, scale=scale).to(device), k, seed=2).sort(-1).values
    assert int(index.min()) >= 0
    assert int(index.max()) < n
    assert bool((index[:, 1:] > index[:, :-1]).all())


@pytest.mark.parametrize("device", DEVICES)
def test_an_expert_at_minus_infinity_is_drawn_last(device: str) -> None:
    logits = torch.zeros(2000, 6, device=device)
    logits[:, [1, 4]] = float("-inf")
    index = sample_top_k(logits, 6, seed=2)
    assert set(index[:, :4].unique().tolist()) == {0, 2, 3, 5}
    assert set(index[:, 4:].unique().tolist()) == {1, 4}


def test_an_expert_far_above_is_drawn_first() -> None:
    logits = torch.full((2000, 4), -1e4)
    logits[:, 2] = 1e4
    index = sample_top_k(logits, 2, seed=2)
    assert bool((index[:, 0] == 2).all())
    assert set(index[:, 1].unique().tolist()) == {0, 1, 3}


# The rates


def plackett_luce(logits: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered selection, by the definition: draw, remove, renormalise."""
    q = logits.double().softmax(0).tolist()
    rates = {}
    for order in itertools.permutations(range(len(q)), k):
        probability, left = 1.0, 1.0
        for expert in order:
            probability *= q[expert] / left
            left -= q[expert]
        rates[order] = probability
    return rates


def assert_plackett_luce(index: Tensor, logits: Tensor) -> None:
    """Each ordered selection within five standard deviations of its rate, and their chi-square."""
    draws, k = index.shape
    rates = plackett_luce(logits, k)
    code = sum(index[:, j].long() * logits.numel() ** j for j in range(k))
    codes, numbers = code.unique(return_counts=True)
    counts = dict(zip(codes.tolist(), numbers.tolist(), strict=True))
    chi_square = 0.0
    for order, rate in rates.items():
        count = counts.pop(sum(expert * logits.numel() ** j for j, expert in enumerate(order)), 0)
        assert draws * rate > 20, f"{order} is too rare for a test by {draws} draws"
        assert abs(count - draws * rate) < 5 * math.sqrt(draws * rate * (1 - rate)), (
            f"{order}: {count} draws of {draws}, expected {draws * rate:.0f}"
        )
        chi_square += (count - draws * rate) ** 2 / (draws * rate)
    assert not counts, f"not selections at all: {counts}"
    freedom = len(rates) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


RATES = [
    ([1.5, 0.0, -1.0, 0.5], 2),
    ([0.7, -0.7, 0.1], 3),
    ([0.0, 0.0, 0.0, 0.0, 0.0], 1),
    ([4.0, -4.0, 0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5], 1),
    ([0.0, -9.0], 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits,k", RATES, ids=param_id)
def test_draws_have_plackett_luce_rates(logits: list[float], k: int, device: str) -> None:
    z = torch.tensor(logits)
    index = sample_top_k(z.to(device).expand(2**18, -1), k, seed=17, offset=2**32 - 1000)
    assert_plackett_luce(index.cpu(), z)


def gumbel_clamped_before_the_minus(u: Tensor) -> Tensor:
    return -torch.log(-torch.log(u).clamp_min(1e-20))  # binds before the minus: log of -1e-20


def gumbel_without_the_inner_minus(u: Tensor) -> Tensor:
    return torch.log(-torch.log(u))


def gumbel_shared_by_all_rows(u: Tensor) -> Tensor:
    return -torch.log(-torch.log(u[:1])).expand_as(u)


@pytest.mark.parametrize(
    "gumbel",
    [
        gumbel_clamped_before_the_minus,
        gumbel_without_the_inner_minus,
        gumbel_shared_by_all_rows,
        torch.zeros_like,
    ],
    ids=lambda fault: fault.__name__,
)
def test_the_rates_test_catches_a_planted_fault(gumbel: Callable[[Tensor], Tensor]) -> None:
    """Such faults train without a word; only the rates show them."""
    z = torch.tensor(RATES[0][0])
    u = torch.rand(2**16, 4, generator=torch.Generator().manual_seed(0)).clamp_min(1e-7)
    index = (z + gumbel(u)).topk(2, dim=-1).indices
    with pytest.raises(AssertionError, match="draws of"):
        assert_plackett_luce(index, z)


def test_the_rates_test_passes_a_correct_draw() -> None:
    z = torch.tensor(RATES[0][0])
    u = torch.rand(2**16, 4, generator=torch.Generator().manual_seed(0)).clamp_min(1e-7)
    assert_plackett_luce((z - torch.log(-torch.log(u))).topk(2, dim=-1).indices, z)

"""The probability of a set, a draw without replacement whose order is forgotten, in PyTorch.

    P(I) = sum over the k! orders of I of their Plackett-Luce probabilities, 1 where k = n

Up to 8 experts by a recursion over subsets, whose terms are all positive:

    g(S) = logsumexp_{i in S} [ g(S - i) + z_i - D(S - i) ],  g({}) = 0,  log P = g(I)
    D(U) = logsumexp(z over experts not in U), built by adding experts, never by taking them away
    b(U) = sum_{i in I - U} b(U + i) exp(g(U) + z_i - D(U) - g(U + i)),  b(I) = 1
    d log P / d z_e = [e in I] - sum_{U in I, U != I, e not in U} b(U) exp(z_e - D(U))

b(U) is the probability that a draw which ends in I passed through U. No exponent is positive, so
logits of any size are safe.

Beyond that 2^k subsets are too many. Let expert e have an exponential clock of rate exp(z_e): they
ring in Plackett-Luce's order, so I is drawn if all its clocks ring before the first of the others.
With a_i = exp(z_i) / sum_{e not in I} exp(z_e) and t in units of that first ring's mean,

    P(I) = integral_0^inf exp(-t) prod_{i in I} (1 - exp(-a_i t)) dt
    d log P / d log a_i = mean of h(a_i t) under the integrand, h(x) = x / (exp(x) - 1)

again without cancellation. Over s = log t the integrand is log-concave and analytic, so the
trapezoid rule converges exponentially; `node_range` says where its nodes lie.

Source: the recursion is the total probability over the last expert drawn; the trapezoid rule,
Trefethen and Weideman 2014, "The exponentially convergent trapezoidal rule".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from remix_kernels.torch_sampling import _log, wide

MAX_RECURSION = 8  # experts
_MAX_LOG_X = 4.3  # of x = a t: 1 - exp(-x) rounds to 1 from there on, and exp(x) fits fp32
_MIN_LOG_A, _MAX_LOG_A = -45.0, 45.0  # beyond, the factor is a t or 1 at every node

Level = tuple[Tensor, Tensor, Tensor]


def unordered_log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log P of every row. logits [T, n], index [T, k] -> [T], fp32 or fp64."""
    z = wide(logits)
    k = index.shape[1]
    if k == z.shape[1]:
        return z.new_zeros(z.shape[0])
    log_a = _log_a_and_share(z, index.long())[0]
    if k > MAX_RECURSION:
        return integrate(log_a)[0]
    log_prob = log_a.clamp_max(0.0).sum(0)
    for rows in _row_blocks(log_a):
        log_prob[rows] += subset_tables(log_a[:, rows])[0][-1]
    return log_prob


def unordered_log_prob_bwd(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """dlogits [T, n] from logits [T, n], index [T, k] and grad [T]."""
    z, index = wide(logits), index.long()
    k = index.shape[1]
    if k == z.shape[1]:
        return torch.zeros_like(logits)
    log_a, share = _log_a_and_share(z, index)
    if k > MAX_RECURSION:
        d_log_a = integrate(log_a)[1]
        d_rest = d_log_a.sum(0)
    else:
        d_log_a, d_rest = torch.empty_like(log_a), torch.empty_like(log_a[0])
        for rows in _row_blocks(log_a):
            d_log_a[:, rows], d_rest[rows] = subset_grad(log_a[:, rows])
    dz = share.mul_((-d_rest * grad).unsqueeze(1).to(z.dtype))
    return dz.scatter_(1, index, (d_log_a * grad).T.to(z.dtype)).to(logits.dtype)


def _log_a_and_share(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """log a [k, T] of the drawn experts; the others' softmax [T, n], 0 where drawn."""
    drawn, others = z.gather(1, index), z.scatter(1, index, float("-inf"))
    # Below this floor the set is certain, and log a would only be rounded the more.
    floor = drawn.amin(1, keepdim=True).sub_(_MAX_LOG_A).clamp_min_(torch.finfo(z.dtype).min)
    largest = torch.maximum(others.amax(1, keepdim=True), floor)
    share = others.sub_(largest).exp_()
    total = share.sum(1, keepdim=True)
    total = total.masked_fill(total == 0.0, 1.0)
    # In this order: large logits meet before anything is rounded to their size.
    log_a = drawn.sub_(largest).sub_(_log(total))
    return log_a.T.contiguous(), share.div_(total)


def _row_blocks(log_a: Tensor) -> Iterator[slice]:
    k, rows = log_a.shape
    size = max(1, _chunk(log_a) >> k)
    return (slice(start, start + size) for start in range(0, rows, size))


def _chunk(log_a: Tensor) -> int:
    """Numbers to have in a table: on a processor what its cache holds (2^14 to 2^22 were timed)."""
    return 2**17 if log_a.device.type == "cpu" else 2**24


# The recursion over subsets: bit i of a subset's number says whether it has the i-th drawn expert


@functools.cache
def _lattice(k: int, inside: bool, device: torch.device) -> list[Level]:
    """By size, 0 to k: subsets [m], their experts, or those they lack, and them less or more those.

    Both flattened from [m, size] or [m, k - size].
    """
    levels = []
    for size in range(k + 1):
        subsets = [s for s in range(2**k) if s.bit_count() == size]
        edges = [(s, i) for s in subsets for i in range(k) if bool(s >> i & 1) == inside]
        columns = (subsets, [i for _, i in edges], [s ^ (1 << i) for s, i in edges])
        levels.append(tuple(torch.tensor(column, device=device).long() for column in columns))
    return levels  # type: ignore[return-value]


def subset_tables(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """(g - sum_{i in S} min(log a_i, 0), D) for every subset, [2^k, T], of log_a [k, T].

    D beside the logsumexp of what was not drawn. Without the small a_i, which are in every term
    of g alike, the numbers are of the order of 1 to be rounded, however unlikely the set.
    """
    k, rows = log_a.shape
    left = torch.zeros_like(log_a[:1])
    for z in log_a:
        left = torch.cat((left, torch.logaddexp(left, z)))
    left = left.flip(0)  # it was numbered by what is left: the complement is the reverse
    g, large = torch.zeros_like(left), log_a.clamp_min(0.0)
    share = -left  # g - D
    for subsets, experts, smaller in _lattice(k, True, log_a.device)[1:]:
        terms = share.index_select(0, smaller).add_(large.index_select(0, experts))
        terms = terms.view(len(subsets), -1, rows)
        largest = terms.amax(1, keepdim=True).clamp_min_(torch.finfo(g.dtype).min)
        total = terms.sub_(largest).exp_().sum(1)
        level = total.sub_(1.0).log1p_().add_(largest.squeeze(1))  # of at least 1: nothing is lost
        g.index_copy_(0, subsets, level)
        share.index_add_(0, subsets, level)
    return g, left


def subset_grad(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """d log P / d log a [k, T], and its sum [T] without cancellation."""
    k, rows = log_a.shape
    g, left = subset_tables(log_a)
    passed, large = torch.zeros_like(g), log_a.clamp_min(0.0)  # passed: b
    passed[-1] = 1.0
    for subsets, experts, larger in reversed(_lattice(k, False, log_a.device)[:-1]):
        share = (g.index_select(0, subsets) - left.index_select(0, subsets)).unsqueeze(1)
        flow = large.index_select(0, experts).sub_(g.index_select(0, larger))
        flow = flow.view(len(subsets), -1, rows).add_(share).exp_()
        flow.mul_(passed.index_select(0, larger).view_as(flow))
        passed.index_copy_(0, subsets, flow.sum(1))
    total = torch.exp(-left[:-1]).mul_(passed[:-1]).sum(0)
    grad = torch.empty_like(log_a)
    for i, z in enumerate(log_a):
        lacking = (2 ** (k - 1 - i), 2, 2**i, rows)  # of each pair the one without expert i
        lost = torch.exp(z - left.view(lacking)[:, 0]).mul_(passed.view(lacking)[:, 0])
        grad[i] = 1.0 - lost.sum((0, 1))
    return grad, total


# The integral


@functools.cache
def node_range(k: int, eps: float) -> tuple[float, int, int]:
    """(step, first, last): the nodes are u = step * j, first <= j < last, and t = exp(s(u)).

    s(u) = u - 2 exp(-u / 4): what lies far left matters ever less, and so gets ever fewer nodes.
    The range leaves out about eps on either side. The peak of an unlikely set has the width
    1 / sqrt(k), that of a likely one 1; the constants of the step were found by trying sets of
    all kinds with 1 <= k <= 64: P is within eps, relatively, for eps from 1e-12 to 3e-8.
    """
    depth = -math.log(eps)
    step = (depth * (0.7 + 0.08 * k)) ** -0.5
    latest = math.log(k + 1 + math.sqrt(2.0 * depth * (k + 1)) + depth)
    first = last = 0
    while step * first - 2.0 * math.exp(-step * first / 4.0) > -depth:
        first -= 1
    while step * last - 2.0 * math.exp(-step * last / 4.0) < latest:
        last += 1
    return step, first, last + 1


def node_eps(dtype: torch.dtype) -> float:
    """The precision to ask of the integral: below what rounding leaves of log P."""
    return 1e-12 if dtype == torch.float64 else 2e-8


def integrate(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """log P [T] and d log P / d log a [k, T] of log_a [k, T], a few nodes at a time.

    Where a < 1, log a is taken out of its factor, so that the integrand's logarithm is of the
    order of 1 to be rounded, however unlikely the set.
    """
    step, first, last = node_range(log_a.shape[0], node_eps(log_a.dtype))
    rare = (log_a < 0).to(log_a.dtype)
    a = log_a.clamp(_MIN_LOG_A, _MAX_LOG_A)
    largest = torch.full_like(log_a[0], -math.inf)
    total, d_log_a = torch.zeros_like(largest), torch.zeros_like(log_a)
    size = max(1, _chunk(log_a) // max(1, log_a.numel()))
    for start in range(first, last, size):
        u = torch.arange(start, min(start + size, last), device=log_a.device).to(a.dtype) * step
        bend = torch.exp(-u / 4.0)
        s = (u - 2.0 * bend)[:, None, None]
        log_x = (s + a).clamp_(max=_MAX_LOG_X)
        x = torch.exp(log_x)
        grown = torch.expm1(x)
        slope = x / grown
        hit = grown.div_(grown + 1.0).div_(torch.exp(rare * log_x))
        log_hit = torch.log(hit).add_((log_x - a).mul_(rare))
        value = log_hit.sum(1) + (s - torch.exp(s)).squeeze(2) + torch.log1p(bend / 2.0)[:, None]
        highest = torch.maximum(largest, value.amax(0))
        weight = torch.exp(value - highest)
        scale = torch.exp(largest - highest)
        total = total.mul_(scale).add_(weight.sum(0))
        d_log_a = d_log_a.mul_(scale).add_((slope * weight.unsqueeze(1)).sum(0))
        largest = highest
    log_prob = largest + torch.log(total * step) + (log_a * rare).sum(0)
    return log_prob, d_log_a / total

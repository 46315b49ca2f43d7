"""Sampling without replacement and its log-probability, in PyTorch.

Gumbel top-k: the k largest of z + G with G standard Gumbel are a draw of k experts without
replacement from softmax(z), in order (Plackett-Luce). With E = -log(1 - u) a standard exponential,
G = -log(E). u is kept precise near 0, which is where the large Gumbels come from: probabilities
down to 2^-32 are drawn at their rate.

Log-probability of an ordered draw, and its gradient, in one pass each:

    log Q(I) = sum_j z_{i_j} - L_j,         L_j = logsumexp(z over experts not drawn before step j)
    d log Q / d z_e = [e in I] - sum_{j <= last(e)} exp(z_e - L_j)

where last(e) is e's own step if it was drawn, else k. The L_j are a cumulative logsumexp taken from
the experts never drawn backwards to the first draw, so that nothing is ever subtracted; in the
gradient each z_e meets its L_j before the exponential, which keeps it exact at any size of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remix_kernels._philox import philox_uint32


def sample_top_k(logits: Tensor, k: int, seed: int, offset: int) -> Tensor:
    """The k largest of logits + Gumbel noise. logits [T, n] -> int32 [T, k]."""
    z = logits.detach().float()
    keys = z - _log(exponential(seed, offset, z.shape[0], z.shape[1], z.device))
    return keys.topk(k, dim=-1).indices.to(torch.int32)


def exponential(seed: int, offset: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Standard exponentials, fp32 [rows, columns]: -log(1 - u) with u = (word + 1/2) / 2^32."""
    words = philox_uint32(seed, offset, rows, columns, device)
    u = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return torch.special.xlog1py(-1.0, u.neg_())


def _log(x: Tensor) -> Tensor:
    """log x, as xlogy, which does not go to the vector library that torch hands `log` to.

    Its threads may take milliseconds to wake, for the few thousand numbers of a layer's routing.
    """
    return torch.xlogy(1.0, x)


def wide(logits: Tensor) -> Tensor:
    """What scores are computed in: fp64 as it is, all else in fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _rest(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along columns of rows, which is what the processor's vectors run over.

    z [T, n], index [T, k] -> (z of the others [n, T], -inf where drawn; drawn z [k, T]; logsumexp
    of the others [T], -inf where there are none).
    """
    index = index.T
    left = z.T.clone(memory_format=torch.contiguous_format)
    drawn = left.gather(0, index)
    left.scatter_(0, index, float("-inf"))
    largest = left.amax(0).clamp_min_(torch.finfo(z.dtype).min)
    return left, drawn, _log(left.sub(largest).exp_().sum(0)).add_(largest)


def log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log Q of every row. logits [T, n], index [T, k] -> [T], fp32 or fp64."""
    _, drawn, rest = _rest(wide(logits), index.long())
    total = torch.zeros_like(rest)
    for z in reversed(drawn):  # L_j from the last draw to the first
        rest = torch.logaddexp(rest, z)
        total.add_(z - rest)
    return total


def log_prob_bwd(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """dlogits [T, n] from logits [T, n], index [T, k] and grad [T]."""
    index = index.long()
    left, drawn, rest = _rest(wide(logits), index)
    dz = torch.zeros_like(left)
    for j in range(index.shape[1] - 1, -1, -1):
        rest = torch.logaddexp(rest, drawn[j])
        left.scatter_(0, index.T[j : j + 1], drawn[j : j + 1])  # not drawn before step j
        dz.sub_((left - rest).exp_())
    dz.scatter_add_(0, index.T, torch.ones_like(drawn))
    return dz.mul_(grad).T.to(logits.dtype)

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

from typing import Any

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


def _logsumexp(z: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept; -inf where all are."""
    largest = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
    return largest + _log(torch.exp(z - largest).sum(-1, keepdim=True))


def step_logsumexp(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """L_j for every step. z [T, n] fp32, index [T, k] -> (drawn z [T, k], L [T, k])."""
    drawn = z.gather(1, index)
    rest = _logsumexp(z.scatter(1, index, float("-inf")))
    tail = torch.cat((rest, drawn.flip(1)), dim=1).logcumsumexp(1)
    return drawn, tail[:, 1:].flip(1)


def log_prob_grad(z: Tensor, index: Tensor, step_lse: Tensor) -> Tensor:
    """d log Q / d z. z [T, n] fp32, index [T, k], step_lse [T, k] -> fp32 [T, n]."""
    left = z.clone()
    grad = torch.zeros_like(z)
    for j in range(index.shape[1]):
        step = index[:, j : j + 1]
        grad.sub_(torch.exp(left - step_lse[:, j : j + 1]))
        left.scatter_(1, step, float("-inf"))
    return grad.scatter_add_(1, index, torch.ones_like(step_lse))


def log_prob_bwd(
    logits: Tensor, index: Tensor, grad: Tensor, step_lse: Tensor | None = None
) -> Tensor:
    """dlogits [T, n] from logits [T, n], index [T, k], grad [T] and, where kept, L [T, k]."""
    z, index = logits if logits.dtype == torch.float64 else logits.float(), index.long()
    if step_lse is None:
        step_lse = step_logsumexp(z, index)[1]
    return (log_prob_grad(z, index, step_lse) * grad.unsqueeze(1)).to(logits.dtype)


class OrderedLogProb(torch.autograd.Function):
    """log Q of an ordered selection with the gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()
        index = index.long()
        drawn, step_lse = step_logsumexp(z, index)
        ctx.save_for_backward(logits, index, step_lse)
        return (drawn - step_lse).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, index, step_lse = ctx.saved_tensors
        return log_prob_bwd(logits, index, grad, step_lse), None

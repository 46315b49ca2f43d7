"""Terms beside the expected loss that routers may be trained on. Off by default: all are biases.

Over the counted rows t of a layer under one selection, with q = softmax(z), and averaged over
layers and selections:

    entropy bonus    - entropy_coef * mean_t H(q_t)               keeps the policy from hardening
    load balancing   load_balancing_coef * n sum_i f_i mean_t q_ti     f_i: share of (row, slot)
                     pairs that i took, held constant; 1 when experts are used evenly

Their gradients in z are delivered with the router's own: they never enter the returned loss.

Source: Williams and Peng 1991 for the entropy; Fedus et al. 2021, arXiv 2101.03961, section 2.2
for the load.
"""

from __future__ import annotations

import torch
from torch import Tensor


def regularizer_grad(
    logits: Tensor,
    drawn: Tensor,
    counted: Tensor | None,
    entropy_coef: float,
    load_balancing_coef: float,
) -> Tensor:
    """d (both terms) / d logits of one layer, averaged over selections.

    Args:
        logits: [c, T, n] fp32, of c selections.
        drawn: Integer [c, T, k], the experts that rows took.
        counted: [c, T], nonzero for rows that count; None: all.
        entropy_coef: Of the bonus.
        load_balancing_coef: Of the load.

    Returns:
        [c, T, n] fp32.
    """
    n, k = logits.shape[-1], drawn.shape[-1]
    kept = logits.new_ones(logits.shape[:2]) if counted is None else (counted != 0).to(logits)
    kept = kept.unsqueeze(-1)
    rows = kept.sum(1, keepdim=True).clamp(min=1)
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    pull = torch.zeros_like(q)
    if entropy_coef:
        entropy = -(q * log_q).sum(-1, keepdim=True)
        pull += entropy_coef * q * (log_q + entropy)
    if load_balancing_coef:
        taken = torch.zeros_like(q).scatter_(-1, drawn.long(), 1.0).mul_(kept)
        share = n * taken.sum(1, keepdim=True) / (rows * k)
        pull += load_balancing_coef * q * (share - (q * share).sum(-1, keepdim=True))
    return pull * (kept / rows) / logits.shape[0]

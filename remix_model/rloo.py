"""RLOO in plain autograd: the form that every other path must agree with."""

from __future__ import annotations

from torch import Tensor

from remix_model.credit import leave_one_out


def rloo_surrogate(losses: Tensor, log_probs: Tensor) -> Tensor:
    """A scalar whose gradient is the mean loss's for the adapters and RLOO's for the router.

        mean_m sum_b L[m, b] + sum_{m, b} (L[m, b] - mean_m L[m, b]) / (M - 1) * log Q[m, b]

    with the second term's factor held constant and its own value subtracted, so that the scalar's
    value is the mean loss. The gradient through log_probs is an unbiased estimate of the gradient
    of the expected loss when every log_probs[m, b] is that of an independent draw.

    Args:
        losses: [M, B], the loss of each input under each selection, divided by whatever normalises
            it.
        log_probs: [M, B], log Q of each selection: over all layers and routed positions of the
            input.

    Returns:
        Scalar, in the dtype of losses.

    Raises:
        ValueError: The shapes differ or are not two-dimensional, or M < 2.

    Source: ReMix (arXiv 2603.10160) section 3.2; RLOO, Kool et al. 2019 and Ahmadian et al. 2024,
        arXiv 2402.14740.
    """
    if losses.shape != log_probs.shape or losses.dim() != 2:
        raise ValueError(
            f"losses is {list(losses.shape)} and log_probs {list(log_probs.shape)}; both must be "
            "[M, B]"
        )
    if losses.shape[0] < 2:
        raise ValueError(f"M={losses.shape[0]} selections: the leave-one-out baseline needs M >= 2")
    surrogate = (leave_one_out(losses.detach()) * log_probs).sum()
    return losses.mean(0).sum() + surrogate - surrogate.detach()

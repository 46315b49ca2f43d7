"""The public functions: checks, dispatch, documentation. The work is in the strategy files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from remix_kernels import reference
from remix_kernels._checks import (
    check_base,
    check_drawn_from,
    check_frozen,
    check_logits,
    check_routed,
    check_seed,
    check_top_k_index,
)
from remix_kernels._dispatch import check_strategy, resolve_backend, resolve_strategy
from remix_kernels._log_prob import LogProb, Score
from remix_kernels._routed import Call, Routed, Strategy, no_autocast
from remix_kernels.torch_dense import DENSE
from remix_kernels.torch_gather import GATHER
from remix_kernels.torch_grouped import GROUPED
from remix_kernels.torch_sampling import log_prob, log_prob_bwd, wide
from remix_kernels.torch_sampling import sample_top_k as torch_sample_top_k
from remix_kernels.torch_unordered import unordered_log_prob, unordered_log_prob_bwd

TORCH: dict[str, Strategy] = {"dense": DENSE, "grouped": GROUPED, "gather": GATHER}
# By whether the order is forgotten.
TORCH_SCORES = {
    False: Score(log_prob, log_prob_bwd),
    True: Score(unordered_log_prob, unordered_log_prob_bwd),
}


@functools.cache
def triton_strategies() -> dict[str, Strategy]:
    """The Triton backend's, imported on first use; each backed by its PyTorch twin."""
    from remix_kernels import triton_dense, triton_gather, triton_grouped
    from remix_kernels._fallback import guarded

    kernels = {
        "dense": triton_dense.DENSE,
        "grouped": triton_grouped.GROUPED,
        "gather": triton_gather.GATHER,
    }
    return {name: guarded(strategy, TORCH[name]) for name, strategy in kernels.items()}


@functools.cache
def _triton_sample_top_k() -> Callable[..., Tensor]:
    """The Triton backend's, backed by PyTorch."""
    from remix_kernels._fallback import or_else
    from remix_kernels.triton_sampling import sample_top_k_fwd

    return or_else(sample_top_k_fwd, torch_sample_top_k)


@functools.cache
def _triton_scores() -> dict[bool, Score]:
    """The Triton backend's, each backed by its PyTorch twin."""
    from remix_kernels import triton_sampling, triton_unordered
    from remix_kernels._fallback import or_else

    ordered, unordered = triton_sampling, triton_unordered
    return {
        False: Score(
            or_else(ordered.log_prob_fwd, log_prob), or_else(ordered.log_prob_bwd, log_prob_bwd)
        ),
        True: Score(
            or_else(unordered.unordered_log_prob_fwd, unordered_log_prob),
            or_else(unordered.unordered_log_prob_bwd, unordered_log_prob_bwd),
        ),
    }


def routed_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
    *,
    base: Tensor | None = None,
    backend: str = "auto",
    strategy: str = "auto",
    check: bool = True,
) -> Tensor:
    """Sum each row's chosen low-rank adapters: y = base + sum_j w_j B_{i_j} A_{i_j} x.

    Args:
        x: [..., in], floating point. The computation runs in its dtype.
        lora_A: [n, r, in], or [1, r, in] when all experts share one A. Any floating dtype.
        lora_B: [n, out, r]. Any floating dtype and strides; a view of [n, r, out] is packed
            without a copy.
        top_k_index: Integer [..., k], the experts of each row, distinct within a row. Or [M, ...,
            k]: M selections of the same x, computed in one call.
        top_k_weights: A number, or a tensor shaped like top_k_index.
        base: Added to the result, never written to; shaped like the result, dtype of x.
        backend: "auto" (Triton on a GPU, else PyTorch), "torch", "triton" or "reference".
            REMIX_BACKEND replaces "auto".
        strategy: "auto" (by the cost model), "dense", "grouped" or "gather".
        check: False skips looking at the tensors, for a caller that vouches for them: one that
            draws the index itself, say. (On CUDA, looking for experts out of range or chosen twice
            takes a synchronisation, so that is only done under REMIX_STRICT=1.)

    Returns:
        [..., out] (or [M, ..., out]) in the dtype of x. Differentiable in x, lora_A, lora_B, base
        and tensor weights; once only.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, an expert is out of range or
            chosen twice, or the backend or strategy is unknown.
        TypeError: An argument that should be a tensor is not.

    Source: ReMix (arXiv 2603.10160) section 3.1, eq. 5, with general weights.
    """
    if check:
        shape = check_routed(x, lora_A, lora_B, top_k_index, top_k_weights)
        if base is not None:
            check_base(x, base, shape)
    name = resolve_backend(backend, x)
    if name == "reference":
        check_strategy(strategy)
        return reference.routed_lora_ref(x, lora_A, lora_B, top_k_index, top_k_weights, base=base)
    call = Call(x, None, None, base, lora_A, lora_B, top_k_index, top_k_weights)
    return _run(call, name, strategy)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
    *,
    backend: str = "auto",
    strategy: str = "auto",
    check: bool = True,
) -> Tensor:
    """A frozen linear and each row's adapters in one op: y = W x + b + sum_j w_j B_{i_j} A_{i_j} x.

    One op rather than two keeps one [T, out] output alive and adds the adapters' gradient for x
    into the linear's in place.

    Args:
        x: [..., in], floating point.
        weight: [out, in]. Frozen; should it require a gradient, it gets one through torch's own
            linear.
        bias: [out] or None, likewise.
        lora_A: As in `routed_lora`.
        lora_B: As in `routed_lora`.
        top_k_index: As in `routed_lora`.
        top_k_weights: As in `routed_lora`.
        backend: As in `routed_lora`.
        strategy: As in `routed_lora`.
        check: As in `routed_lora`.

    Returns:
        [..., out] (or [M, ..., out]) in the dtype of x.

    Raises:
        ValueError: As `routed_lora`, or weight or bias does not fit.
        TypeError: An argument that should be a tensor is not.

    Source: ReMix (arXiv 2603.10160) section 3.1, eq. 5.
    """
    if check:
        check_routed(x, lora_A, lora_B, top_k_index, top_k_weights)
        check_frozen(x, weight, bias, lora_B.shape[1])
    name = resolve_backend(backend, x)
    if name == "reference":
        check_strategy(strategy)
        return reference.routed_linear_ref(
            x, weight, bias, lora_A, lora_B, top_k_index, top_k_weights
        )
    call = Call(x, weight, bias, None, lora_A, lora_B, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        bias = None if bias is None else bias.to(x.dtype)
        with no_autocast(x.device):
            base = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        base = base.expand(*top_k_index.shape[:-1], -1)
        call = call._replace(weight=None, bias=None, base=base)
    return _run(call, name, strategy)


def sample_top_k(
    logits: Tensor,
    k: int,
    *,
    seed: int,
    offset: int = 0,
    backend: str = "auto",
    check: bool = True,
) -> Tensor:
    """Draw k distinct experts a row from softmax(logits), without replacement, in order.

    The draw is a pure function of (seed, offset + row, logits): the same on every backend (but for
    keys that agree to their last bits), thread count and split of the batch, so
    `sample_top_k(z[a:], k, seed=s, offset=a)` equals rows `a:` of the whole.

    Args:
        logits: [..., n], floating point; rows are counted over all leading dimensions. Computed in
            fp32.
        k: Experts to draw, 1 <= k <= n.
        seed: 64-bit integer. Give every module and every step its own: equal seeds are equal noise.
        offset: Counter of the first row, >= 0.
        backend: As in `routed_lora`.
        check: False skips looking at logits and k. (On CUDA, looking for nan takes a
            synchronisation, so that is only done under REMIX_STRICT=1.)

    Returns:
        int32 [..., k], first draw first. No gradient.

    Raises:
        ValueError: k or offset is out of range, or logits is not a floating-point tensor with
            experts, or holds nan or inf. (-inf rules an expert out.)
        TypeError: logits is not a tensor, or k, seed or offset not an integer.

    Source: ReMix (arXiv 2603.10160) section 3.2; Gumbel top-k, Kool et al. 2019, arXiv 1903.06059.
    """
    if check:
        check_logits(logits)
        check_drawn_from(logits, k)
        check_seed(seed, offset)
    n = logits.shape[-1]
    name = resolve_backend(backend, logits)
    if name == "reference":
        return reference.sample_top_k_ref(logits, k, seed=seed, offset=offset)
    draw = _triton_sample_top_k() if name == "triton" else torch_sample_top_k
    index = draw(logits.reshape(-1, n), k, seed, offset)
    return index.view(*logits.shape[:-1], k)


def selection_log_prob(
    logits: Tensor, top_k_index: Tensor, *, unordered: bool = False, backend: str = "auto"
) -> Tensor:
    """Log-probability that `sample_top_k` draws this selection, in this order or in any.

    Args:
        logits: [..., n], floating point.
        top_k_index: Integer [..., k] with the leading dimensions of logits, distinct within a row.
        unordered: The probability of the set, summed over all orders; 0 in every row where k = n.
        backend: As in `routed_lora`.

    Returns:
        [...] in fp32 (fp64 for fp64 logits), differentiable in logits with a closed-form gradient.
        The unordered one is rounded once or twice more; in fp64 and beyond 8 experts the
        probability is right to 1e-12.

    Raises:
        ValueError: Shapes or devices do not fit, or an expert is out of range or drawn twice.

    Source: ReMix (arXiv 2603.10160) section 3.2: sum_j [z_{i_j} - logsumexp(z over experts not
        drawn yet)]. Unordered: derived in torch_unordered.py.
    """
    check_logits(logits)
    check_top_k_index(top_k_index, logits.shape[-1], logits.device)
    if top_k_index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"top_k_index is {list(top_k_index.shape)} and logits {list(logits.shape)}: all but "
            "the last dimension must agree"
        )
    name = resolve_backend(backend, logits)
    if name == "reference":
        return reference.selection_log_prob_ref(wide(logits), top_k_index, unordered=unordered)
    n, k = logits.shape[-1], top_k_index.shape[-1]
    score = (_triton_scores() if name == "triton" else TORCH_SCORES)[unordered]
    rows = LogProb.apply(logits.reshape(-1, n), top_k_index.reshape(-1, k), score)
    return rows.view(logits.shape[:-1])


def selection_log_prob_bwd(
    logits: Tensor,
    top_k_index: Tensor,
    grad: Tensor,
    *,
    unordered: bool = False,
    backend: str = "auto",
) -> Tensor:
    """grad times the gradient of `selection_log_prob`, for a caller that has its own boundary.

    Args:
        logits: [T, n].
        top_k_index: Integer [T, k], not checked.
        grad: [T], fp32.
        unordered: As in `selection_log_prob`.
        backend: As in `routed_lora`; "reference" is PyTorch's here.

    Returns:
        [T, n] in the dtype of logits.
    """
    name = resolve_backend(backend, logits)
    score = (_triton_scores() if name == "triton" else TORCH_SCORES)[unordered]
    return score.backward(logits, top_k_index.contiguous(), grad)


def _run(call: Call, backend: str, strategy: str) -> Tensor:
    """Flatten to rows and run one strategy of one backend."""
    x, lora_B, k = call.x, call.lora_B, call.top_k_index.shape[-1]
    shape = (*call.top_k_index.shape[:-1], lora_B.shape[1])
    weights, base = call.top_k_weights, call.base
    if type(weights) is int:  # which may be larger than what torch takes for one
        call = call._replace(top_k_weights=float(weights))
        weights = call.top_k_weights
    if x.dim() != 2 or len(shape) != 2:
        call = Call(
            x.reshape(-1, x.shape[-1]),
            call.weight,
            call.bias,
            None if base is None else base.reshape(-1, lora_B.shape[1]),
            call.lora_A,
            lora_B,
            call.top_k_index.reshape(-1, k),
            weights.reshape(-1, k) if isinstance(weights, Tensor) else weights,
        )
    rows = call.top_k_index.shape[0]
    if backend == "triton" and torch.compiler.is_compiling():
        check_strategy(strategy)
        from remix_kernels import _library

        return _unsafe_view(_library.routed(call, strategy), shape)
    name = resolve_strategy(strategy, rows, call.lora_A, lora_B, k, x.dtype)
    if rows == 0:
        return _no_rows(call).view(shape)
    chosen = (triton_strategies() if backend == "triton" else TORCH)[name]
    with no_autocast(x.device):
        y = Routed.apply(chosen, *call) if torch.is_grad_enabled() else chosen.run(call)
    return _unsafe_view(y, shape)


def _unsafe_view(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y.view(shape), but no view to autograd: to change one in place copies its gradient.

    Safe because nobody else has y.
    """
    return y if y.shape == shape else torch.ops.aten._unsafe_view(y, shape)


def _no_rows(call: Call) -> Tensor:
    """The sum of nothing, still attached to every input: gradients are zeros, not None."""
    inputs = (call.x, call.lora_A, call.lora_B, call.top_k_weights, call.base)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    zero = sum(value.to(call.x.dtype).sum() * 0 for value in tensors)
    return call.x.new_zeros(0, call.lora_B.shape[1]) + zero

"""What the kernel tests share: the accuracy rule, the eager baselines, signed random problems.

The rule. fp64 is the truth. An op passes when its relative-norm error is at most twice the error
that eager PyTorch makes in the same dtype, plus 4 eps of that dtype: forward and every gradient. No
test sets a tolerance of its own; a bound on a random count is five standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from remix_kernels import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OTHER_DTYPES = [torch.float64, torch.bfloat16, torch.float16]  # than fp32
Inputs = dict[str, Any]


def param_id(value: object) -> str:
    """The id of a parameter for pytest; dtypes as fp32, bf16."""
    names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
    name = str(value).removeprefix("torch.")
    return names.get(name, name)


# The accuracy rule


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth|, or |actual| where the truth is 0."""
    scale = float(truth.double().norm())
    return float((actual.double() - truth.double()).norm()) / (scale or 1.0)


def assert_accurate(actual: Tensor, eager: Tensor, truth: Tensor, what: str = "result") -> None:
    """Fail if `actual` is further from `truth` than twice `eager`, plus 4 eps of its dtype."""
    assert actual.shape == truth.shape, f"{what}: {list(actual.shape)}, not {list(truth.shape)}"
    assert actual.device == eager.device, f"{what} is on {actual.device}, not {eager.device}"
    assert truth.dtype == torch.float64 and bool(truth.isfinite().all()), f"{what}: no usable truth"
    error, eagers = relative_error(actual, truth), relative_error(eager, truth)
    assert math.isfinite(eagers), f"{what}: eager is not finite at this input"
    allowed = 2 * eagers + 4 * torch.finfo(actual.dtype).eps
    assert error <= allowed, (
        f"{what}: relative error {error:.2e}, allowed {allowed:.2e} (eager {eagers:.2e})"
    )


def assert_all_accurate(actual: Inputs, eager: Inputs, truth: Inputs) -> None:
    """The rule for each result of `run`, by name."""
    assert actual.keys() == eager.keys() == truth.keys()
    for name in truth:
        assert_accurate(actual[name], eager[name], truth[name], name)


def run(op: Callable[..., Tensor], inputs: Inputs, trained: tuple[str, ...], dy: Tensor) -> Inputs:
    """Forward and backward: {"y": ..., "dx": ...}, a gradient for each name in `trained`.

    Tensors are passed as they are (strides kept), and none of them may be written to.
    """
    leaves = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    before = {k: v.clone() for k, v in leaves.items() if isinstance(v, Tensor)}
    for name in trained:
        leaves[name].requires_grad_()
    y = op(**leaves)
    grads = torch.autograd.grad(y, [leaves[name] for name in trained], dy.to(y.dtype))
    for name, value in before.items():
        assert torch.equal(leaves[name].detach(), value), f"the op wrote to {name}"
    for name, grad in zip(trained, grads, strict=True):
        assert grad.dtype == leaves[name].dtype, f"d{name} is {grad.dtype}"
    return {"y": y.detach(), **{f"d{k}": v for k, v in zip(trained, grads, strict=True)}}


def in_fp64(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""
    floating = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


# The eager baselines: one plain formula in the dtype of the input, differentiated by autograd


def routed_lora_eager(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
    *,
    base: Tensor | None = None,
) -> Tensor:
    """`routed_lora` as one einsum with the selection as a mask [..., n]."""
    n, index = lora_B.shape[0], top_k_index.long()
    if not isinstance(top_k_weights, Tensor):
        top_k_weights = torch.full_like(index, top_k_weights, dtype=x.dtype)
    mask = x.new_zeros(*index.shape[:-1], n).scatter(-1, index, top_k_weights.to(x.dtype))
    a, b = lora_A.to(x.dtype).expand(n, -1, -1), lora_B.to(x.dtype)
    y = torch.einsum("...i,nri,...n,nor->...o", x, a, mask, b)
    return y if base is None else base + y


def routed_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None, **adapters: Any) -> Tensor:
    """`routed_linear` as torch's linear plus `routed_lora_eager`."""
    base = torch.nn.functional.linear(x, weight, bias)
    return routed_lora_eager(x, **adapters, base=base)


def selection_log_prob_eager(logits: Tensor, top_k_index: Tensor) -> Tensor:
    """Plackett-Luce step by step: logsumexp over what is left, in fp32 at least."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    total = z.new_zeros(z.shape[:-1])
    for j in range(top_k_index.shape[-1]):
        step = top_k_index[..., j : j + 1].long()
        total = total + z.gather(-1, step).squeeze(-1) - z.logsumexp(-1)
        z = z.scatter(-1, step, float("-inf"))
    return total


def unordered_log_prob_eager(logits: Tensor, top_k_index: Tensor) -> Tensor:
    """logsumexp of the ordered log-probabilities over all k! orders."""
    orders = permutations(range(top_k_index.shape[-1]))
    totals = [selection_log_prob_eager(logits, top_k_index[..., list(order)]) for order in orders]
    return torch.stack(totals).logsumexp(0)


# Signed random problems


@dataclass(frozen=True)
class Case:
    """One routed problem. Its id reads like its shape: T100-in72-out56-n8-k2-r4-sharedA.

    Options, any of:
        idle, one        experts 0 and n-1 have no rows; every row is on expert n-1 first
        number           the weights are a number
        sharedA          lora_A [1, r, in]
        xT, BT           x is a transposed view; lora_B is a view of [n, r, out]
        M3, M1           the index holds that many selections of the same x
        batch            leading dimensions [4, T / 4]
        row              no leading dimension (T = 1)
        base, expanded   added to a base; to a base expanded from [out]
        linear, nobias   routed_linear on a frozen weight and bias; without bias
        trained          the weight and bias of routed_linear are trained too
        int32, uint8     dtype of the index
    """

    T: int = 100
    in_features: int = 72
    out_features: int = 56
    n: int = 8
    k: int = 2
    r: int = 4
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        short = {"in_features": "in", "out_features": "out"}
        names = [field.name for field in fields(self) if field.name != "options"]
        sizes = [f"{short.get(name, name)}{getattr(self, name)}" for name in names]
        return "-".join((*sizes, *self.options))

    @property
    def is_linear(self) -> bool:
        """Whether this is a problem for `routed_linear`."""
        return "linear" in self.options

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the inputs that get a gradient."""
        names = ["x", "lora_A", "lora_B"]
        names += [] if "number" in self.options else ["top_k_weights"]
        names += ["base"] if {"base", "expanded"} & set(self.options) else []
        if "trained" in self.options:
            names += ["weight"] if "nobias" in self.options else ["weight", "bias"]
        return tuple(names)


def routing(T: int, n: int, k: int, options: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """A random index [T, k], its rows free of duplicates."""
    keys = torch.rand(T, n, generator=generator)
    if "idle" in options:
        keys[:, [0, n - 1]] = 2.0
    if "one" in options:
        keys[:, n - 1] = -1.0
    return keys.argsort(1)[:, :k]


def make_inputs(
    case: Case, dtype: torch.dtype, device: str, adapter_dtype: torch.dtype | None = None
) -> tuple[Inputs, Tensor]:
    """The arguments of the op, and a gradient dy for its result."""
    generator = torch.Generator().manual_seed(0)
    options, n, r, width = case.options, case.n, case.r, case.in_features
    other = adapter_dtype or dtype

    def signed(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(scale).to(device, dtype)

    lead = (4, case.T // 4) if "batch" in options else () if "row" in options else (case.T,)
    x = signed(*lead[:-1], width, *lead[-1:]).mT if "xT" in options else signed(*lead, width)
    shape_a = (1 if "sharedA" in options else n, r, width)
    scale_b, out = r**-0.5, case.out_features
    if "BT" in options:
        lora_b = signed(n, r, out, dtype=other, scale=scale_b).mT
    else:
        lora_b = signed(n, out, r, dtype=other, scale=scale_b)
    selections = [int(option[1:]) for option in options if option in ("M1", "M3")]
    lead = (*selections, *lead)
    index = routing(math.prod(lead), n, case.k, options, generator).view(*lead, case.k).to(device)
    inputs: Inputs = {
        "x": x,
        "lora_A": signed(*shape_a, dtype=other, scale=width**-0.5),
        "lora_B": lora_b,
        "top_k_index": index.to(getattr(torch, next((o for o in options if "int" in o), "int64"))),
        "top_k_weights": 0.5 if "number" in options else signed(*lead, case.k, dtype=other),
    }
    if case.is_linear:
        inputs["weight"] = signed(out, width, scale=width**-0.5)
        inputs["bias"] = None if "nobias" in options else signed(out)
    if "base" in options:
        inputs["base"] = signed(*lead, out)
    if "expanded" in options:
        inputs["base"] = signed(out).expand(*lead, out)
    return inputs, signed(*lead, out)


@lru_cache(maxsize=4)  # the strategies of one problem share its truth
def solve(
    case: Case, dtype: torch.dtype, device: str, adapter_dtype: torch.dtype | None = None
) -> tuple[Inputs, Tensor, Inputs, Inputs]:
    """A problem, dy, what eager PyTorch makes of it, and the reference's truth in fp64."""
    inputs, dy = make_inputs(case, dtype, device, adapter_dtype)
    eager = routed_linear_eager if case.is_linear else routed_lora_eager
    truth = reference.routed_linear_ref if case.is_linear else reference.routed_lora_ref
    return (
        inputs,
        dy,
        run(eager, inputs, case.trained, dy),
        run(truth, in_fp64(inputs), case.trained, dy.double()),
    )

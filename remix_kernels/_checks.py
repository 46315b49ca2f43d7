"""What the public functions refuse, with the value got and what would be right."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

_MAX_OFFSET = 2**63 - 2**48  # rows are counted in int64
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PAIRWISE_UP_TO = 8  # k: comparing all pairs is one pass, and k times the index; sorting is slower


def check_routed(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | float,
) -> torch.Size:
    """Check the arguments of a routed op and return the shape of its result."""
    for name, tensor in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        _check_numbers(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
    if x.dim() < 1 or lora_A.dim() != 3 or lora_B.dim() != 3:
        raise ValueError(
            f"x {list(x.shape)}, lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)} must be "
            "[..., in], [n, r, in] and [n, out, r]"
        )
    n, out, r = lora_B.shape
    if lora_A.shape[0] not in (1, n) or lora_A.shape[1:] != (r, x.shape[-1]) or r < 1:
        raise ValueError(
            f"lora_A is {list(lora_A.shape)}; with x {list(x.shape)} and lora_B "
            f"{list(lora_B.shape)} it must be [{n}, {r}, {x.shape[-1]}] (or [1, ...] when shared) "
            "with r >= 1"
        )
    check_top_k_index(top_k_index, n, x.device)
    lead, k = top_k_index.shape[:-1], top_k_index.shape[-1]
    if lead != x.shape[:-1] and lead[:1] == (0,):
        raise ValueError(f"top_k_index is {list(top_k_index.shape)}: no selection; M >= 1")
    if lead != x.shape[:-1] and lead[1:] != x.shape[:-1]:
        raise ValueError(
            f"top_k_index is {list(top_k_index.shape)}; with x {list(x.shape)} it must be "
            f"{[*x.shape[:-1], k]}, or {['M', *x.shape[:-1], k]} for M selections of the same x"
        )
    if isinstance(top_k_weights, Tensor):
        _check_numbers("top_k_weights", top_k_weights)
        if top_k_weights.shape != top_k_index.shape:
            raise ValueError(
                f"top_k_weights is {list(top_k_weights.shape)}; it must be a number or shaped like "
                f"top_k_index, {list(top_k_index.shape)}"
            )
        if top_k_weights.device != x.device:
            raise ValueError(f"top_k_weights is on {top_k_weights.device} and x on {x.device}")
    elif not isinstance(top_k_weights, (int, float)):
        raise TypeError(
            f"top_k_weights must be a tensor or a number, got {type(top_k_weights).__name__}"
        )
    elif isinstance(top_k_weights, int) and abs(top_k_weights) > sys.float_info.max:
        raise ValueError("top_k_weights is an integer beyond the largest float")
    return torch.Size((*lead, out))


def check_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> None:
    """Raise unless weight is [out, in] and bias [out], floating point, where x is."""
    _check_tensor("weight", weight, x, (out, x.shape[-1]))
    if bias is not None:
        _check_tensor("bias", bias, x, (out,))


def check_base(x: Tensor, base: Tensor, shape: torch.Size) -> None:
    """Raise unless base is shaped like the result, in the dtype of x, where x is."""
    _check_tensor("base", base, x, shape)
    if base.dtype != x.dtype:
        raise ValueError(f"base is {base.dtype}; it must be {x.dtype} like x")


def _check_tensor(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
    _check_numbers(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} is {_describe(tensor)}; it must be {list(shape)}")


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is dense, of a dtype that the ops compute in."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} is {tensor.dtype} ({tensor.layout}); it must be a dense floating point tensor "
            "of fp64, fp32, fp16 or bf16"
        )


def check_top_k_index(index: Tensor, n: int, device: torch.device) -> None:
    """Check the type, k <= n, and (where it costs no device sync) range and distinctness."""
    if not isinstance(index, Tensor):
        raise TypeError(f"top_k_index must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise ValueError(f"top_k_index is {index.dtype}; it must be an integer tensor")
    if index.layout != torch.strided:
        raise ValueError(f"top_k_index is {index.layout}; it must be a dense tensor")
    if index.device != device:
        raise ValueError(f"top_k_index is on {index.device}, the other inputs on {device}")
    if index.dim() < 1 or not 1 <= index.shape[-1] <= n:
        raise ValueError(
            f"top_k_index is {list(index.shape)}: its last dimension k must be 1 <= k <= n = {n}"
        )
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    if not _may_look_at(index):
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= n:
        raise ValueError(
            f"top_k_index holds {low if low < 0 else high}; experts are numbered 0 to {n - 1}"
        )
    same = _repeated(index)
    if same is not None:
        row = int(same.nonzero()[0])
        raise ValueError(
            f"top_k_index chooses an expert twice in row {row}: "
            f"{index.reshape(-1, index.shape[-1])[row].tolist()}; the k experts of a row must be "
            "distinct"
        )


def _repeated(index: Tensor) -> Tensor | None:
    """Which rows name an expert twice, [rows] bool; None when none does."""
    rows = index.reshape(-1, index.shape[-1])
    if rows.shape[1] <= _PAIRWISE_UP_TO:
        pairs = rows.unsqueeze(2) == rows.unsqueeze(1)
        if int(pairs.count_nonzero()) == rows.numel():  # nothing equal off the diagonal
            return None
        return (pairs.sum(2) > 1).any(1)
    ordered = rows.sort(1).values
    same = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    return same if bool(same.any()) else None


def check_logits(logits: Tensor) -> None:
    """Raise unless logits is floating point [..., n]."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES or logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits is {_describe(logits)}; it must be floating point [..., n], n >= 1"
        )
    _check_numbers("logits", logits)


def check_drawn_from(logits: Tensor, k: int) -> None:
    """Raise unless k experts can be drawn: no nan and no inf, where looking costs no sync.

    Args:
        logits: [..., n].
        k: Experts to draw.
    """
    n = logits.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an integer, got {type(k).__name__} {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is out of range: choose 1 <= k <= n = {n}, the experts in logits")
    if torch.compiler.is_compiling() or logits.numel() == 0 or not _may_look_at(logits):
        return
    right = logits < float("inf")
    if not bool(right.all()):
        row = int((~right).reshape(-1, n).any(1).nonzero()[0])
        raise ValueError(
            f"logits in row {row} are {logits.reshape(-1, n)[row].tolist()}, which are not all "
            "numbers: nothing can be drawn from them"
        )


def _may_look_at(tensor: Tensor) -> bool:
    """Whether reading it waits for nothing, or REMIX_STRICT=1 wants it read all the same."""
    if tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or os.environ.get("REMIX_STRICT") == "1"


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_seed(seed: int, offset: int) -> None:
    """Raise unless seed and offset are integers and offset is a counter."""
    for name, value in (("seed", seed), ("offset", offset)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if not 0 <= offset < _MAX_OFFSET:
        wrong = "negative" if offset < 0 else "too large"
        raise ValueError(
            f"offset={offset} is {wrong}; the first row's counter must be in [0, {_MAX_OFFSET})"
        )

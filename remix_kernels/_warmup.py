"""`warmup`: compile the kernels of a model, and tune them where that is asked for, beforehand."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remix_kernels._dispatch import resolve_backend
from remix_kernels.ops import routed_linear, routed_lora, sample_top_k, selection_log_prob_bwd


class RoutedShape(NamedTuple):
    """One routed linear: what its kernels are compiled for."""

    in_features: int
    out_features: int
    num_experts: int
    top_k: int
    r: int
    dtype: torch.dtype = torch.bfloat16  # of x and the frozen weight
    adapter_dtype: torch.dtype = torch.float32  # of lora_A and lora_B
    backend: str = "auto"
    strategy: str = "auto"
    device: torch.device | None = None  # None: a GPU where there is one
    unordered: bool = False  # whether the router trains on the probability of the set
    weighted: bool = False  # the chosen experts have learned weights, and nothing is drawn
    selections: int = 1  # of each row, top_k experts each
    alone: bool = False  # the frozen linear runs by itself: it is quantised, or dropout comes first


def warmup(
    model_or_shapes: nn.Module | Iterable[RoutedShape],
    *,
    rows: int | Sequence[int] = (1, 4096),
    dtype: torch.dtype | None = None,
    unordered: bool = False,
    verbose: bool = True,
) -> list[tuple[RoutedShape, int]]:
    """Run every routed linear of a model on random data: a forward pass, and a training step.

    So the first step of a training does not wait for the compiler, and under REMIX_AUTOTUNE=1 not
    for a search. The model itself is not run, nor changed, nor torch's random numbers.

    Args:
        model_or_shapes: A model with routed layers (a PEFT model with a ReMix adapter, or one that
            holds `RoutedLoRALinear`), or the shapes themselves.
        rows: Rows of x to run: sequences times tokens, times M while sampling; 1 is decoding. Give
            those that will come: which strategy "auto" takes depends on them, so do the grouped
            tiles, and what is tuned is tuned for the next power of two.
        dtype: Of x and the frozen weight; None takes the shapes', a model's own weights'. Give
            autocast's dtype for training under autocast.
        unordered: Whether routers will train on the probability of the set, log_prob="unordered".
        verbose: One line a shape on stderr.

    Returns:
        What was run: pairs of shape and rows, none twice. Shapes whose backend comes out as
        PyTorch have nothing to compile and are left out.

    Raises:
        ValueError: A model without routed layers, a row count below 1, or an unknown backend.
    """
    counts = (rows,) if isinstance(rows, int) else tuple(rows)
    if any(count < 1 for count in counts):
        raise ValueError(f"rows={rows} must all be at least 1")
    if isinstance(model_or_shapes, nn.Module):
        shapes = shapes_of(model_or_shapes)
        if not shapes:
            raise ValueError(
                f"{type(model_or_shapes).__name__} has no routed layers: give warmup a model with "
                "a ReMix adapter, or shapes"
            )
    else:
        shapes = list(model_or_shapes)
    if dtype is not None:
        shapes = [shape._replace(dtype=dtype) for shape in shapes]
    if unordered:
        shapes = [shape._replace(unordered=True) for shape in shapes]
    done: list[tuple[RoutedShape, int]] = []
    for shape in dict.fromkeys(shapes):
        device = shape.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if (
            resolve_backend(shape.backend, torch.empty(0, dtype=shape.dtype, device=device))
            != "triton"
        ):
            continue
        started = time.perf_counter()
        for count in dict.fromkeys(counts):
            _run(shape, count, device)
            done.append((shape, count))
        if verbose:
            seconds = time.perf_counter() - started
            print(f"remix: {_describe(shape)}: ready in {seconds:.1f} s", file=sys.stderr)
    return done


def shapes_of(model: nn.Module) -> list[RoutedShape]:
    """The shapes of a model's routed layers: of every module that says `routed_shapes()`."""
    shapes: list[RoutedShape] = []
    for module in model.modules():
        routed_shapes: Any = getattr(module, "routed_shapes", None)
        if routed_shapes is not None:
            shapes.extend(routed_shapes())
    return shapes


def _run(shape: RoutedShape, rows: int, device: torch.device) -> None:
    """The top k without gradients; with them the top k, drawn experts, and a router's gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=generator)

    n, r = shape.num_experts, shape.r
    x = random(rows, shape.in_features, dtype=shape.dtype).requires_grad_()
    weight = random(shape.out_features, shape.in_features, dtype=shape.dtype)
    lora_A = random(n, r, shape.in_features, dtype=shape.adapter_dtype).requires_grad_()
    lora_B = random(n, r, shape.out_features, dtype=shape.adapter_dtype)
    lora_B = lora_B.transpose(1, 2).requires_grad_()  # laid out as the layers have it
    logits = random(rows, n, dtype=torch.float32)

    how: dict[str, Any] = {"backend": shape.backend, "strategy": shape.strategy, "check": False}

    def op(index: Tensor) -> Tensor:
        weights: Tensor | float = 0.5
        if shape.selections > 1:
            index = index.expand(shape.selections, -1, -1)
        if shape.weighted:
            weights = random(*index.shape, dtype=torch.float32).requires_grad_()
        if not shape.alone:
            return routed_linear(x, weight, None, lora_A, lora_B, index, weights, **how)
        base = None
        if shape.selections == 1:
            base = random(*index.shape[:-1], shape.out_features, dtype=shape.dtype)
        return routed_lora(x, lora_A, lora_B, index, weights, base=base, **how)

    top_k = logits.topk(shape.top_k).indices  # int64, as a layer's own
    with torch.no_grad():
        op(top_k)
    chosen = [top_k]
    if not shape.weighted:
        drawn = sample_top_k(logits, shape.top_k, seed=0, backend=shape.backend)
        ones = logits.new_ones(rows)
        selection_log_prob_bwd(
            logits, drawn, ones, unordered=shape.unordered, backend=shape.backend
        )
        chosen.append(drawn)
    with torch.enable_grad():
        for index in chosen:
            y = op(index)
            torch.autograd.backward(y, torch.ones_like(y))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(shape: RoutedShape) -> str:
    sizes = f"{shape.in_features} -> {shape.out_features}, n={shape.num_experts}"
    dtypes = f"{shape.dtype} with {shape.adapter_dtype} adapters".replace("torch.", "")
    kinds = {
        "learned weights": shape.weighted,
        f"{shape.selections} selections": shape.selections > 1,
        "apart from the linear": shape.alone,
    }
    what = "".join(f", {kind}" for kind, holds in kinds.items() if holds)
    return f"{sizes}, k={shape.top_k}, r={shape.r}, {dtypes}{what}"

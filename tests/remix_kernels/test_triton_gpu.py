"""What only a GPU can show of the Triton backend: full sizes, graphs, no host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remix_kernels import (
    routed_linear,
    routed_lora,
    sample_top_k,
    selection_log_prob,
    warmup,
)
from remix_model import RoutedLoRALinear
from tests.helpers import assert_accurate, assert_all_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_triton")]
STRATEGIES = ["dense", "grouped", "gather"]
SHAPES = {  # rows, in, out, n, k, r
    "smollm2-up": (1024, 576, 1536, 8, 4, 8),
    "llama3-8b-up": (16384, 4096, 14336, 8, 4, 8),
    "llama3-8b-down-many": (4096, 14336, 4096, 64, 2, 64),
    "small-pool": (4096, 4096, 14336, 4, 2, 8),  # dH and dB in one pass
    "odd": (1000, 575, 1537, 5, 3, 3),
}


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Arguments of routed_linear with learned weights, and dy; signed and of order one."""
    T, d, o, n, k, r = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def signed(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda").mul_(scale).to(dtype)

    index = torch.rand(T, n, generator=generator, device="cuda").argsort(1)[:, :k]
    inputs = {
        "x": signed(T, d),
        "weight": signed(o, d, scale=d**-0.5),
        "bias": None,
        "lora_A": signed(n, r, d, scale=d**-0.5),
        "lora_B": signed(n, r, o).transpose(1, 2),
        "top_k_index": index,
        "top_k_weights": signed(T, k),
    }
    return inputs, signed(T, o)


def passes(inputs: dict[str, Any], dy: Tensor, **choice: str) -> dict[str, Tensor]:
    """y and every gradient."""
    trained = ("x", "lora_A", "lora_B", "top_k_weights")
    leaves = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name in trained:
        leaves[name].requires_grad_()
    y = routed_linear(**leaves, **choice)
    grads = torch.autograd.grad(y, [leaves[name] for name in trained], dy)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(trained, grads, strict=True)}}


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    floating = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_full_size(name: str, dtype: torch.dtype, strategy: str) -> None:
    shape = SHAPES[name]
    if strategy == "gather":
        shape = (32, *shape[1:])
    inputs, dy = problem(shape, dtype)
    eager = passes(inputs, dy, backend="torch", strategy="dense")
    truth = passes(widened(inputs), dy.double(), backend="torch", strategy="dense")
    assert_all_accurate(passes(inputs, dy, backend="triton", strategy=strategy), eager, truth)


def test_the_k_extended_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMIX_GEMM", "triton")
    inputs, dy = problem(SHAPES["llama3-8b-up"], torch.bfloat16)
    eager = passes(inputs, dy, backend="torch", strategy="dense")
    truth = passes(widened(inputs), dy.double(), backend="torch", strategy="dense")
    actual = passes(inputs, dy, backend="triton", strategy="dense")
    assert_all_accurate(actual, eager, truth)
    rows = ("x", "top_k_index", "top_k_weights")
    few = {k: v[5:9] if k in rows else v for k, v in inputs.items()}
    alone = routed_linear(**few, backend="triton", strategy="dense")
    assert torch.equal(alone, actual["y"][5:9])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_bits_every_time(strategy: str) -> None:
    inputs, dy = problem((2048, 1024, 1536, 16, 4, 8), torch.bfloat16)
    first = passes(inputs, dy, backend="triton", strategy=strategy)
    for _ in range(3):
        again = passes(inputs, dy, backend="triton", strategy=strategy)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_host_synchronisation(strategy: str) -> None:
    inputs, dy = problem((256, 256, 512, 16, 4, 8), torch.bfloat16)
    passes(inputs, dy, backend="triton", strategy=strategy)  # compiled
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes(inputs, dy, backend="triton", strategy=strategy)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_captures_it(strategy: str) -> None:
    """Replayed on other data and another routing."""
    inputs, _ = problem((64, 256, 512, 16, 4, 8), torch.bfloat16)
    other, _ = problem((64, 256, 512, 16, 4, 8), torch.bfloat16)
    other["x"] = other["x"].flip(0)
    other["top_k_index"] = other["top_k_index"].flip(0)

    def run(arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return routed_linear(**arguments, backend="triton", strategy=strategy, check=False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(inputs)
    for name in ("x", "top_k_index"):
        inputs[name].copy_(other[name])
    graph.replay()
    assert torch.equal(y, run(other))


@pytest.mark.parametrize("strategy", ["dense", "grouped"])
def test_more_than_two_to_the_31_elements(strategy: str) -> None:
    T, o = 160_000, 14336  # y has 2.3e9
    inputs, _ = problem((T, 64, o, 4, 2, 4), torch.bfloat16)
    with torch.no_grad():
        y = routed_linear(**inputs, backend="triton", strategy=strategy, check=False)
        for rows in (slice(0, 8), slice(T - 8, T)):
            few = {
                k: v[rows] if k in ("x", "top_k_index", "top_k_weights") else v
                for k, v in inputs.items()
            }
            eager = routed_linear(**few, backend="torch", strategy="dense", check=False)
            truth = routed_linear(**widened(few), backend="torch", strategy="dense", check=False)
            assert_accurate(y[rows], eager, truth)


def test_sampling_draws_what_the_processor_draws() -> None:
    logits = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)) * 3
    here = sample_top_k(logits, 8, seed=7, offset=2**33, backend="torch")
    there = sample_top_k(logits.cuda(), 8, seed=7, offset=2**33, backend="triton").cpu()
    assert int((here != there).any(1).sum()) <= 2  # keys that agree to their last bits


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("k", [2, 8, 20])
def test_log_prob_and_its_gradient(k: int, unordered: bool) -> None:
    logits = torch.randn(5000, 64, device="cuda", requires_grad=True)
    index = sample_top_k(logits, k, seed=1)
    results = []
    for z, backend in ((logits, "triton"), (logits, "torch"), (logits.double(), "torch")):
        z = z.detach().requires_grad_()
        value = selection_log_prob(z, index, unordered=unordered, backend=backend)
        (grad,) = torch.autograd.grad(value.sum(), z)
        results.append({"log_prob": value.detach(), "dlogits": grad})
    assert_all_accurate(*results)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_one_graph(dynamic: bool) -> None:
    inputs, dy = problem((256, 256, 512, 16, 4, 8), torch.bfloat16)

    def call(**kwargs: Any) -> Tensor:
        return routed_linear(**kwargs, backend="triton", check=False)

    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, dynamic=dynamic)
    inputs["x"].requires_grad_()
    y = compiled(**inputs)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy)
    expected = passes(inputs, dy, backend="triton")
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(dx, expected["dx"])


def test_lora_beside_any_base_is_the_same() -> None:
    inputs, _ = problem((512, 256, 384, 8, 2, 8), torch.bfloat16)
    weight, bias = inputs.pop("weight"), inputs.pop("bias")
    base = torch.nn.functional.linear(inputs["x"], weight, bias)
    for strategy in STRATEGIES:
        beside = routed_lora(**inputs, base=base, backend="triton", strategy=strategy)
        fused = routed_linear(
            weight=weight, bias=bias, **inputs, backend="triton", strategy=strategy
        )
        assert torch.equal(beside, fused)


def test_autotuned_kernels_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real search: its copies, its clock, its file; and a graph captured with what it found."""
    monkeypatch.setenv("REMIX_AUTOTUNE", "1")
    monkeypatch.setenv("REMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("remix_kernels._autotune._decided", {})
    inputs, dy = problem(SHAPES["smollm2-up"], torch.bfloat16)
    eager = passes(inputs, dy, backend="torch", strategy="dense")
    truth = passes(widened(inputs), dy.double(), backend="torch", strategy="dense")
    for strategy in ("dense", "grouped"):
        actual = passes(inputs, dy, backend="triton", strategy=strategy)
        assert_all_accurate(actual, eager, truth)
        assert list(tmp_path.rglob("*.json"))
        want = routed_linear(**inputs, backend="triton", strategy=strategy)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = routed_linear(**inputs, backend="triton", strategy=strategy, check=False)
        graph.replay()
        assert torch.equal(y, want)


def test_warmup_leaves_nothing_to_compile() -> None:
    layer = RoutedLoRALinear(nn.Linear(576, 1536), num_experts=8, top_k=4, r=8).to("cuda")
    assert warmup(layer, rows=(256, 1), verbose=False)
    x = torch.randn(256, 576, device="cuda")
    with no_compilation(), torch.no_grad():
        layer.eval()(x)
        layer(x[:1])


@contextmanager
def no_compilation() -> Iterator[None]:
    """Fail when Triton compiles anything inside."""
    import triton

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a kernel was compiled")

    previous = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = refuse
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = previous

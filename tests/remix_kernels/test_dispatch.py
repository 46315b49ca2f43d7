"""What runs when nobody chose, that a choice is honoured, and that importing costs nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import remix_kernels
from remix_kernels import routed_linear, routed_lora
from remix_kernels._dispatch import resolve_backend, resolve_strategy
from remix_kernels.ops import TORCH
from tests.helpers import (
    Case,
    assert_accurate,
    assert_all_accurate,
    in_fp64,
    make_inputs,
    run,
    solve,
)

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = list(TORCH)


def chosen(T: int, in_features: int, out_features: int, n: int, k: int, r: int) -> str:
    lora_A = torch.empty(n, r, in_features, device="meta")
    lora_B = torch.empty(n, out_features, r, device="meta")
    return resolve_strategy("auto", T, lora_A, lora_B, k, torch.float32)


@pytest.mark.parametrize(
    "shape,right",
    [
        ((1024, 576, 1536, 8, 4, 8), {"dense"}),  # one training batch of a small model
        ((512, 576, 1536, 64, 2, 64), {"grouped"}),  # n r far above 400 k
        ((16384, 4096, 4096, 64, 2, 64), {"grouped"}),
        ((512, 2048, 8192, 32, 2, 16), {"dense", "grouped"}),  # far from decoding
        ((1, 576, 1536, 8, 4, 8), {"gather"}),  # decoding
        ((1, 576, 1536, 64, 2, 8), {"gather"}),
    ],
    ids=lambda v: "T{}-in{}-out{}-n{}-k{}-r{}".format(*v) if isinstance(v, tuple) else None,
)
def test_cost_model(shape: tuple[int, ...], right: set[str]) -> None:
    assert chosen(*shape) in right


@pytest.mark.parametrize("n,r", [(8, 8), (32, 16), (64, 64)], ids=lambda v: str(v))
def test_gather_is_for_few_rows_only(n: int, r: int) -> None:
    assert "gather" not in {chosen(T, 2048, 2048, n, 2, r) for T in (256, 1024, 4096, 16384)}


def ran(y: Tensor) -> str:
    """The strategy whose backward pass y will run."""
    assert y.grad_fn is not None
    nodes, found = [y.grad_fn], []
    while nodes:
        node = nodes.pop()
        found += [name for name, s in TORCH.items() if getattr(node, "strategy", None) is s]
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    (name,) = found
    return name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [(), ("linear",), ("linear", "trained")], ids="-".join)
def test_an_explicit_strategy_is_honoured(options: tuple[str, ...], strategy: str) -> None:
    case = Case(T=6, options=options)
    inputs, _ = make_inputs(case, torch.float32, "cpu")
    for name in case.trained:
        inputs[name].requires_grad_()
    op: Callable[..., Tensor] = routed_linear if case.is_linear else routed_lora
    assert ran(op(**inputs, strategy=strategy)) == strategy


def test_auto_is_what_the_cost_model_says() -> None:
    for case in (Case(T=2048, n=8, k=4), Case(T=256, n=64, r=64)):
        inputs, _ = make_inputs(case, torch.float32, "cpu")
        inputs["x"].requires_grad_()
        expected = resolve_strategy(
            "auto", case.T, inputs["lora_A"], inputs["lora_B"], case.k, torch.float32
        )
        assert ran(routed_lora(**inputs)) == expected


def test_the_environment_replaces_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert resolve_backend("auto", x) == "torch"
    monkeypatch.setenv("REMIX_BACKEND", "reference")
    assert resolve_backend("auto", x) == "reference"
    assert resolve_backend("torch", x) == "torch"
    monkeypatch.setenv("REMIX_BACKEND", "auto")
    assert resolve_backend("auto", x) == "torch"


def test_the_environment_reaches_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_inputs(Case(T=3), torch.float32, "cpu")
    inputs["x"].requires_grad_()
    monkeypatch.setenv("REMIX_BACKEND", "reference")
    with pytest.raises(ValueError, match="not enough values"):
        ran(routed_lora(**inputs))  # no strategy of the torch backend ran


def test_public_names() -> None:
    assert set(remix_kernels.BACKENDS) == {"auto", "torch", "triton", "reference"}
    assert set(remix_kernels.STRATEGIES) == {"auto", *STRATEGIES}
    for op in ("routed_lora", "routed_linear", "sample_top_k", "selection_log_prob"):
        assert callable(getattr(remix_kernels, op))
        assert callable(getattr(remix_kernels.reference, f"{op}_ref"))


def test_import_is_light_and_touches_no_device() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import remix_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "transformers", "peft", "numpy"}, new
assert not {"triton", "transformers", "peft"} & set(sys.modules)
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "options", [("linear",), ("sharedA", "M3"), ("base", "number")], ids="-".join
)
def test_dense_compiles_without_a_graph_break(options: tuple[str, ...]) -> None:
    case = Case(options=options)
    inputs, dy, eager, truth = solve(case, torch.float32, "cpu")
    op: Callable[..., Tensor] = routed_linear if case.is_linear else routed_lora
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    actual = run(lambda **kw: compiled(**kw, strategy="dense"), inputs, case.trained, dy)
    assert_all_accurate(actual, eager, truth)


@pytest.mark.parametrize(
    "shape,right",
    [
        ((16384, 4096, 14336, 8, 2, 16), "dense"),
        ((1, 4096, 14336, 8, 4, 8), "dense"),
        ((16384, 4096, 4096, 64, 2, 64), "grouped"),
    ],
    ids=str,
)
def test_an_accelerator_is_not_judged_by_a_processors_constants(
    shape: tuple[int, ...], right: str
) -> None:
    T, in_features, out_features, n, k, r = shape
    cuda = torch.device("cuda")
    lora_A = SimpleNamespace(shape=(n, r, in_features), device=cuda)
    lora_B = SimpleNamespace(shape=(n, out_features, r), device=cuda)
    assert resolve_strategy("auto", T, lora_A, lora_B, k, torch.float32) == right  # type: ignore[arg-type]


def test_auto_compiles_with_dynamic_shapes() -> None:
    case = Case(T=12, n=64, r=64)  # which would be grouped
    inputs, _ = make_inputs(case, torch.float32, "cpu")
    compiled = torch.compile(routed_lora, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**inputs), routed_lora(**inputs))


@pytest.mark.parametrize("options", [(), ("linear",), ("linear", "M3")], ids="-".join)
def test_the_reference_takes_what_the_others_take(options: tuple[str, ...]) -> None:
    """A frozen weight of another dtype, and no rows at all."""
    inputs, _ = make_inputs(Case(T=4, options=options), torch.bfloat16, "cpu")
    op: Callable[..., Tensor] = routed_linear if "linear" in options else routed_lora
    if "linear" in options:
        inputs["weight"] = inputs["weight"].float()
    truth = op(**in_fp64(inputs))
    assert_accurate(op(**inputs, backend="reference"), op(**inputs), truth)
    none = {
        k: v[..., :0, :] if k in ("x", "top_k_index", "top_k_weights") else v
        for k, v in inputs.items()
    }
    none["x"].requires_grad_()
    op(**none, backend="reference").sum().backward()
    assert none["x"].grad.shape == none["x"].shape

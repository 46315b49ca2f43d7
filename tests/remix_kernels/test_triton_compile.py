"""The Triton backend under torch.compile: one graph, the same numbers, library ops that conform."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remix_kernels import routed_linear, routed_lora
from tests.helpers import Case, assert_all_accurate, make_inputs, run, solve

pytestmark = pytest.mark.usefixtures("strict_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("strategy", ["auto", "grouped", "gather"])
@pytest.mark.parametrize("options", [("number",), ("linear",), ("M3", "base")], ids="-".join)
def test_one_graph(options: tuple[str, ...], strategy: str) -> None:
    case = Case(T=4, in_features=24, out_features=20, options=options)
    inputs, dy, eager, truth = solve(case, torch.float32, DEVICE)
    op = routed_linear if case.is_linear else routed_lora

    def call(**kwargs: Any) -> torch.Tensor:
        return op(**kwargs, strategy=strategy, backend="triton", check=False)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_all_accurate(run(compiled, inputs, case.trained, dy), eager, truth)


@pytest.mark.parametrize("options", [("number",), ("linear", "BT")], ids="-".join)
def test_the_library_op_conforms(options: tuple[str, ...]) -> None:
    from remix_kernels import _library

    case = Case(T=4, in_features=24, out_features=20, options=options)
    inputs, _ = make_inputs(case, torch.float32, DEVICE)
    for name in case.trained:
        inputs[name].requires_grad_()
    weights = inputs["top_k_weights"]
    tensor = weights if isinstance(weights, torch.Tensor) else None
    arguments = (
        "dense",
        inputs["x"],
        inputs.get("weight"),
        inputs.get("bias"),
        None,
        inputs["lora_A"],
        inputs["lora_B"],
        inputs["top_k_index"],
        tensor,
        0.0 if tensor is not None else weights,
    )
    torch.library.opcheck(_library.routed_fwd, arguments)

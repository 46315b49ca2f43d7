"""What one adapted linear is held to: each way to compute it, or what a user would run instead.

    frozen          x W^T, gradient for x only: the floor
    remix           routed_linear, strategy "auto"; dense, grouped, gather: by that strategy
    lora_kr         PEFT LoRA of rank k r: as many active parameters as ReMix
    lora_nr         PEFT LoRA of rank n r: as many parameters
    dense_eager     all experts and a mask, in plain differentiable PyTorch
    dense_compiled  the same under torch.compile
    expert_loop     a loop over experts with index_add_, as MixLoRA and MoLA are written
    grouped_mm      pairs sorted by expert, torch's grouped GEMM, index_add: as transformers runs
                    mixtures of experts
    einsum          every pair's A and B gathered: the formula as it is written
    scattermoe      Axolotl's ScatterMoE kernels on the same pool, on a GPU with axolotl installed

A peer takes a `Problem` and returns a function that runs its forward pass, or raises `Unable` with
the reason why it cannot. To add one: write it, and name it in PEERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.layers.problem import CHECKED_ROWS, SCALE, Problem

EINSUM_LIMIT = 2**26  # bytes of gathered experts
GATHER_ROWS = 64  # the strategy is for decoding: above, it is only slow
Forward = Callable[[], Tensor]


class Unable(Exception):
    """A peer that cannot run here, and why."""


def frozen(problem: Problem) -> Forward:
    """The linear without adapters."""
    return lambda: problem.linear(problem.folded_x)


def remix(problem: Problem) -> Forward:
    """Ours, as the layers call it."""
    return problem.remix


def by_strategy(strategy: str) -> Callable[[Problem], Forward]:
    """Ours, by one strategy."""

    def forward(problem: Problem) -> Forward:
        if strategy == "gather" and problem.cell.rows > GATHER_ROWS:
            raise Unable(f"more than {GATHER_ROWS} rows")
        return lambda: problem.remix(strategy=strategy)

    return forward


def lora_kr(problem: Problem) -> Forward:
    """As many active parameters."""
    module = problem.lora(problem.cell.k * problem.cell.r)
    return lambda: module(problem.folded_x)


def lora_nr(problem: Problem) -> Forward:
    """As many parameters."""
    module = problem.lora(problem.cell.n * problem.cell.r)
    return lambda: module(problem.folded_x)


def _dense(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor) -> Tensor:
    n, r = lora_A.shape[:2]
    chosen = x.new_zeros(index.shape[0], n).scatter(1, index, SCALE)
    hidden = (x @ lora_A.flatten(0, 1).T).view(-1, n, r) * chosen.unsqueeze(2)
    packed = lora_B.transpose(1, 2).reshape(n * r, -1)
    return torch.nn.functional.linear(x, weight) + hidden.flatten(1) @ packed


def dense_eager(problem: Problem) -> Forward:
    """All experts and a mask."""
    index, weight = problem.flat_index.long(), problem.linear.weight
    return lambda: _dense(problem.folded_x, weight, problem.lora_A, problem.lora_B, index)


def dense_compiled(problem: Problem) -> Forward:
    """The same, compiled for the cell's shapes."""
    torch._dynamo.reset()
    run = torch.compile(_dense, dynamic=False)
    index, weight = problem.flat_index.long(), problem.linear.weight
    return lambda: run(problem.folded_x, weight, problem.lora_A, problem.lora_B, index)


def expert_loop(problem: Problem) -> Forward:
    """Each expert's rows, added one expert at a time."""
    index = problem.flat_index

    def forward() -> Tensor:
        x = problem.folded_x
        y = problem.linear(x)
        for expert in range(problem.cell.n):
            rows, _ = torch.where(index == expert)
            hidden = x[rows] @ problem.lora_A[expert].T
            y.index_add_(0, rows, SCALE * (hidden @ problem.lora_B[expert].T))
        return y

    return forward


def grouped_mm(problem: Problem) -> Forward:
    """Two grouped GEMMs over sorted pairs."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise Unable(f"torch {torch.__version__} has no grouped_mm")
    index, n, k = problem.flat_index, problem.cell.n, problem.cell.k

    def forward() -> Tensor:
        x, flat = problem.folded_x, index.reshape(-1)
        order = flat.argsort(stable=True)
        rows = order // k
        offs = torch.bincount(flat, minlength=n).cumsum(0).to(torch.int32)
        mm = torch.nn.functional.grouped_mm
        hidden = mm(x[rows], problem.lora_A.transpose(1, 2), offs=offs)
        out = mm(hidden * SCALE, problem.lora_B.transpose(1, 2).contiguous(), offs=offs)
        return problem.linear(x).index_add(0, rows, out)

    return forward


def einsum(problem: Problem) -> Forward:
    """Every pair's experts, gathered."""
    cell = problem.cell
    gathered = cell.rows * cell.k * cell.r * max(cell.in_features, cell.out_features)
    if gathered * problem.x.itemsize > EINSUM_LIMIT:
        raise Unable(f"its copies of experts are over {EINSUM_LIMIT >> 20} MiB")
    index = problem.flat_index.long()

    def forward() -> Tensor:
        x = problem.folded_x
        hidden = torch.einsum("td,tkrd->tkr", x, problem.lora_A[index])
        return problem.linear(x) + SCALE * torch.einsum(
            "tkr,tkor->to", hidden, problem.lora_B[index]
        )

    return forward


def scattermoe(problem: Problem) -> Forward:
    """Two of its linears: x to each chosen expert's ranks, and those to y, summed by gates."""
    if problem.x.device.type != "cuda":
        raise Unable("a GPU only")
    try:
        from axolotl.integrations.kernels.libs.scattermoe_lora import (
            flatten_sort_count,
            parallel_linear,
        )
    except ImportError as error:
        raise Unable(f"{error}; pip install --no-deps axolotl") from None
    index, k, n = problem.flat_index.long(), problem.cell.k, problem.cell.n

    def forward() -> Tensor:
        x = problem.folded_x
        gates = x.new_full(index.shape, SCALE)
        order = flatten_sort_count(index, n)
        hidden = parallel_linear(x, problem.lora_A.transpose(1, 2), k, *order, grouped_out=True)
        columns = problem.lora_B.transpose(1, 2)
        y = parallel_linear(hidden, columns, 1, *order, gates=gates, grouped_in=True)
        return problem.linear(x) + y

    return forward


PEERS: dict[str, Callable[[Problem], Forward]] = {
    "frozen": frozen,
    "remix": remix,
    "dense": by_strategy("dense"),
    "grouped": by_strategy("grouped"),
    "gather": by_strategy("gather"),
    "lora_kr": lora_kr,
    "lora_nr": lora_nr,
    "dense_eager": dense_eager,
    "dense_compiled": dense_compiled,
    "expert_loop": expert_loop,
    "grouped_mm": grouped_mm,
    "einsum": einsum,
    "scattermoe": scattermoe,
}
OURS = ("remix", "dense", "grouped", "gather", "dense_own", "plain_own", "torch_dense")
OTHERS = ("frozen", "plain_own", "lora_kr", "lora_nr")  # do not compute the mixture


def runnable(
    problem: Problem, peers: dict[str, Callable[[Problem], Forward]]
) -> tuple[dict[str, Forward], dict[str, str]]:
    """The forward passes that run here, checked against fp64; and why the others do not.

    Raises:
        AssertionError: One computes something else.
        Exception: One of ours does not run.
    """
    found, reasons, twin = {}, {}, None
    if problem.cell.backward and problem.cell.rows > CHECKED_ROWS:
        few = replace(problem.cell, tokens=max(1, CHECKED_ROWS // problem.cell.m))
        twin = Problem(few, problem.x.device.type, problem.x.dtype)
    for name, peer in peers.items():
        try:
            forward = peer(problem)
            if name not in OTHERS:
                problem.check(name, forward)
                if twin is not None:
                    twin.check(name, peer(twin))
            problem.run(forward)()
            found[name] = forward
        except AssertionError:
            raise
        except Exception as error:
            if name in OURS and not isinstance(error, Unable):
                raise
            reasons[name] = " ".join(str(error).split())[:120] or type(error).__name__
    return found, reasons

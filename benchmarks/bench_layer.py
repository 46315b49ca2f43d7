"""One adapted linear, forward + backward: routed_linear against what a user would otherwise run.

    frozen       x W^T, gradient for x only: the floor
    remix        routed_linear, strategy "auto"
    lora_kr      PEFT LoRA of rank k r: as many active parameters as ReMix
    lora_nr      PEFT LoRA of rank n r: as many parameters
    expert_loop  a loop over experts with index_add, as mixtures of LoRAs are usually written
    dense_gemms  the eight matrix products of the dense strategy and nothing around them

Unit: ms a pass (fp32, two threads), and MiB that torch allocates at the peak. Adapter FLOPs over
the frozen linear's 4 T in out: dense 6 T n r (in + out), LoRA 6 T k r (in + out). Choosing experts
(router logits, sampling) is no part of it. Gradients are checked against fp64 before anything is
timed.

    python -m benchmarks.bench_layer [--rounds 30] [--strategies] [--no-save]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import (
    interleaved,
    peak_bytes,
    prepare_cpu,
    relative_error,
    write_rows,
)
from remix_kernels import routed_linear, sample_top_k
from remix_kernels._dispatch import resolve_strategy
from remix_model.layer import empty_b


@dataclass(frozen=True)
class Case:
    """A shape, from a named model."""

    model: str
    rows: int
    in_features: int
    out_features: int
    n: int
    k: int
    r: int

    def __str__(self) -> str:
        """Readable shape id."""
        shape = f"T{self.rows}-{self.in_features}x{self.out_features}"
        return f"{shape}-n{self.n}-k{self.k}-r{self.r}"


CASES = (
    Case("SmolLM2-135M up", 1024, 576, 1536, 8, 4, 8),
    Case("SmolLM2-135M up, k=2", 1024, 576, 1536, 8, 2, 8),
    Case("SmolLM2-135M up, M=4", 4096, 576, 1536, 8, 4, 8),
    Case("SmolLM2-135M down", 1024, 1536, 576, 8, 4, 8),
    Case("Llama-3.2-1B up", 512, 2048, 8192, 32, 2, 16),
)


class Problem:
    """Tensors of a case, and each variant as a function that runs one forward and backward pass."""

    def __init__(self, case: Case) -> None:
        """Draw signed random data."""
        torch.manual_seed(0)
        self.case = case
        n, k, r = case.n, case.k, case.r
        self.x = torch.randn(case.rows, case.in_features, requires_grad=True)
        self.linear = nn.Linear(case.in_features, case.out_features, bias=False)
        self.linear.requires_grad_(False)
        self.lora_A = (torch.randn(n, r, case.in_features) / case.in_features**0.5).requires_grad_()
        self.lora_B = (
            empty_b(n, case.out_features, r).normal_().requires_grad_()
        )  # the layers' strides
        self.index = sample_top_k(torch.randn(case.rows, n), k, seed=0)
        self.dy = torch.randn(case.rows, case.out_features)
        self.loras = {"lora_kr": self._lora(k * r), "lora_nr": self._lora(n * r)}

    def _lora(self, rank: int) -> nn.Module:
        holder = nn.Sequential(nn.Linear(self.case.in_features, self.case.out_features, bias=False))
        holder.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
        return inject_adapter_in_model(config, holder)

    def remix(self, strategy: str = "auto") -> Tensor:
        """Our op's output."""
        return routed_linear(
            self.x,
            self.linear.weight,
            None,
            self.lora_A,
            self.lora_B,
            self.index,
            0.5,
            strategy=strategy,
            check=False,  # as the layers call it
        )

    def expert_loop(self) -> Tensor:
        """Frozen output plus each expert's rows, added one expert at a time."""
        y = self.linear(self.x)
        for expert in range(self.case.n):
            rows, _ = torch.where(self.index == expert)
            hidden = self.x[rows] @ self.lora_A[expert].T
            y.index_add_(0, rows, 0.5 * (hidden @ self.lora_B[expert].T))
        return y

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """One forward and backward pass; gradients are dropped, as an optimizer would."""

        def run() -> None:
            forward().backward(self.dy)
            self.x.grad = self.lora_A.grad = self.lora_B.grad = None
            for lora in self.loras.values():
                lora.zero_grad(set_to_none=True)

        return run

    @torch.no_grad()
    def gemms(self) -> None:
        """Only the matrix products of the dense strategy: what no code around them can undercut."""
        x, dy, weight = self.x, self.dy, self.linear.weight
        lora_a = self.lora_A.flatten(0, 1)
        lora_b = self.lora_B.transpose(1, 2).flatten(0, 1)
        hidden = (lora_a @ x.T).T
        torch.nn.functional.linear(x, weight).addmm_(hidden, lora_b)
        dhidden = (lora_b @ dy.T).T
        (dy @ weight).addmm_(dhidden, lora_a)
        _ = hidden.T @ dy, dhidden.T @ x

    def variants(self, strategies: bool) -> dict[str, Callable[[], None]]:
        """Every variant by name."""
        forwards: dict[str, Callable[[], Tensor]] = {
            "frozen": lambda: self.linear(self.x),
            "remix": self.remix,
            "lora_kr": lambda: self.loras["lora_kr"](self.x),
            "lora_nr": lambda: self.loras["lora_nr"](self.x),
            "expert_loop": self.expert_loop,
        }
        if strategies:
            forwards["dense"] = lambda: self.remix("dense")
            forwards["grouped"] = lambda: self.remix("grouped")
        steps = {name: self.step(forward) for name, forward in forwards.items()}
        return {**steps, "dense_gemms": self.gemms}

    def check(self) -> None:
        """Output and gradients of our op and of the loop against the loop in fp64."""
        doubles = Problem.__new__(Problem)
        doubles.case, doubles.index = self.case, self.index
        doubles.linear = nn.Linear(self.case.in_features, self.case.out_features, bias=False)
        doubles.linear.weight = nn.Parameter(self.linear.weight.double(), requires_grad=False)
        inputs = (self.x, self.lora_A, self.lora_B)
        doubles.x, doubles.lora_A, doubles.lora_B = (
            t.detach().double().requires_grad_() for t in inputs
        )

        def results(problem: Problem, forward: Callable[[], Tensor]) -> list[Tensor]:
            y = forward()
            wrt = (problem.x, problem.lora_A, problem.lora_B)
            return [y, *torch.autograd.grad(y, wrt, self.dy.to(y.dtype))]

        truth = results(doubles, doubles.expert_loop)
        ours, eager = results(self, self.remix), results(self, self.expert_loop)
        eps = torch.finfo(torch.float32).eps
        for name, a, b, t in zip(("y", "dx", "dA", "dB"), ours, eager, truth, strict=True):
            limit = 2 * relative_error(b, t) + 4 * eps
            if relative_error(a, t) > limit:
                raise SystemExit(f"{self.case}: {name} is off by {relative_error(a, t):.2e}")


def main() -> None:
    """Measure every case, print a table, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--strategies", action="store_true", help="also time each strategy")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    rows: list[dict[str, object]] = []
    for case in CASES:
        problem = Problem(case)
        problem.check()
        variants = problem.variants(args.strategies)
        times = interleaved(variants, args.rounds)
        chosen = resolve_strategy(
            "auto", case.rows, problem.lora_A, problem.lora_B, case.k, problem.x.dtype
        )
        print(f"\n{case.model}  {case}  auto = {chosen}")
        for name, timing in times.items():
            peak_mib = peak_bytes(variants[name]) / 2**20
            row = {
                "model": case.model,
                "case": str(case),
                "variant": name,
                "time_ms": f"{timing.median_ms:.3f}",
                "p20_ms": f"{timing.quantile_ms(0.2):.3f}",
                "p80_ms": f"{timing.quantile_ms(0.8):.3f}",
                "over_frozen": f"{timing.ratio_to(times['frozen']):.3f}",
                "over_lora_kr": f"{timing.ratio_to(times['lora_kr']):.3f}",
                "peak_mib": f"{peak_mib:.2f}",
            }
            rows.append(row)
            print(
                f"  {name:12s} {row['time_ms']:>9} ms   x frozen {row['over_frozen']}   "
                f"x lora_kr {row['over_lora_kr']}   peak {row['peak_mib']} MiB"
            )
    if not args.no_save:
        print(f"\nwritten to {write_rows('layer', rows)}")


if __name__ == "__main__":
    main()

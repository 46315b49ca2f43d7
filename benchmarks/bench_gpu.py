"""One adapted linear on a GPU: our strategies against what a user would otherwise run.

    frozen          x W^T and its dx, cuBLAS: the floor
    auto            routed_linear as the layers call it
    dense, grouped  the strategies of the Triton backend
    dense_own       dense with the frozen product in our K-extended GEMM; plain_own: that GEMM with
                    no adapter, forward only, which dense_own is held to
    torch_dense     the PyTorch backend, eager; torch_compiled: the same under torch.compile
    grouped_mm      rows sorted by expert, torch's grouped GEMM, index_add
    expert_loop     a loop over experts with index_add_, as mixtures of LoRAs are usually written
    scattermoe      Axolotl's ScatterMoE kernels on the same pool, where axolotl is installed
    lora_kr, lora_nr  PEFT LoRA of rank k r and n r

and decoding of 1 to 32 rows in a CUDA graph: frozen, auto, gather, dense.

Unit: ms, by CUDA events, medians of interleaved rounds; MiB allocated at the peak over what was
there before. Results are checked against fp64 before anything is timed. Without a GPU it says so
and measures nothing.

    python -m benchmarks.bench_gpu [--rounds 20] [--no-save]
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import RESULTS, environment, relative_error
from remix_kernels import routed_linear, triton_dense


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
    Case("Llama-3-8B up", 16384, 4096, 14336, 8, 4, 8),
    Case("Llama-3-8B down", 16384, 14336, 4096, 8, 4, 8),
    Case("Llama-3-8B up", 16384, 4096, 14336, 8, 2, 16),
    Case("Llama-3-8B up", 16384, 4096, 14336, 32, 2, 16),
    Case("Llama-3-8B up", 16384, 4096, 14336, 64, 2, 64),
    Case("Llama-3.2-1B up", 4096, 2048, 8192, 8, 4, 8),
)
DECODE = tuple(Case("Llama-3-8B up", rows, 4096, 14336, 8, 4, 8) for rows in (1, 4, 32))


class Problem:
    """bf16 tensors of a case and each variant's forward pass."""

    def __init__(self, case: Case) -> None:
        """Draw signed random data on the GPU."""
        generator = torch.Generator("cuda").manual_seed(0)

        def signed(*size: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(size, generator=generator, device="cuda")
            return drawn.mul_(scale).to(torch.bfloat16)

        T, d, o, n, k, r = (
            case.rows, case.in_features, case.out_features, case.n, case.k, case.r
        )  # fmt: skip
        self.case = case
        self.x = signed(T, d).requires_grad_()
        self.linear = nn.Linear(d, o, bias=False, device="cuda", dtype=torch.bfloat16)
        self.linear.requires_grad_(False)
        self.lora_A = signed(n, r, d, scale=d**-0.5).requires_grad_()
        self.lora_B = signed(n, r, o).transpose(1, 2).requires_grad_()
        keys = torch.rand(T, n, generator=generator, device="cuda")
        self.index = keys.argsort(1)[:, :k].to(torch.int32)
        self.dy = signed(T, o)
        self.loras = {"lora_kr": self._lora(k * r), "lora_nr": self._lora(n * r)}

    def _lora(self, rank: int) -> nn.Module:
        holder = nn.Sequential(self.linear)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
        return inject_adapter_in_model(config, holder).to("cuda", torch.bfloat16)

    def remix(self, **choice: str) -> Tensor:
        """Our op."""
        return routed_linear(
            self.x,
            self.linear.weight,
            None,
            self.lora_A,
            self.lora_B,
            self.index,
            0.5,
            check=False,
            **choice,
        )

    def expert_loop(self) -> Tensor:
        """Each expert's rows, added one expert at a time."""
        y = self.linear(self.x)
        for expert in range(self.case.n):
            rows, _ = torch.where(self.index == expert)
            hidden = self.x[rows] @ self.lora_A[expert].T
            y.index_add_(0, rows, 0.5 * (hidden @ self.lora_B[expert].T))
        return y

    def grouped_mm(self) -> Tensor:
        """Pairs sorted by expert, two grouped GEMMs, summed back."""
        flat = self.index.reshape(-1)
        order = flat.argsort(stable=True)
        rows = order // self.case.k
        bounds = torch.arange(1, self.case.n + 1, device="cuda", dtype=flat.dtype)
        offs = torch.searchsorted(flat[order], bounds, right=False).to(torch.int32)
        hidden = torch.nn.functional.grouped_mm(
            self.x[rows], self.lora_A.transpose(1, 2), offs=offs
        )
        out = torch.nn.functional.grouped_mm(
            hidden * 0.5, self.lora_B.transpose(1, 2).contiguous(), offs=offs
        )
        return self.linear(self.x).index_add(0, rows, out)

    def scattermoe(self) -> Tensor:
        """Two of its linears: x to each chosen expert's ranks, and those to y, summed by gates."""
        from axolotl.integrations.kernels.libs.scattermoe_lora import (
            flatten_sort_count,
            parallel_linear,
        )

        k, gates = self.case.k, self.x.new_full(self.index.shape, 0.5)
        order = flatten_sort_count(self.index.long(), self.case.n)
        hidden = parallel_linear(self.x, self.lora_A.transpose(1, 2), k, *order, grouped_out=True)
        columns = self.lora_B.transpose(1, 2)
        y = parallel_linear(hidden, columns, 1, *order, gates=gates, grouped_in=True)
        return self.linear(self.x) + y

    @torch.no_grad()
    def plain_own(self) -> Tensor:
        """x W^T in our GEMM: the K-extended kernel with no columns to extend by."""
        x, y = self.x, self.x.new_empty(self.case.rows, self.case.out_features)
        nothing = x.new_empty(self.case.rows, 0)
        triton_dense.expand(nothing, self.lora_B[:1], y, x=x, weight=self.linear.weight)
        return y

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        """Forward passes by name."""
        compiled = torch.compile(lambda: self.remix(backend="torch", strategy="dense"))
        found: dict[str, Callable[[], Tensor]] = {
            "frozen": lambda: self.linear(self.x),
            "auto": self.remix,
            "dense": lambda: self.remix(backend="triton", strategy="dense"),
            "dense_own": lambda: self.remix(backend="triton", strategy="dense"),
            "plain_own": self.plain_own,
            "grouped": lambda: self.remix(backend="triton", strategy="grouped"),
            "torch_dense": lambda: self.remix(backend="torch", strategy="dense"),
            "torch_compiled": compiled,
            "grouped_mm": self.grouped_mm,
            "scattermoe": self.scattermoe,
            "expert_loop": self.expert_loop,
            "lora_kr": lambda: self.loras["lora_kr"](self.x),
            "lora_nr": lambda: self.loras["lora_nr"](self.x),
        }
        return found


@contextmanager
def gemm_of(name: str) -> Iterator[None]:
    """Where the variant is named so: the frozen product in our kernel, in both passes."""
    if name != "dense_own":
        yield
        return
    os.environ["REMIX_GEMM"] = "triton"
    try:
        yield
    finally:
        del os.environ["REMIX_GEMM"]


def check(problem: Problem, name: str, forward: Callable[[], Tensor]) -> str:
    """Raise unless a variant of the mixture is right; return why it cannot run, else ""."""
    try:
        with gemm_of(name):
            y = forward()
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    if name in ("frozen", "plain_own", "lora_kr", "lora_nr"):
        return ""
    with torch.no_grad():
        few = slice(0, 256)
        truth = routed_linear(
            problem.x[few].double(),
            problem.linear.weight.double(),
            None,
            problem.lora_A.double(),
            problem.lora_B.double(),
            problem.index[few],
            0.5,
            backend="torch",
            strategy="dense",
        )
    error = relative_error(y[few], truth)
    if error > 0.02:
        raise AssertionError(f"{name} at {problem.case} is off by {error:.3f}: nothing is timed")
    return ""


def time_ms(run: Callable[[], object]) -> float:
    """One run between two CUDA events, on an idle GPU with a flushed L2."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: forward, forward + backward, peak memory."""
    problem = Problem(case)
    runnable, rows = {}, []
    for name, forward in problem.variants().items():
        reason = check(problem, name, forward)
        if reason:
            print(f"  {name}: not measured ({reason})")
            continue
        runnable[name] = forward

    def step(name: str, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with gemm_of(name):
                forward().backward(problem.dy)
            problem.x.grad = problem.lora_A.grad = problem.lora_B.grad = None
            for lora in problem.loras.values():
                lora.zero_grad(set_to_none=True)

        return run

    def forward_only(name: str, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), gemm_of(name):
                forward()

        return run

    for which, wrap in (("forward", forward_only), ("forward+backward", step)):
        runs = {name: wrap(name, forward) for name, forward in runnable.items()}
        if which != "forward":
            runs.pop("plain_own", None)
        peaks = {name: _peak_mib(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(time_ms(run))
        for name in runs:
            ratio = statistics.median(
                a / b for a, b in zip(times[name], times["frozen"], strict=True)
            )
            row = {
                "case": str(case),
                "pass": which,
                "variant": name,
                "time_ms": f"{statistics.median(times[name]):.4f}",
                "over_frozen": f"{ratio:.3f}",
                "peak_mib": f"{peaks[name]:.1f}",
            }
            rows.append(row)
            print(f"  {which:17s} {name:15s} {row['time_ms']:>9s} ms  x {row['over_frozen']}")
    return rows


def measure_decode(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of one decoding case, each variant replayed as a CUDA graph."""
    problem = Problem(case)
    forwards: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: problem.linear(problem.x),
        "auto": problem.remix,
        "gather": lambda: problem.remix(backend="triton", strategy="gather"),
        "dense": lambda: problem.remix(backend="triton", strategy="dense"),
    }
    graphs = {}
    for name, forward in forwards.items():
        with torch.no_grad():
            forward()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(time_ms(graph.replay))
    rows = []
    for name in graphs:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["frozen"], strict=True))
        row = {
            "case": f"decode {case}",
            "pass": "graph",
            "variant": name,
            "time_ms": f"{statistics.median(times[name]):.4f}",
            "over_frozen": f"{ratio:.3f}",
            "peak_mib": "",
        }
        rows.append(row)
        print(f"  decode {name:15s} {row['time_ms']:>9s} ms  x {row['over_frozen']}")
    return rows


def _peak_mib(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Measure every case; without a GPU say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured on a GPU: torch sees no CUDA device")
        return
    where = {
        **environment(),
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
    }
    path = RESULTS / "gpu.csv"
    for case, run in [(c, measure) for c in CASES] + [(c, measure_decode) for c in DECODE]:
        print(f"\n{case.model}  {case}", flush=True)
        rows = [{**where, **row} for row in run(case, args.rounds)]
        torch.cuda.empty_cache()
        if args.no_save:
            continue
        new = not path.exists()  # appended case by case: a time limit loses one case
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

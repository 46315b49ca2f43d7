"""The tests' own test: one fault planted in every kernel, each caught by the parity rule.

A fault is a change of a line of a kernel's source. The changed file is loaded beside the real one,
its strategy (or sampling function) takes the other's place, and the problems that the unchanged
source passes must fail. docs/kernels.md lists the faults.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import remix_kernels
from remix_kernels import ops, sample_top_k, selection_log_prob
from remix_kernels._log_prob import Score
from tests.helpers import (
    Case,
    Inputs,
    assert_accurate,
    assert_all_accurate,
    in_fp64,
    run,
    selection_log_prob_eager,
    solve,
    unordered_log_prob_eager,
)
from tests.remix_kernels.test_triton import DEVICE, op_of

SOURCES = Path(remix_kernels.__file__).parent
KERNELS_DOC = Path(__file__).parents[2] / "docs" / "kernels.md"

pytestmark = pytest.mark.usefixtures("strict_triton", "nan_in_empty")


@dataclass(frozen=True)
class Fault:
    """What is planted: `new` for the first `old` after `def kernel`."""

    strategy: str
    kernel: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.kernel.strip('_')}: {self.what}"

    def plant(self, source: str) -> str:
        """The faulty source."""
        start = source.index(f"def {self.kernel}(")
        at = source.index(self.old, start)
        following = source.find("\n@triton.jit", start)
        assert following < 0 or at < following, f"{self.old!r} is not in {self.kernel}"
        return source[:at] + self.new + source[at + len(self.old) :]


FAULTS = [
    Fault(
        "dense",
        "_dense_fwd_shrink_kernel",
        "the block's last row is not written",
        "mask_m, mask_r = offs_m < T, offs_r < R",
        "mask_m, mask_r = offs_m < T - 1, offs_r < R",
    ),
    Fault(
        "dense",
        "_dense_fwd_shrink_kernel",
        "every selection has the mask of the first",
        "            index_ptr,\n            weights_ptr,\n            rows,",
        "            index_ptr,\n            weights_ptr,\n            offs_m,",
    ),
    Fault(
        "shared",
        "selection_mask",
        "the last slot is left out",
        "range(TOP_K)",
        "range(TOP_K - 1)",
    ),
    Fault(
        "one_pass",
        "_one_pass_kernel",
        "a block of columns overwrites dH of the one before",
        "dh = dot(dy, b.to(dy.dtype), dh, PRECISION)",
        "dh = dot(dy, b.to(dy.dtype), dh * 0.0, PRECISION)",
    ),
    Fault(
        "one_pass",
        "_one_pass_kernel",
        "every block of rows writes the first plane of dB",
        "g_ptr + (block * R",
        "g_ptr + (block * 0",
    ),
    Fault(
        "one_pass",
        "_one_pass_ds_kernel",
        "the last part of dH is not added",
        "range(num_parts)",
        "range(num_parts - 1)",
    ),
    Fault(
        "dense",
        "_dense_fwd_expand_kernel",
        "the stride of B's rows for that of its experts",
        "expert * stride_bn",
        "expert * stride_bo",
    ),
    Fault(
        "dense",
        "_dense_fwd_expand_kernel",
        "the bias is dropped",
        "if HAS_BIAS:",
        "if HAS_BIAS and not HAS_FROZEN:",
    ),
    Fault(
        "dense",
        "_dense_bwd_dh_kernel",
        "the last selection in place of the sum over all",
        "ds += acc * selection_mask(",
        "ds = acc * selection_mask(",
    ),
    Fault(
        "dense",
        "_dense_bwd_gram_kernel",
        "a block of rows overwrites the one before",
        "acc = dot(u, v, acc, PRECISION)",
        "acc = dot(u, v, acc * 0.0, PRECISION)",
    ),
    Fault(
        "dense",
        "_dense_bwd_sum_kernel",
        "the last plane is not added",
        "range(num_planes)",
        "range(num_planes - 1)",
    ),
    Fault(
        "dense",
        "_dense_bwd_dweights_kernel",
        "the next expert's columns",
        "columns = (chosen * RANK)[:, None]",
        "columns = ((chosen + 1) % 8 * RANK)[:, None]",
    ),
    Fault(
        "grouped",
        "_grouped_sort_count_kernel",
        "the last pair is not counted",
        "offs < PAIRS, TOP_K, -1)",
        "offs < PAIRS - 1, TOP_K, -1)",
    ),
    Fault(
        "grouped",
        "_grouped_sort_scatter_kernel",
        "sorted positions for the pairs that belong there",
        "offs.to(tl.int32), mask=mask)",
        "(start + place).to(tl.int32), mask=mask)",
    ),
    Fault(
        "grouped",
        "_find_tile",
        "every tile of an expert begins at its first pair",
        "first = begin + (tile - before) * BLOCK_M",
        "first = begin + (tile - before) * 0",
    ),
    Fault(
        "grouped",
        "_grouped_shrink_kernel",
        "the weight of the sorted position for that of the pair",
        "weights_ptr + pair, mask",
        "weights_ptr + offs_q, mask",
    ),
    Fault(
        "grouped",
        "_grouped_expand_kernel",
        "a slot overwrites the one before",
        "acc += tl.load(base_ptrs",
        "acc += 0.0 * tl.load(base_ptrs",
    ),
    Fault(
        "grouped",
        "_grouped_bwd_gram_kernel",
        "the pair for its row",
        "rows = (pair // TOP_K) % V_ROWS",
        "rows = pair % V_ROWS",
    ),
    Fault(
        "grouped",
        "_grouped_bwd_sum_kernel",
        "the last chunk is not added",
        "range(first, last)",
        "range(first, last - 1)",
    ),
    Fault(
        "gather",
        "_gather_fwd_shrink_kernel",
        "the second block of columns is left out",
        "range(0, K_IN, BLOCK_K)",
        "range(0, BLOCK_K, BLOCK_K)",
    ),
    Fault(
        "gather",
        "_gather_fwd_expand_kernel",
        "the first slot's expert for all",
        "index_ptr + row * TOP_K + j).to",
        "index_ptr + row * TOP_K).to",
    ),
    Fault(
        "sampling",
        "_philox_uint32",
        "one round too few",
        "key_high, 10)",
        "key_high, 9)",
    ),
    Fault(
        "sampling",
        "_sample_top_k_fwd_kernel",
        "an expert may be drawn again",
        'drawn[:, None], float("-inf"), keys)',
        "drawn[:, None], keys, keys)",
    ),
    Fault(
        "sampling",
        "_log_prob_fwd_kernel",
        "what was drawn stays in the denominator",
        'left = tl.where(is_drawn, float("-inf"), left)',
        "left = tl.where(is_drawn, left, left)",
    ),
    Fault(
        "sampling",
        "_log_prob_bwd_kernel",
        "the row's gradient is not multiplied in",
        "dz *= tl.load(grad_ptr",
        "dz += 0.0 * tl.load(grad_ptr",
    ),
    Fault(
        "unordered",
        "_drawn_and_rest",
        "the last drawn expert counts among the others",
        "range(TOP_K)",
        "range(TOP_K - 1)",
    ),
    Fault(
        "unordered",
        "_node",
        "nodes count as if they were equally far apart",
        "STEP + 0.5 * STEP * bend",
        "STEP + 0.0 * STEP * bend",
    ),
    Fault(
        "unordered",
        "_unordered_log_prob_fwd_kernel",
        "the sum is not made relative to a new largest term",
        "total * tl.exp(largest - highest)",
        "total",
    ),
    Fault(
        "unordered",
        "_unordered_log_prob_bwd_kernel",
        "a node overwrites the mean of those before",
        "dlog_a * scale[:, None]",
        "dlog_a * 0.0",
    ),
    Fault(
        "unordered",
        "_unordered_log_prob_bwd_kernel",
        "the experts that were not drawn get no gradient",
        "-drest[:, None] * share",
        "-drest[:, None] * 0.0 * share",
    ),
    Fault(
        "shared",
        "add_product",
        "the last block of columns is left out",
        "range(0, K_IN, BLOCK_K)",
        "range(0, K_IN - BLOCK_K, BLOCK_K)",
    ),
    Fault(
        "shared",
        "swizzled_pid",
        "the last group counts as a full one",
        "rows = min(num_m - first_m, GROUP_M)",
        "rows = GROUP_M",
    ),
]
NONE = [Fault(strategy, "", "nothing", "", "") for strategy in ("dense", "grouped", "gather")]
NONE += [Fault(strategy, "", "nothing", "", "") for strategy in ("sampling", "shared", "one_pass")]
NONE += [Fault("unordered", "", "nothing", "", "")]


# What a strategy must pass: several blocks of rows, columns and ranks, all with a remainder, and M
# selections of one x with weights that are learned. REMIX_GEMM=triton runs the frozen product too.
PROBLEMS = {
    "dense": Case(T=70, in_features=70, n=8, k=2, r=5, options=("linear",)),
    "grouped": Case(T=24, in_features=40, n=4, k=2, r=5, options=("linear", "M3")),
    "gather": Case(T=3, in_features=70, n=4, k=2, r=5, options=("linear",)),
}
PROBLEMS["one_pass"] = Case(T=70, in_features=40, out_features=100, n=4, k=2, r=5)
# Files that a strategy's imports from.
PARTS = {"dense": ("triton_products",), "grouped": ("triton_sort", "triton_grouped_products")}
SHARED_X = Case(T=36, in_features=40, n=8, k=2, r=5, options=("M3",))


def load(name: str, file: str, change: Callable[[str], str], folder: Path) -> ModuleType:
    """A module from the source of `file`, changed: Triton reads a kernel's source from its file."""
    path = folder / file
    path.write_text(change((SOURCES / file).read_text(encoding="utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solve_with(module: Any, strategy: str) -> None:
    """The problems of a strategy, with its kernels from `module`."""
    case_of, strategy = strategy, "dense" if strategy == "one_pass" else strategy
    table = {strategy: getattr(module, strategy.upper())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMIX_GEMM", "triton")
        patch.setattr(ops, "triton_strategies", lambda: table)
        for case in (PROBLEMS[case_of], *([SHARED_X] if case_of == "dense" else [])):
            inputs, dy, eager, truth = solve(case, torch.float32, DEVICE)
            if strategy == "gather":  # its backward pass is the dense strategy's
                with torch.no_grad():
                    y = op_of(case, strategy)(**inputs)
                assert_accurate(y, eager["y"], truth["y"])
            else:
                actual = run(op_of(case, strategy), inputs, case.trained, dy)
                assert_all_accurate(actual, eager, truth)


def log_prob_inputs() -> tuple[Inputs, Tensor]:
    """Drawn experts of some rows, and a gradient."""
    logits, grad = torch.randn(37, 9, device=DEVICE), torch.randn(37, device=DEVICE)
    index = sample_top_k(logits, 3, seed=2**40 + 1, offset=5, backend="torch")
    return {"logits": logits, "top_k_index": index}, grad


def check_log_prob(
    actual: Inputs, eager_op: Callable[..., Tensor], inputs: Inputs, grad: Tensor
) -> None:
    eager = run(eager_op, inputs, ("logits",), grad)
    truth = run(eager_op, in_fp64(inputs), ("logits",), grad.double())
    assert_all_accurate(actual, eager, truth)


def sample_with(module: Any) -> None:
    """Draws, log-probabilities and their gradient, by the kernels of `module`."""
    inputs, grad = log_prob_inputs()
    logits, want = inputs.values()
    with pytest.MonkeyPatch.context() as patch:
        score = Score(module.log_prob_fwd, module.log_prob_bwd)
        patch.setattr(ops, "_triton_sample_top_k", lambda: module.sample_top_k_fwd)
        patch.setattr(ops, "_triton_scores", lambda: {False: score})
        got = sample_top_k(logits, 3, seed=2**40 + 1, offset=5, backend="triton")
        assert torch.equal(got, want)
        actual = run(selection_log_prob, {**inputs, "backend": "triton"}, ("logits",), grad)
    check_log_prob(actual, selection_log_prob_eager, inputs, grad)


def unordered_with(module: Any) -> None:
    """Log-probabilities of sets and their gradient, by the kernels of `module`."""
    inputs, grad = log_prob_inputs()
    arguments = {**inputs, "unordered": True, "backend": "triton"}
    with pytest.MonkeyPatch.context() as patch:
        score = Score(module.unordered_log_prob_fwd, module.unordered_log_prob_bwd)
        patch.setattr(ops, "_triton_scores", lambda: {True: score})
        actual = run(selection_log_prob, arguments, ("logits",), grad)
    check_log_prob(actual, unordered_log_prob_eager, inputs, grad)


def check(fault: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load the fault's file, faulty, and solve its problems."""
    change: Callable[[str], str] = (lambda source: source) if not fault.kernel else fault.plant
    strategy = fault.strategy
    if strategy == "sampling":
        sample_with(load("faulty_sampling", "triton_sampling.py", change, folder))
        return
    if strategy == "unordered":
        unordered_with(load("faulty_unordered", "triton_unordered.py", change, folder))
        return
    if strategy == "shared":
        helpers = load("faulty_helpers", "_triton.py", change, folder)
        patch.setitem(sys.modules, "remix_kernels._triton", helpers)
        strategy, change = "dense", lambda source: source
    problem = strategy
    if strategy == "one_pass":
        module = load("faulty_one_pass", "triton_one_pass.py", change, folder)
        patch.setattr("remix_kernels.triton_one_pass", module)
        strategy, change = "dense", lambda source: source
    for part in PARTS.get(strategy, ()):  # made anew in any case: they may use faulty helpers
        source = (SOURCES / f"{part}.py").read_text(encoding="utf-8")
        here = fault.kernel and f"def {fault.kernel}(" in source
        module = load(f"faulty_{part}", f"{part}.py", change if here else str, folder)
        patch.setitem(sys.modules, f"remix_kernels.{part}", module)
        change = str if here else change
    solve_with(load(f"faulty_{strategy}", f"triton_{strategy}.py", change, folder), problem)


@pytest.mark.parametrize("nothing", NONE, ids=lambda fault: fault.strategy)
def test_without_a_fault_all_problems_are_solved(
    nothing: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(nothing, tmp_path, monkeypatch)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_caught(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"relative error|equal|dtype"):
        check(fault, tmp_path, monkeypatch)


def test_every_kernel_has_a_fault() -> None:
    kernels = {
        line.removeprefix("def ").split("(")[0]
        for path in SOURCES.glob("triton_*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert kernels <= {fault.kernel for fault in FAULTS}, kernels


def test_the_docs_list_them() -> None:
    text = KERNELS_DOC.read_text(encoding="utf-8")
    missing = [str(f) for f in FAULTS if f"| `{f.kernel}` | {f.what} |" not in text]
    assert not missing

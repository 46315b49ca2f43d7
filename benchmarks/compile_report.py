"""Every Triton kernel compiled ahead of time for GPUs that are not here: what it needs there.

    python -m benchmarks.compile_report              all shapes and targets; writes the table
    python -m benchmarks.compile_report --check      also fail on what a GPU would punish
    python -m benchmarks.compile_report --subset     one shape, two targets: what CI runs

Launches are recorded from the launchers themselves, on meta tensors, so what is compiled is what
would run: same arguments, same specialisation, same configuration. Adapters beside bf16 are fp32,
as PEFT keeps them; beside fp16 and fp32 they are in the dtype of x. A row says registers, spilled
bytes, shared memory, tensor-core instructions, 128-bit and narrower global accesses, and how many
programs fit on one multiprocessor by those figures.

`--check` fails on: a configuration that does not compile, a spill in 16 bits, a 16-bit matrix
product without tensor cores, more shared memory than the target has, and, in a product whose rows
begin at 16 bytes, no 128-bit access or a tile that is read element by element.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it must compile here

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.compiler import ASTSource

from benchmarks.common import replace_rows
from remix_kernels import (
    _configs,
    triton_dense,
    triton_gather,
    triton_grouped,
    triton_sampling,
    triton_unordered,
)
from remix_kernels._launch import observe
from remix_kernels._routed import Call, Needs, Strategy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program
REGISTERS, SHARED_KIB = 65536, {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # a multiprocessor
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Kernels that multiply matrices.
PRODUCTS = ("shrink", "expand", "gram", "dh_kernel", "one_pass_kernel")
CUOBJDUMP = Path(nvidia_backend).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Shape:
    """A problem that launchers are recorded on."""

    rows: int
    in_features: int
    out_features: int
    n: int
    k: int
    r: int
    num_selections: int = 1

    def __str__(self) -> str:
        """Readable shape id."""
        shape = f"T{self.rows}-{self.in_features}x{self.out_features}"
        return f"{shape}-n{self.n}-k{self.k}-r{self.r}-M{self.num_selections}"


SHAPES = (
    Shape(16384, 4096, 14336, 8, 4, 8),  # Llama-3-8B up
    Shape(16384, 14336, 4096, 64, 2, 64),  # Llama-3-8B down, many experts
    Shape(1024, 576, 1536, 8, 4, 8, 4),  # SmolLM2-135M up, selections sharing x
    Shape(1, 2048, 8192, 32, 2, 16),  # Llama-3.2-1B up, decoding
    Shape(16384, 4096, 14336, 4, 2, 8),  # a small pool: dH and dB in one pass
    Shape(1000, 575, 1537, 5, 3, 3),  # nothing divides anything
)


@dataclass
class Row:
    """What one compilation gave."""

    kernel: str
    target: str
    dtype: str
    shape: str
    config: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_kib: float = 0.0
    tensor_core: int = 0
    wide_accesses: int = 0
    narrow_reads: int = 0  # indices, offsets and weights among them
    element_reads: int = 0  # of 16 bits
    programs_per_sm: int = 0
    compile_s: float = 0.0
    error: str = ""


Launch = tuple[Any, dict[str, Any]]


def record(shape: Shape, dtype: torch.dtype, target: str) -> Iterator[Launch]:
    """Every launch of every strategy's forward and backward pass, and of sampling."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        launches.append((kernel, arguments))
        return False

    real_arch = _configs.arch
    _configs.arch = lambda device: target
    try:
        with observe(note):
            for learned in (False, True):
                call, dy = _call(shape, dtype, learned)
                for strategy in (triton_dense.DENSE, triton_grouped.GROUPED, triton_gather.GATHER):
                    _pass(strategy, call, dy, learned)
            os.environ["REMIX_GEMM"] = "triton"
            _pass(triton_dense.DENSE, *_call(shape, dtype, False), False)
            logits = _meta(shape.rows, shape.n, dtype=torch.float32)
            index = _meta(shape.rows, shape.k, dtype=torch.int32)
            triton_sampling.sample_top_k_fwd(logits, shape.k, 2**40 + 1, 0)
            triton_sampling.log_prob_fwd(logits, index)
            grad = _meta(shape.rows, dtype=torch.float32)
            triton_sampling.log_prob_bwd(logits, index, grad)
            triton_unordered.unordered_log_prob_fwd(logits, index)
            triton_unordered.unordered_log_prob_bwd(logits, index, grad)
    finally:
        os.environ.pop("REMIX_GEMM", None)
        _configs.arch = real_arch
    seen = set()
    for kernel, arguments in launches:
        source, options = source_of(kernel, arguments)
        key = (kernel.fn.__name__, source.hash(), tuple(options.items()))
        if key not in seen:
            seen.add(key)
            yield kernel, arguments


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adapters beside bf16 are fp32, as PEFT keeps them; beside the others they are alike."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call(shape: Shape, dtype: torch.dtype, learned: bool) -> tuple[Call, Tensor]:
    rows = shape.rows * shape.num_selections
    weights: Tensor | float = 0.5
    adapters = adapter_dtype(dtype)
    if learned:
        weights = _meta(rows, shape.k, dtype=dtype).requires_grad_()
    call = Call(
        _meta(shape.rows, shape.in_features, dtype=dtype),
        _meta(shape.out_features, shape.in_features, dtype=dtype),
        None,
        None,
        _meta(shape.n, shape.r, shape.in_features, dtype=adapters),
        _meta(shape.n, shape.r, shape.out_features, dtype=adapters).transpose(1, 2),
        _meta(rows, shape.k, dtype=torch.int32),
        weights,
    )
    return call, _meta(rows, shape.out_features, dtype=dtype)


def _pass(strategy: Strategy, call: Call, dy: Tensor, learned: bool) -> None:
    with torch.no_grad():
        kept = strategy.prepare(call, learned)
        strategy.forward(call, kept)
        strategy.backward(call, kept, dy, Needs(True, True, True, learned))


def source_of(kernel: Any, arguments: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """The specialised source that a launch with these arguments would compile, and its options."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return ASTSource(kernel, signature, constants, attributes), options


def compile_row(kernel: Any, arguments: dict[str, Any], row: Row) -> Row:
    """Compile for row.target and fill the row in."""
    source, options = source_of(kernel, arguments)
    start = time.perf_counter()
    try:
        built = triton.compile(source, target=TARGETS[row.target], options=options)
    except Exception as error:  # whatever the compiler raises is this row's finding
        row.error = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return row
    row.compile_s = round(time.perf_counter() - start, 2)
    row.shared_kib = round(built.metadata.shared / 1024, 1)
    threads = built.metadata.num_warps * (64 if row.target.startswith("gfx") else 32)
    (_read_amdgcn if row.target.startswith("gfx") else _read_cubin)(built.asm, row)
    if row.target in SHARED_KIB:
        by_registers = REGISTERS // max(row.registers * threads, 1)
        by_shared = int(SHARED_KIB[row.target] // max(row.shared_kib + 1, 1))
        row.programs_per_sm = min(by_registers, by_shared, 2048 // threads)
    return row


def _read_cubin(asm: dict[str, Any], row: Row) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(CUOBJDUMP), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    row.registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    row.spilled_bytes = 4 * len(re.findall(r"\b(?:STL|LDL)\b", sass))
    row.tensor_core = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass))
    row.wide_accesses = len(re.findall(r"\b(?:LDG|LDGSTS|STG)\S*\.128", sass))
    reads = re.findall(r"\b(?:LDG|LDGSTS)\.\S+", sass)
    row.narrow_reads = sum(".128" not in read for read in reads)
    row.element_reads = sum(".U16" in read or ".S16" in read for read in reads)


def _read_amdgcn(asm: dict[str, Any], row: Row) -> None:
    text = asm["amdgcn"]
    row.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    row.spilled_bytes = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
    row.tensor_core = text.count("v_mfma")
    row.wide_accesses = len(re.findall(r"\b(?:global|buffer)_(?:load|store)_dwordx4", text))
    row.narrow_reads = len(re.findall(r"\b(?:global|buffer)_load_(?!dwordx4)", text))
    row.element_reads = len(re.findall(r"\b(?:global|buffer)_load_(?:ushort|sshort|short)", text))


def faults(row: Row, arguments: dict[str, Any]) -> Iterator[str]:
    """What --check does not accept."""
    product = any(word in row.kernel for word in PRODUCTS) and "gather" not in row.kernel
    if row.error:
        yield f"does not compile: {row.error}"
        return
    if row.spilled_bytes and row.dtype != "float32":
        yield f"spills {row.spilled_bytes} bytes"
    if row.shared_kib > SHARED_LIMIT[row.target]:
        yield f"{row.shared_kib} KiB of shared memory, {row.target} has {SHARED_LIMIT[row.target]}"
    if product and row.dtype != "float32" and not row.tensor_core:
        yield "a 16-bit product without tensor cores"
    sizes = [arguments[name] for name in ("K_IN", "N_OUT", "D") if arguments.get(name)]
    aligned = all(size % 16 == 0 for size in sizes)
    if product and row.dtype != "float32" and aligned and not row.wide_accesses:
        yield "no 128-bit access, and its rows are aligned"
    aligned = aligned and arguments.get("RANK", 8) % 8 == 0 and arguments.get("R", 8) % 8 == 0
    learned = arguments.get("HAS_WEIGHTS")  # a weight a pair: never neighbours
    if product and row.dtype != "float32" and aligned and not learned and row.element_reads:
        yield f"{row.element_reads} reads of one element, and its rows are aligned"


def main() -> None:
    """Compile, print, write, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 on what a GPU would punish")
    parser.add_argument("--subset", action="store_true", help="one shape, bf16, two targets")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    shapes, targets = SHAPES, list(TARGETS)
    if args.subset:
        dtypes, shapes, targets = dtypes[:1], (SHAPES[0], *SHAPES[4:]), ["sm_90", "gfx942"]
    rows, found = [], []
    for target in targets:
        for dtype in dtypes:
            for shape in shapes if dtype == torch.bfloat16 else shapes[:2]:
                for kernel, arguments in record(shape, dtype, target):
                    blocks = ("BLOCK", "CHUNK", "num_", "HAS", "KEEP", "DOT")
                    config = {k: v for k, v in arguments.items() if k.startswith(blocks)}
                    name = str(dtype).removeprefix("torch.")
                    name += " with float32 adapters" if dtype == torch.bfloat16 else ""
                    row = Row(kernel.fn.__name__, target, name, str(shape), _short(config))
                    rows.append(compile_row(kernel, arguments, row))
                    for fault in faults(row, arguments):
                        found.append(f"{row.kernel} {target} {name} {shape}: {fault}")
                        print("FAULT", found[-1], flush=True)
        print(f"{target}: {len(rows)} compilations so far", flush=True)
    if not args.no_save:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        replace_rows("compile_report", [{**versions, **asdict(row)} for row in rows])
    print(f"{len(rows)} compilations, {len(found)} faults")
    if args.check and found:
        sys.exit(1)


def _short(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value:d}" for name, value in config.items())


if __name__ == "__main__":
    main()

"""Bytes that every Triton kernel loads and stores, as formulas of its launch.

    python -m benchmarks.traffic        each pass at Llama-3-8B shapes, as table and rows

A formula counts what unmasked lanes load and store of floating-point data, tile re-reads included:
an operand that every column block reads anew counts once a column block, wherever the cache serves
it from. tests/remix_kernels/test_triton_traffic.py counts the same in the interpreter and finds
equal numbers, so these are facts about the kernels, on any machine. Two things to hold them to:

    floor   each input of the pass once, each output once, whatever the strategy
    plan    what the strategy must move: its operands once a kernel that needs them (dense), once a
            slot (grouped), and nothing read again because a tile has an end

Bookkeeping in integers (indices, offsets) is left out; it is below a percent at these shapes.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # nothing is compiled here

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.common import replace_rows
from remix_kernels import _configs, triton_dense, triton_gather, triton_grouped, triton_one_pass
from remix_kernels._launch import observe
from remix_kernels._routed import Call, Needs, Strategy

Arguments = dict[str, Any]
cdiv = triton.cdiv


def size(tensor: Tensor) -> int:
    """Bytes of an element."""
    return tensor.element_size()


def dense_shrink(a: Arguments) -> int:
    """x once a column block, A once a row block; H for every selection."""
    T, K, R, M = a["T"], a["K_IN"], a["R"], a["num_selections"]
    columns, rows = cdiv(R, a["BLOCK_R"]), cdiv(T, a["BLOCK_M"])
    loads = size(a["x_ptr"]) * T * K * columns + size(a["a_ptr"]) * R * K * rows
    loads += size(a["weights_ptr"]) * M * T * a["TOP_K"] * columns * a["HAS_WEIGHTS"]
    return loads + size(a["h_ptr"]) * M * T * R + size(a["s_ptr"]) * T * R * a["KEEP_S"]


def dense_expand(a: Arguments) -> int:
    """x and H once a column block, W and B once a row block; base and y once."""
    P, K, N, R = a["P"], a["K_IN"], a["N_OUT"], a["R"]
    columns, rows = cdiv(N, a["BLOCK_N"]), cdiv(P, a["BLOCK_M"])
    loads = size(a["h_ptr"]) * P * R * columns + size(a["b_ptr"]) * R * N * rows
    if a["HAS_FROZEN"]:
        loads += size(a["x_ptr"]) * P * K * columns + size(a["w_ptr"]) * N * K * rows
    loads += size(a["bias_ptr"]) * N * rows * a["HAS_BIAS"]
    return loads + size(a["base_ptr"]) * P * N * a["HAS_BASE"] + size(a["y_ptr"]) * P * N


def dense_dh(a: Arguments) -> int:
    """dy once a column block, B once a row block and selection."""
    T, N, R, M = a["T"], a["N_OUT"], a["R"], a["num_selections"]
    columns, rows = cdiv(R, a["BLOCK_R"]), cdiv(T, a["BLOCK_M"])
    loads = size(a["dy_ptr"]) * M * T * N * columns + size(a["b_ptr"]) * R * N * rows * M
    loads += size(a["weights_ptr"]) * M * T * a["TOP_K"] * columns * a["HAS_WEIGHTS"]
    return loads + size(a["ds_ptr"]) * T * R + size(a["dh_ptr"]) * M * T * R * a["KEEP_DH"]


def dense_gram(a: Arguments) -> int:
    """u once a column block of v, v once a row block of u; a result a plane."""
    P, R, D = a["P"], a["R"], a["D"]
    loads = size(a["u_ptr"]) * P * R * cdiv(D, a["BLOCK_N"])
    loads += size(a["v_ptr"]) * P * D * cdiv(R, a["BLOCK_R"])
    return loads + size(a["g_ptr"]) * cdiv(P, a["plane_rows"]) * R * D


def one_pass(a: Arguments) -> int:
    """dy once, H once a chunk of columns, B once a row block; both partial sums."""
    P, N, R = a["P"], a["N_OUT"], a["R"]
    blocks, chunks = cdiv(P, a["BLOCK_M"]), cdiv(N, a["chunk"])
    loads = size(a["dy_ptr"]) * P * N + size(a["h_ptr"]) * chunks * P * R
    loads += size(a["b_ptr"]) * blocks * R * N
    return loads + 4 * (chunks * P * R + blocks * R * N)


def one_pass_ds(a: Arguments) -> int:
    """Every part of dH once, dS once."""
    P, R = a["P"], a["R"]
    loads = 4 * a["num_parts"] * P * R
    loads += size(a["weights_ptr"]) * P * a["TOP_K"] * a["HAS_WEIGHTS"]
    return loads + size(a["ds_ptr"]) * P * R + 4 * P * R * a["KEEP_DH"]


def dense_sum(a: Arguments) -> int:
    """Every plane once, the result once."""
    return a["SIZE"] * (4 * a["num_planes"] + size(a["g_ptr"]))


def dense_dweights(a: Arguments) -> int:
    """The chosen experts' dH and S once."""
    pairs = a["P"] * a["TOP_K"]
    return pairs * a["RANK"] * (size(a["dh_ptr"]) + size(a["s_ptr"])) + pairs * size(
        a["dweights_ptr"]
    )


def grouped_shrink(a: Arguments) -> int:
    """x once a pair and column block, an expert's A once a tile of its pairs."""
    pairs, K, r = a["h_ptr"].shape[0], a["K_IN"], a["RANK"]
    loads = size(a["x_ptr"]) * pairs * K * cdiv(r, a["BLOCK_R"])
    loads += size(a["a_ptr"]) * r * K * tiles(a)
    loads += size(a["weights_ptr"]) * pairs * a["HAS_WEIGHTS"] + 4 * pairs * r * a["DOT_S"]
    stores = size(a["h_ptr"]) * pairs * r + 4 * pairs * r * a["KEEP_S"]
    return loads + stores + size(a["dot_ptr"]) * pairs * a["DOT_S"]


def grouped_expand(a: Arguments) -> int:
    """One slot: H once a program, an expert's B once a tile; y read and written.

    A program keeps H for all its columns of y, where it is one block wide.
    """
    P, N, r = a["y_ptr"].shape[0], a["N_OUT"], a["RANK"]
    columns = a["BLOCK_N"] * (a["COLUMN_BLOCKS"] if r <= a["BLOCK_R"] else 1)
    loads = size(a["h_ptr"]) * P * r * cdiv(N, columns)
    loads += size(a["b_ptr"]) * r * N * tiles(a)
    return loads + size(a["base_ptr"]) * P * N * a["HAS_BASE"] + size(a["y_ptr"]) * P * N


def grouped_gram(a: Arguments) -> int:
    """u once a column block, v once a pair and row block; a result a chunk."""
    pairs, r, D = a["u_ptr"].shape[0], a["RANK"], a["D"]
    loads = size(a["u_ptr"]) * pairs * r * cdiv(D, a["BLOCK_N"])
    loads += size(a["v_ptr"]) * pairs * D * cdiv(r, a["BLOCK_R"])
    return loads + 4 * tiles(a) * r * D


def grouped_sum(a: Arguments) -> int:
    """Every chunk once, the result once."""
    return a["SIZE"] * (4 * tiles(a) + size(a["g_ptr"]) * a["g_ptr"].shape[0])


def gather_shrink(a: Arguments) -> int:
    """The chosen A once; x once a pair and rank block."""
    pairs, K, r = a["h_ptr"].shape[0] * a["TOP_K"], a["K_IN"], a["RANK"]
    blocks = cdiv(r, a["BLOCK_R"])
    loads = size(a["x_ptr"]) * pairs * K * blocks + size(a["a_ptr"]) * pairs * r * K
    return loads + size(a["weights_ptr"]) * pairs * blocks * a["HAS_WEIGHTS"] + 4 * pairs * r


def gather_expand(a: Arguments) -> int:
    """The chosen B once; h once a column block."""
    P, N, r = a["y_ptr"].shape[0], a["N_OUT"], a["RANK"]
    loads = 4 * P * a["TOP_K"] * r * cdiv(N, a["BLOCK_N"])
    loads += size(a["b_ptr"]) * P * a["TOP_K"] * r * N
    return loads + size(a["base_ptr"]) * P * N * a["HAS_BASE"] + size(a["y_ptr"]) * P * N


def sample(a: Arguments) -> int:
    """The logits once (the draws are integers)."""
    return size(a["logits_ptr"]) * a["T"] * a["N_EXPERTS"]


def log_prob(a: Arguments) -> int:
    """The logits once, a number a row."""
    return sample(a) + 4 * a["T"]


def log_prob_grad(a: Arguments) -> int:
    """The logits and their gradient once, a number a row."""
    return log_prob(a) + size(a["dlogits_ptr"]) * a["T"] * a["N_EXPERTS"]


def gathered(a: Arguments) -> int:
    """The logits of the drawn experts, read again."""
    return size(a["logits_ptr"]) * a["T"] * a["TOP_K"]


FORMULAS: dict[str, Callable[[Arguments], int]] = {
    "_dense_fwd_shrink_kernel": dense_shrink,
    "_dense_fwd_expand_kernel": dense_expand,
    "_dense_bwd_dh_kernel": dense_dh,
    "_dense_bwd_gram_kernel": dense_gram,
    "_dense_bwd_sum_kernel": dense_sum,
    "_one_pass_kernel": one_pass,
    "_one_pass_ds_kernel": one_pass_ds,
    "_dense_bwd_dweights_kernel": dense_dweights,
    "_grouped_sort_count_kernel": lambda a: 0,
    "_grouped_sort_scatter_kernel": lambda a: 0,
    "_grouped_shrink_kernel": grouped_shrink,
    "_grouped_expand_kernel": grouped_expand,
    "_grouped_bwd_gram_kernel": grouped_gram,
    "_grouped_bwd_sum_kernel": grouped_sum,
    "_gather_fwd_shrink_kernel": gather_shrink,
    "_gather_fwd_expand_kernel": gather_expand,
    "_sample_top_k_fwd_kernel": sample,
    "_log_prob_fwd_kernel": log_prob,
    "_log_prob_bwd_kernel": log_prob_grad,
    "_unordered_log_prob_fwd_kernel": lambda a: log_prob(a) + gathered(a),
    "_unordered_log_prob_bwd_kernel": lambda a: log_prob_grad(a) + gathered(a),
}


def tiles(a: Arguments) -> int:
    """Tiles that have pairs. Uniform routing is assumed on meta tensors, which hold no counts."""
    ends = a["ends_ptr"]
    if ends.device.type != "meta":
        return int(ends.reshape(-1)[-1])
    n = ends.shape[-1]
    if "slot" in a:
        return n * cdiv(a["y_ptr"].shape[0], n * a["BLOCK_M"])
    if "planes_ptr" in a:  # made for one chunk more an expert than pairs can fill
        return n * cdiv(max(a["planes_ptr"].shape[0] - n, 1), n)
    return n * cdiv(a["order_ptr"].shape[0], n * a.get("CHUNK", a.get("BLOCK_M")))


def passes(
    strategy: Strategy, call: Call, dy: Tensor, backward: bool = True
) -> dict[str, tuple[int, int]]:
    """(bytes by formula, launches) of the adapters' kernels, forward and backward."""
    result = {}
    seen: list[int] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Arguments) -> bool:
        seen.append(FORMULAS[kernel.fn.__name__](arguments))
        return False

    with observe(note), torch.no_grad():
        kept = strategy.prepare(call, False)
        strategy.forward(call, kept)
        result["forward"] = (sum(seen), len(seen))
        if backward:
            seen.clear()
            weight = call.x.new_empty(dy.shape[1], call.x.shape[1])  # dx begins as the frozen one
            call = call._replace(weight=weight, base=None)
            strategy.backward(call, kept, dy, Needs(True, True, True, False))
            result["backward"] = (sum(seen), len(seen))
    return result


def floors(call: Call, dy: Tensor) -> dict[str, int]:
    """Each input once, each output once; y and dx hold the frozen part: read and written."""
    x, A, B = call.x, call.lora_A, call.lora_B
    weights = size(A) * A.numel() + size(B) * B.numel()
    wide = size(x) * (x.numel() + 2 * dy.numel())
    return {
        "forward": wide + weights,
        "backward": size(x) * (3 * x.numel() + dy.numel()) + 2 * weights,
    }


def plans(name: str, call: Call, dy: Tensor) -> dict[str, int]:
    """What the strategy has to move if every operand of a kernel is read once (a slot)."""
    (T, d), (n, o, r), k = call.x.shape, call.lora_B.shape, call.top_k_index.shape[1]
    weights, ranks = n * r * (d + o), T * n * r
    if name == "dense":
        forward = T * d + weights + 2 * ranks + 2 * T * o
        readings = 1 if n * r <= triton_one_pass.MOST_COLUMNS else 2  # of dy
        backward = readings * T * o + 3 * T * d + 4 * ranks + 2 * weights
    elif name == "grouped":
        ranks = T * k * r
        forward = k * T * d + weights + 2 * ranks + 2 * k * T * o
        backward = 2 * k * T * o + 3 * k * T * d + 4 * ranks + 2 * weights
    else:
        forward, backward = T * d + T * k * r * (d + o) + 2 * T * o, 0
    return {"forward": size(call.x) * forward, "backward": size(call.x) * backward}


SHAPES = [  # Llama-3-8B: rows, in, out, n, k, r
    (16384, 4096, 14336, 8, 4, 8),
    (16384, 14336, 4096, 8, 4, 8),
    (16384, 4096, 14336, 4, 2, 8),
    (16384, 4096, 14336, 32, 2, 16),
    (16384, 4096, 14336, 64, 2, 64),
    (1, 4096, 14336, 8, 4, 8),
]


STRATEGIES = {
    "dense": triton_dense.DENSE,
    "grouped": triton_grouped.GROUPED,
    "gather": triton_gather.GATHER,
}


def table() -> Iterator[dict[str, str]]:
    """A row for every pass that makes sense at a shape, in bf16."""
    for T, d, o, n, k, r in SHAPES:
        half = {"dtype": torch.bfloat16, "device": "meta"}
        index = torch.empty(T, k, dtype=torch.int32, device="meta")
        A, B = torch.empty(n, r, d, **half), torch.empty(n, r, o, **half).transpose(1, 2)
        base, dy = torch.empty(T, o, **half), torch.empty(T, o, **half)
        call = Call(torch.empty(T, d, **half), None, None, base, A, B, index, 0.5)
        floor = floors(call, dy)
        for name, strategy in STRATEGIES.items():
            if (name == "gather") != (T <= 64) or (name == "dense" and n * r > 1024):
                continue
            plan = plans(name, call, dy)
            for which, (moved, launches) in passes(strategy, call, dy, name != "gather").items():
                yield {
                    "shape": f"T{T} {d} to {o} n{n} k{k} r{r}",
                    "strategy": name,
                    "pass": which,
                    "mib": f"{moved / 2**20:.1f}",
                    "over_plan": f"{moved / plan[which]:.2f}",
                    "over_floor": f"{moved / floor[which]:.2f}",
                    "launches": str(launches),
                }


def main() -> None:
    """Print the table, with the configurations of sm_90, and write it to results/traffic.csv."""
    _configs.arch = lambda device: "sm_90"
    rows = list(table())
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    replace_rows("traffic", rows)


if __name__ == "__main__":
    main()

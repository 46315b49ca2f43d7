"""Where the time of a SmolLM2-135M training step and of a generated token goes, kind by kind.

The step and the generation of bench_train_step, under torch's profiler. Every operator's own time
goes to one kind, by the range it runs in and the shapes it has:

    base GEMM        the frozen linears, forward and backward
    attention        scaled dot products
    lm_head, loss    whatever has the vocabulary among its sizes
    rest of model    norms, activations, rotary embeddings, sums
    LoRA             plain LoRA's matrix products
    shrink, expand   matrix products with A, with B; forward and backward
    router           logits, and the product that makes the router's gradient
    sampling         noise and top k
    log-prob         its gradient, and the advantages' way to it
    mask, scale      what else the routed op does
    our Python       our own code between operators, autograd nodes included
    other Python     what is left of the wall clock: transformers and torch

The profiler makes every operator a few microseconds slower, which shows as time of what called it.
That is measured first, on an operator that does nothing, and taken off. `ours, not a GEMM` sums the
four before the last.

    python -m benchmarks.bench_profile [--parts step generate] [--no-save]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bench_train_step import (
    BATCH,
    LENGTH,
    NEW_TOKENS,
    K,
    N,
    R,
    batch_of,
    generation,
    lora_step,
    pair,
    remix_step,
)
from benchmarks.common import prepare_cpu, write_rows
from remix_model.layer import Pool
from remix_model.site import RoutingSite
from remix_model.state import RoutingState

GEMMS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mv", "aten::addmv_"}
OURS_NOT_GEMM = ("sampling", "log-prob", "mask, scale", "our Python")
KINDS = (
    "base GEMM",
    "attention",
    "lm_head, loss",
    "rest of model",
    "LoRA",
    "shrink",
    "expand",
    "router",
    *OURS_NOT_GEMM,
    "other Python",
)
OURS = ("remix::", "Routed", "DeliverRouterGradient", "LossTap")
RANGES: dict[tuple[type, str], str] = {
    (Pool, "linear"): "remix::layer",
    (RoutingSite, "_logits"): "remix::router",
    (RoutingSite, "_draw"): "remix::sampling",
    (RoutingState, "note"): "remix::log-prob",
    (RoutingState, "dlogits"): "remix::log-prob",
    (RoutingState, "collected"): "remix::log-prob",
}


@contextmanager
def ranges() -> Iterator[None]:
    """Inside, the parts of a routed layer show up by name in the profile."""
    kept = {key: getattr(*key) for key in RANGES}

    def named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return method(*args, **kwargs)

        return run

    for (owner, attribute), name in RANGES.items():
        setattr(owner, attribute, named(kept[owner, attribute], name))
    try:
        yield
    finally:
        for (owner, attribute), method in kept.items():
            setattr(owner, attribute, method)


@dataclass
class Op:
    """An operator or range of the profile, and what runs inside it."""

    name: str
    shapes: list[list[int]]
    end_ns: int
    own_ns: int  # without what runs inside
    parent: Op | None
    children: list[Op] = field(default_factory=list)

    def place(self) -> str | None:
        """The innermost range of ours around it, or itself."""
        op: Op | None = self
        while op is not None and not op.name.startswith(OURS):
            op = op.parent
        return None if op is None else op.name

    def within(self, prefix: str) -> Op | None:
        """The innermost op around it whose name begins so."""
        op = self.parent
        while op is not None and not op.name.startswith(prefix):
            op = op.parent
        return op

    def has(self, size: int) -> bool:
        """Whether an operand has a dimension of that size."""
        return any(size in shape for shape in self.shapes)

    def below(self) -> Iterator[Op]:
        """All that runs inside, in order."""
        for child in self.children:
            yield child
            yield from child.below()


def ops_of(profiler: profile) -> list[Op]:
    """Every op of the thread that ran the step, each with its parent.

    From the raw events: torch's own list of them takes minutes for a step's.
    """
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() != "[memory]"]
    main = Counter(e.start_thread_id() for e in events).most_common(1)[0][0]
    events = [e for e in events if e.start_thread_id() == main]
    events.sort(key=lambda e: (e.start_ns(), -e.duration_ns()))
    ops: list[Op] = []
    open_op: Op | None = None
    for event in events:
        while open_op is not None and event.start_ns() >= open_op.end_ns:
            open_op = open_op.parent
        duration = event.duration_ns()
        shapes = [shape for shape in event.shapes() if shape]
        op = Op(event.name(), shapes, event.start_ns() + duration, duration, open_op)
        if open_op is not None:
            open_op.children.append(op)
            open_op.own_ns -= duration
        ops.append(op)
        open_op = op
    return ops


def kind_of(op: Op, vocabulary: int, columns: int, rank: int = 0) -> str:
    """The kind of an operator's own time.

    Args:
        op: Of the profile.
        vocabulary: Its size.
        columns: n r, of the pool.
        rank: Of plain LoRA; 0: there is none.
    """
    place = op.place()
    if not op.name.startswith("aten::"):
        return "other Python" if place is None else "our Python"
    if place == "remix::router":
        return "router"
    if place in ("remix::sampling", "remix::log-prob"):
        return place.removeprefix("remix::")
    if place == "DeliverRouterGradientBackward":
        return "router" if op.name in GEMMS else "log-prob"
    one_row = _of_one_row(op) if place == "remix::layer" else None
    if one_row is not None:
        return one_row
    if place is not None and op.name in GEMMS:
        return _product(op, columns) if op.has(columns) else "base GEMM"
    if place is not None:
        return "mask, scale"
    if op.has(vocabulary):
        return "lm_head, loss"
    if "scaled_dot_product" in op.name:
        return "attention"
    if op.name not in GEMMS:
        return "rest of model"
    return "LoRA" if rank and op.has(rank) else "base GEMM"


def _of_one_row(op: Op) -> str | None:
    """While decoding, where no range of ours is inside the layer's; None: nothing of that.

    The frozen linear's product comes as `aten::linear`, the router's as the layer's first `mv`
    (which calls `addmv_`), an expert's as `mv` and `addmv_`.
    """
    if op.name == "aten::linear" or op.within("aten::linear") is not None:
        return "base GEMM"
    product = op if op.name == "aten::mv" else op.within("aten::mv")
    if product is not None:
        first = next((o for o in _siblings(product) if o.name == "aten::mv"), product)
        return "router" if product is first else "shrink"
    if op.name == "aten::addmv_":
        return "expand"
    return "sampling" if "topk" in op.name else None


def _siblings(op: Op) -> list[Op]:
    return [op] if op.parent is None else op.parent.children


def _product(op: Op, columns: int) -> str:
    """Shrink multiplies by A (or makes its gradient), expand by B.

    Told apart by the order in which the dense strategy calls them: forward A, B; backward dB, dH
    (both B), dA, dx (both A).
    """
    node, adds = op.within("RoutedBackward"), op.name.startswith("aten::addm")
    if node is None:
        return "expand" if adds else "shrink"
    products = [other for other in node.below() if other.name == "aten::mm" and other.has(columns)]
    return "expand" if any(op is other for other in products[:2]) else "shrink"


def profiling_cost_ns(calls: int = 3000) -> int:
    """What the profiler adds to a call of an operator, around the time that it notes for it."""
    one = torch.zeros(1)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            one.neg_()
        return time.perf_counter() - start

    costs = []
    for _ in range(5):
        plain = run()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True):
            costs.append((run() - plain) / calls)
    return max(0, int(statistics.median(costs) * 1e9))


def times_of(
    run: Callable[[], None], vocabulary: int, columns: int, rank: int = 0, cost_ns: int = 0
) -> dict[str, float]:
    """Seconds by kind of one call, `cost_ns` less for every operator."""
    run()
    with ranges(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    found: dict[str, float] = defaultdict(float)
    ops = ops_of(profiler)
    for op in ops:
        own = max(0, op.own_ns - cost_ns * len(op.children))
        found[kind_of(op, vocabulary, columns, rank)] += own / 1e9
    found["other Python"] += max(0.0, wall - cost_ns * len(ops) / 1e9 - sum(found.values()))
    return dict(found)


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["step", "generate"])
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    lora, remix = pair()
    vocabulary = lora.config.vocab_size
    batch = batch_of(BATCH, 0.5)
    runs: dict[str, dict[str, tuple[Callable[[], None], int]]] = {
        "step": {
            "lora_kr": (lora_step(lora, batch), 1),
            "remix_M4": (remix_step(remix, batch, 4), 4),
        },
        "generate": {
            "lora_kr": (generation(lora), NEW_TOKENS),
            "remix": (generation(remix), NEW_TOKENS),
        },
    }
    cost_ns = profiling_cost_ns()
    print(f"the profiler adds {cost_ns / 1e3:.1f} us to an operator, which is taken off")
    rows: list[dict[str, object]] = []
    for part in args.parts:
        for variant, (run, per) in runs[part].items():
            rank = K * R if variant == "lora_kr" else 0
            found = times_of(run, vocabulary, N * R, rank, cost_ns)
            total = sum(found.values())
            ours = sum(found.get(kind, 0.0) for kind in OURS_NOT_GEMM)
            print(f"\n{part} {variant}: {total:.3f} s")
            for kind in KINDS:
                seconds = found.get(kind, 0.0)
                rows.append(
                    {
                        "part": f"{part} {BATCH}x{LENGTH}" if part == "step" else part,
                        "variant": variant,
                        "per": per,
                        "kind": kind,
                        "ms": f"{seconds / per * 1e3:.3f}",
                        "share": f"{seconds / total:.4f}",
                    }
                )
                print(f"  {kind:15s} {seconds / per * 1e3:9.3f} ms  {seconds / total:6.1%}")
            print(f"  ours, not a GEMM: {ours / total:.1%}")
    if not args.no_save:
        print(f"\nwritten to {write_rows('profile', rows)}")


if __name__ == "__main__":
    main()

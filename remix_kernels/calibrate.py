"""Measure what work costs on this machine, for the cost model: `remix bench --calibrate`.

Every strategy is timed beside the frozen linear, in turn, at shapes that differ in one size each.
What it takes over the frozen linear is linear in the model's constants (`strategy_work` counts the
units), so the constants are a least-squares fit with none below zero. A forward pass alone, which
is how decoding runs, counts as a third of both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from remix_kernels._costs import Costs
from remix_kernels._dispatch import strategy_costs_s, strategy_work
from remix_kernels.ops import routed_linear

# (rows, in, out, n, k, r): training shapes, then decoding ones.
TRAINING = (
    (1024, 576, 1536, 8, 1, 8),
    (1024, 576, 1536, 8, 4, 8),
    (1024, 576, 1536, 32, 2, 16),
    (1024, 576, 1536, 64, 1, 16),
    (1024, 1536, 576, 64, 4, 16),
    (512, 576, 1536, 64, 2, 64),
    (256, 2048, 2048, 16, 2, 16),
    (256, 2048, 2048, 64, 1, 64),
    (128, 576, 1536, 8, 2, 8),
    (4096, 576, 1536, 32, 1, 16),
)
DECODING = (
    (1, 576, 1536, 8, 4, 8),
    (1, 576, 1536, 64, 2, 16),
    (1, 2048, 2048, 64, 2, 64),
    (4, 576, 1536, 8, 2, 8),
    (4, 2048, 2048, 64, 2, 16),
    (16, 576, 1536, 32, 2, 16),
    (64, 576, 1536, 8, 4, 8),
)
GATHER_ROWS = 16  # of shapes at which gather is timed: above, it only takes long
Shape = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Measured:
    """Seconds of one strategy at one shape."""

    shape: Shape
    backward: bool
    strategy: str
    frozen_s: float
    over_s: float  # above the frozen linear


class Layer:
    """Random tensors of a shape, and its passes by any strategy."""

    def __init__(self, shape: Shape, backward: bool, seed: int = 0) -> None:
        """Draw them; a row's experts are distinct, all equally likely."""
        rows, d, o, n, k, r = shape
        generator = torch.Generator().manual_seed(seed)

        def signed(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.backward = backward
        self.x = signed(rows, d).requires_grad_(backward)
        self.weight = signed(o, d).mul_(d**-0.5)
        self.lora_A = signed(n, r, d).mul_(d**-0.5).requires_grad_()
        self.lora_B = signed(n, r, o).transpose(1, 2).requires_grad_()
        self.index = torch.rand(rows, n, generator=generator).argsort(1)[:, :k]
        self.dy = signed(rows, o)

    def run(self, strategy: str | None) -> None:
        """The passes; None: the frozen linear alone."""
        with torch.set_grad_enabled(self.backward):
            if strategy is None:
                y = torch.nn.functional.linear(self.x, self.weight)
            else:
                pool = (self.lora_A, self.lora_B, self.index)
                y = routed_linear(
                    self.x, self.weight, None, *pool, 0.5, strategy=strategy, check=False
                )
        if self.backward:
            y.backward(self.dy)
            self.x.grad = self.lora_A.grad = self.lora_B.grad = None


def measure(
    seconds: float = 2.0,
    training: Sequence[Shape] = TRAINING,
    decoding: Sequence[Shape] = DECODING,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Measured]:
    """Time every strategy at every shape, in turn with the frozen linear.

    Args:
        seconds: For each shape; at least five rounds are run.
        training: Shapes of a forward and backward pass, (rows, in, out, n, k, r).
        decoding: Shapes of a forward pass.
        progress: Told what is measured.

    Yields:
        A measurement for each shape and strategy: medians over rounds of the time above that of
        the frozen linear in the same round.
    """
    for shape, backward in [(s, True) for s in training] + [(s, False) for s in decoding]:
        progress("T={} {} -> {} n={} k={} r={}".format(*shape))
        layer = Layer(shape, backward)
        names: list[str | None] = [None, "dense", "grouped"]
        if not backward and shape[0] <= GATHER_ROWS:
            names.append("gather")
        times: dict[str | None, list[float]] = {name: [] for name in names}
        began = time.perf_counter()
        while len(times[None]) < 6 or time.perf_counter() - began < seconds:
            for name in names:
                start = time.perf_counter()
                layer.run(name)
                times[name].append(time.perf_counter() - start)
        frozen = times[None][1:]  # the first round warms up
        for name in names[1:]:
            over = [a - b for a, b in zip(times[name][1:], frozen, strict=True)]
            yield Measured(
                shape, backward, str(name), statistics.median(frozen), statistics.median(over)
            )


def fit(measured: Sequence[Measured]) -> Costs:
    """The constants that explain the measurements, each weighted by its whole time.

    Non-negative least squares, by coordinate descent: six unknowns.
    """
    rows, wanted = [], []
    for m in measured:
        weight = 1.0 / max(m.frozen_s + m.over_s, 1e-9)
        work = astuple(strategy_work(*m.shape, itemsize=4)[m.strategy])
        share = 1.0 if m.backward else 1.0 / 3.0
        rows.append([units * share * weight for units in work])
        wanted.append(m.over_s * weight)
    a, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    sizes = a.norm(dim=0)
    sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    gram, right = (a / sizes).T @ (a / sizes), (a / sizes).T @ b
    found = torch.zeros_like(right)
    for _ in range(20000):
        before = found.clone()
        for i in range(len(found)):
            if gram[i, i] > 0:
                slope = right[i] - gram[i] @ found
                found[i] = (found[i] + slope / gram[i, i]).clamp_min(0.0)
        if float((found - before).abs().max()) <= 1e-12 * float(found.abs().max()):
            break
    return Costs(*(found / sizes).tolist())


def regret(measured: Sequence[Measured], constants: Costs) -> list[tuple[Measured, str, float]]:
    """For each shape: (what the model takes, the fastest, the first's time over the second's).

    A strategy that was not timed there, because it takes too long, counts as infinitely slow.
    """
    shapes: dict[tuple[Shape, bool], dict[str, Measured]] = {}
    for m in measured:
        shapes.setdefault((m.shape, m.backward), {})[m.strategy] = m
    found = []
    for (shape, _), by_name in shapes.items():
        modelled = strategy_costs_s(*shape, itemsize=4, constants=constants)
        taken = min(modelled, key=modelled.__getitem__)
        best = min(by_name, key=lambda name: by_name[name].over_s)
        if taken not in by_name:
            by_name[taken] = replace(by_name[best], strategy=taken, over_s=float("inf"))
        whole = {name: m.frozen_s + m.over_s for name, m in by_name.items()}
        found.append((by_name[taken], best, whole[taken] / whole[best]))
    return found

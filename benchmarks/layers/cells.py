"""The shapes at which one adapted linear is measured.

A cell is a frozen linear with a pool beside it and the rows that it is given. `DEFAULT` varies one
size at a time around two bases, so that each column of the results is a curve; `every_cell` is the
full grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

# [in, out].
FEED_FORWARD = {
    "SmolLM2-135M up": (576, 1536),
    "SmolLM2-135M down": (1536, 576),
    "Llama-3.2-1B up": (2048, 8192),
    "Llama-3.2-1B down": (8192, 2048),
    "Llama-3-8B up": (4096, 14336),
    "Llama-3-8B down": (14336, 4096),
}
SHAPES = {**FEED_FORWARD, "Llama-3.2-1B q": (2048, 2048)}
TOKENS = (1, 32, 1024, 4096)
GPU_TOKENS = (*TOKENS, 16384, 65536)
POOLS = ((8, 8), (8, 16), (16, 16), (32, 16), (64, 64))  # (n, r)
TOP_K = (1, 2, 4, 8)
SELECTIONS = (1, 2, 8, 32)
ROUTINGS = ("uniform", "zipf", "hot", "sequence")


@dataclass(frozen=True)
class Cell:
    """One shape. With M > 1 selections, all read the same T rows of x, and y has M T rows."""

    shape: str  # of SHAPES
    tokens: int  # T
    n: int
    r: int
    k: int
    m: int = 1
    routing: str = "uniform"
    backward: bool = True

    @property
    def in_features(self) -> int:
        """Of the frozen linear."""
        return SHAPES[self.shape][0]

    @property
    def out_features(self) -> int:
        """Of the frozen linear."""
        return SHAPES[self.shape][1]

    @property
    def rows(self) -> int:
        """M T."""
        return self.m * self.tokens

    @property
    def flops(self) -> float:
        """Of the frozen linear in the measured passes."""
        products = 2 if self.backward else 1
        return 2.0 * products * self.rows * self.in_features * self.out_features

    def __str__(self) -> str:
        """Its name: of a row, and of a test."""
        name = self.shape.replace(" ", "-")
        size = f"T{self.tokens}-n{self.n}-r{self.r}-k{self.k}-M{self.m}"
        return f"{name}-{size}-{self.routing}-{'train' if self.backward else 'infer'}"


SMALL = Cell("SmolLM2-135M up", 1024, n=8, r=8, k=2)
LARGE = Cell("SmolLM2-135M up", 1024, n=32, r=16, k=2)  # where computing all experts is dear


def _default() -> Iterator[Cell]:
    for tokens in (1, 32, 256, 1024, 4096):
        yield replace(SMALL, tokens=tokens)
    for tokens in (1, 32, 1024):
        yield replace(SMALL, tokens=tokens, backward=False)
    for k in TOP_K:
        yield replace(SMALL, k=k)
        yield replace(LARGE, k=k)
    for n, r in POOLS:
        yield replace(SMALL, n=n, r=r)
    for n in (4, 16, 32, 64):
        yield replace(SMALL, n=n)
    for m in SELECTIONS:
        yield replace(SMALL, tokens=128, m=m)
    for base, routing in itertools.product((SMALL, LARGE), ROUTINGS):
        yield replace(base, routing=routing)
    yield replace(SMALL, shape="SmolLM2-135M down")
    yield replace(SMALL, shape="SmolLM2-135M down", k=4)
    for shape, tokens in (("Llama-3.2-1B", 256), ("Llama-3-8B", 64)):
        for side in ("up", "down"):
            yield Cell(f"{shape} {side}", tokens, n=8, r=8, k=4)
            yield Cell(f"{shape} {side}", 1, n=8, r=8, k=4, backward=False)
    yield Cell("Llama-3.2-1B up", 512, n=32, r=16, k=2)


DEFAULT = tuple(dict.fromkeys(_default()))


def every_cell(gpu: bool = False) -> list[Cell]:
    """The full grid, the smallest cells first; k never above n."""
    tokens = GPU_TOKENS if gpu else TOKENS
    sizes = itertools.product(
        FEED_FORWARD, tokens, POOLS, TOP_K, SELECTIONS, ROUTINGS, (False, True)
    )
    cells = [
        Cell(shape, tokens, n, r, k, m, routing, backward)
        for shape, tokens, (n, r), k, m, routing, backward in sizes
        if not (routing == "sequence" and tokens < 8)  # a row is a sequence: uniform
    ]
    return sorted(cells, key=lambda cell: cell.flops)

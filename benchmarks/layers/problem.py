"""The tensors of a cell, and whether a variant computes the right thing on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.common import relative_error
from benchmarks.layers.cells import Cell
from remix_kernels import routed_linear, sample_top_k
from remix_model.layer import empty_b

SCALE = 0.5  # of every adapter
SEQUENCES = 8  # under "sequence", the rows of a cell are so many sequences
CHECKED_ROWS = 128


class Problem:
    """Signed random data for a cell."""

    def __init__(
        self, cell: Cell, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        """Draw the data."""
        generator = torch.Generator(device).manual_seed(seed)

        def signed(*size: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device)
            return drawn.mul_(scale).to(dtype)

        n, r, d, o = cell.n, cell.r, cell.in_features, cell.out_features
        self.cell = cell
        self.x = signed(cell.tokens, d).requires_grad_(cell.backward)
        self.linear = nn.Linear(d, o, bias=False, device="meta")
        self.linear.weight = nn.Parameter(signed(o, d, scale=d**-0.5), requires_grad=False)
        self.lora_A = signed(n, r, d, scale=d**-0.5).requires_grad_()
        lora_b = empty_b(n, o, r, device=device, dtype=dtype)  # with the layers' strides
        self.lora_B = lora_b.copy_(signed(n, o, r)).requires_grad_()
        self.index = routing_of(cell, device, seed)
        self.dy = signed(cell.rows, o)
        self._modules: dict[int, nn.Module] = {}

    @property
    def flat_index(self) -> Tensor:
        """[M T, k]."""
        return self.index.reshape(-1, self.cell.k)

    @property
    def folded_x(self) -> Tensor:
        """[M T, in]: what those who know no selections need."""
        return self.x if self.cell.m == 1 else self.x.repeat(self.cell.m, 1)

    def lora(self, rank: int) -> nn.Module:
        """PEFT's LoRA of that rank beside the frozen linear."""
        if rank not in self._modules:
            holder = nn.Sequential(self.linear)
            config = LoraConfig(
                r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False
            )
            module = inject_adapter_in_model(config, holder)
            self._modules[rank] = module.to(self.x.device, self.x.dtype)
        return self._modules[rank]

    def remix(self, **choice: Any) -> Tensor:
        """Our op as the layers call it, [M T, out]."""
        y = routed_linear(
            self.x,
            self.linear.weight,
            None,
            self.lora_A,
            self.lora_B,
            self.index if self.cell.m > 1 else self.index[0],
            SCALE,
            check=False,
            **choice,
        )
        return y.view(self.cell.rows, -1)

    def run(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """The cell's passes; gradients are dropped, as an optimizer would."""

        def infer() -> None:
            with torch.no_grad():
                forward()

        def train() -> None:
            forward().backward(self.dy)
            self.x.grad = self.lora_A.grad = self.lora_B.grad = None
            for module in self._modules.values():
                module.zero_grad(set_to_none=True)

        return train if self.cell.backward else infer

    @cached_property
    def truth(self) -> list[Tensor]:
        """In fp64, of the first rows: y; of all rows if they are few, also dx, dA, dB."""
        index, whole = self.flat_index, self.cell.rows <= CHECKED_ROWS
        rows = slice(0, min(CHECKED_ROWS, self.cell.rows))
        x, a, b = (t.detach().double() for t in (self.x, self.lora_A, self.lora_B))
        folded = x.repeat(self.cell.m, 1)[rows]
        y = folded @ self.linear.weight.double().T
        chosen = torch.zeros(y.shape[0], self.cell.n, dtype=y.dtype, device=y.device)
        chosen.scatter_(1, index[rows].long(), SCALE)
        hidden = torch.einsum("td,nrd->tnr", folded, a)
        y = y + torch.einsum("tn,tnr,nor->to", chosen, hidden, b)
        if not (whole and self.cell.backward):
            return [y]
        dy = self.dy.double()
        dhidden = torch.einsum("tn,to,nor->tnr", chosen, dy, b)
        dx = dy @ self.linear.weight.double() + torch.einsum("tnr,nrd->td", dhidden, a)
        return [
            y,
            dx.view(self.cell.m, *self.x.shape).sum(0),
            torch.einsum("tnr,td->nrd", dhidden, folded),
            torch.einsum("tn,to,tnr->nor", chosen, dy, hidden),
        ]

    def check(self, name: str, forward: Callable[[], Tensor]) -> None:
        """Raise unless what a variant computes is the truth, to the rounding of its dtype.

        y of the first 128 rows; where there are no more, the gradients too. `peers.runnable` checks
        larger cells' gradients at a twin of so many rows.
        """
        truth = self.truth
        with torch.set_grad_enabled(self.cell.backward):
            y = forward()
        found = [y[: len(truth[0])]]
        if len(truth) > 1:
            found += torch.autograd.grad(y, (self.x, self.lora_A, self.lora_B), self.dy)
        limit = 256 * torch.finfo(y.dtype).eps if y.dtype == torch.float32 else 0.03
        for what, value, true in zip(("y", "dx", "dA", "dB"), found, truth, strict=False):
            error = relative_error(value, true)
            if not error <= limit:
                raise AssertionError(f"{name} at {self.cell}: {what} is off by {error:.1e}")


def routing_of(cell: Cell, device: str, seed: int) -> Tensor:
    """int32 [M, T, k].

    uniform    k of n for each row, all alike
    zipf       expert i drawn in proportion to 1 / (i + 1)
    hot        the same k experts for every row
    sequence   one choice for each of 8 runs of rows
    """
    rows = cell.rows
    logits = torch.zeros(rows, cell.n, device=device)
    if cell.routing == "zipf":
        logits = logits - torch.arange(1, cell.n + 1, device=device).log()
    elif cell.routing == "hot":
        logits[:, : cell.k] = 1e4
    drawn = sample_top_k(logits, cell.k, seed=seed)
    if cell.routing == "sequence":
        runs = torch.arange(rows, device=device) * min(SEQUENCES, rows) // rows
        drawn = drawn[runs]
    return drawn.view(cell.m, cell.tokens, cell.k)

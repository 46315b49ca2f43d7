"""The losses of M selections, as their parts come in, and the advantages that follow from them.

Losses are divided by the labels of this batch as they arrive; by how many labels there are in all
(`num_items`, over an accumulation) is only told at the end, and is a factor for the state to keep.
Returns are kept as deviations R - R_ref from those of the selection that ran first: exactly 0 where
all selections have the same loss, and small where sums of them are kept (eligibility.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from remix_model.credit import CREDITS, advantage_scale
from remix_model.errors import NonFiniteError
from remix_model.options import SamplingOptions
from remix_model.parallel import SelectionGroup
from remix_model.parts import Part


class Ledger:
    """One batch's account."""

    def __init__(self, options: SamplingOptions, group: SelectionGroup) -> None:
        """Open it; the options are `sample_routing`'s."""
        self.num_selections = options.num_selections
        self.credit = options.credit
        self.advantage_norm = options.advantage_norm
        self.group = group
        self.labels: Tensor | float | None = None  # of the un-replicated batch
        self.unit: Tensor = torch.ones(())  # what losses are divided by: labels, at least 1
        self.baseline: Tensor | None = None  # mean_m R - R_ref, [B, W], when all are known
        self.scale: Tensor | float = 1.0  # of deviations from it, [B, 1] or a number
        self._losses: dict[int, Tensor] = {}  # [B, W] by selection; at first this rank's
        self._error: NonFiniteError | None = None  # which all ranks are to raise together

    def __len__(self) -> int:
        """How many selections have losses."""
        return len(self._losses)

    def enter(self, part: Part, token_losses: Tensor, mask: Tensor | None, rows: int) -> Tensor:
        """Note a part's losses, unless they are known from an earlier run.

        Args:
            part: Which.
            token_losses: As in `RoutingState.add`.
            mask: As in `RoutingState.add`.
            rows: c * B.

        Returns:
            [c, B, W], divided by the unit, in the graph.

        Raises:
            ValueError: A shape does not fit the folded batch or the credit.
        """
        self._check(token_losses, mask, rows, part.count)
        counted = token_losses if mask is None else token_losses.masked_fill(mask == 0, 0.0)
        if counted.dtype != torch.float64:
            counted = counted.float()
        if self.labels is None:
            count = token_losses.numel() if mask is None else mask.count_nonzero()
            self.labels = count / part.count
            self.unit = torch.as_tensor(self.labels).clamp(min=1)
        losses = (counted / self.unit).view(part.count, rows // part.count, -1)
        if not part.rerun:
            self._losses.update(enumerate(losses.detach(), start=part.first))
        return losses

    def check_finite(self, part: Part, losses: Tensor, router_inputs: Mapping[str, Tensor]) -> None:
        """Raise NonFiniteError, naming where it began, unless all losses are numbers.

        Where other ranks wait for these losses, it is raised when they are exchanged.

        Args:
            part: Which.
            losses: [c, B, W].
            router_inputs: A number for every layer, in the order in which they ran: finite if what
                its router saw was.
        """
        if losses.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        totals = [losses.sum(), *router_inputs.values()]
        together = torch.stack([total.to(losses.device, torch.float32) for total in totals])
        if bool(torch.isfinite(together.sum())):
            return
        bad = (~torch.isfinite(losses).all(-1)).nonzero().tolist()
        first = next((n for n, total in router_inputs.items() if not torch.isfinite(total)), None)
        where = (
            f"the first layer whose router saw numbers that are not finite is {first}"
            if first
            else "all routers saw finite numbers, so look at the layers after the last of them"
        )
        what = "the losses are finite and the routers' logits are not"
        if bad:
            m, b = bad[0]
            loss = float(losses[m, b].sum())
            what = (
                f"the loss of input {b} under selection {part.first + m} is {loss}, and with it "
                "every advantage"
            )
        error = NonFiniteError(f"{what}; {where}")
        if self.group.size == 1:
            raise error
        self._error = self._error or error

    def spread(self, losses: Tensor) -> Tensor:
        """R - R_ref of selections [c, B, W]."""
        return CREDITS[self.credit](losses - next(iter(self._losses.values())))

    def sequences(self) -> Tensor:
        """[M, B], the losses of whole sequences, divided by the unit."""
        return self._all().sum(-1)

    def advantages(self, part: Part) -> Tensor:
        """[c B, W] of a part, divided by the unit; notes the baseline and the scale."""
        losses = self._all()
        spread = self.spread(losses)
        self.baseline = spread.mean(0)
        norm = advantage_scale(losses.sum(-1), self.advantage_norm)
        self.scale = norm * self.group.size / max(self.num_selections - 1, 1)
        own = spread[part.first : part.first + part.count] - self.baseline
        return (own * self.scale).flatten(0, 1)

    def _all(self) -> Tensor:
        if len(self._losses) < self.num_selections:
            self._losses = self.group.exchange(self._losses, self._error)
        return torch.stack([self._losses[m] for m in range(self.num_selections)])

    def _check(self, token_losses: Tensor, mask: Tensor | None, rows: int, count: int) -> None:
        if token_losses.dim() not in (1, 2) or token_losses.shape[0] != rows:
            raise ValueError(
                f"token_losses is {list(token_losses.shape)}; it must be [{rows}, T] or [{rows}]: "
                f"{count} selections of {rows // count} inputs"
            )
        if mask is not None and mask.shape != token_losses.shape:
            raise ValueError(
                f"mask is {list(mask.shape)} and token_losses {list(token_losses.shape)}; they "
                "must agree"
            )
        if token_losses.dim() == 1 and self.credit != "sequence":
            raise ValueError(
                f"token_losses is {list(token_losses.shape)}, one loss a sequence, and credit="
                f"{self.credit!r} needs one for each position, [{rows}, T or T - 1]: give those, "
                "or use credit='sequence'"
            )

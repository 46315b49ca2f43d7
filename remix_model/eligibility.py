"""The routers' gradient of selections whose graph is not kept: sums made in the forward pass.

RLOO needs only the loss of a selection and the gradient of its log-probability,

    E[m, b] = sum_t d log Q_t / d z_t (x) x_t          [n, in] for each layer and sequence

which the forward pass can make, since the router's input is detached. The loss comes afterwards,
and the baseline only after all M selections, so two sums are kept instead of every E:

    first = sum_m (R_m - R_ref) E_m      second = sum_m E_m
    gradient = sum_b (first - (mean_m R - R_ref) second) / (M - 1)

Memory does not grow with M. Where every position has a return of its own (causal credit), E is kept
for blocks of positions and takes the return of the block's first: the losses that this adds come
before the decision and have no covariance with its score, so it stays unbiased, with a variance
between the sequence's and the position's own.

Source: ReMix (arXiv 2603.10160) section 3.2 for the estimator; the sums are ours.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from remix_kernels._routed import no_autocast

CAUSAL_BLOCKS = 4  # of positions; more cost memory, see docs/estimators.md for what they buy


def block_starts(positions: int, blocks: int) -> list[int]:
    """First position of every block; blocks are as even as they can be."""
    blocks = max(1, min(blocks, positions))
    return [positions * block // blocks for block in range(blocks)]


class Eligibility:
    """The two sums of every site, for one batch of B sequences."""

    def __init__(self, batch_size: int, blocks: int) -> None:
        """Start with nothing; `blocks` is 1 where one number credits a sequence."""
        self.batch_size = batch_size
        self.blocks = blocks
        self._passing: dict[Hashable, Tensor] = {}  # [c, B, blocks, n, in]: loss not yet known
        self._first: dict[Hashable, Tensor] = {}  # [B, blocks, n, in]
        self._second: dict[Hashable, Tensor] = {}
        self._starts: dict[Hashable, list[int]] = {}

    def collect(self, site: Hashable, dlogits: Tensor, x: Tensor) -> None:
        """Add one pass of a site.

        Args:
            site: Which.
            dlogits: d log Q / d z of every decision, [c B, P, n] fp32, 0 where it does not count.
            x: The router's input, [c B, P, in].
        """
        positions = x.shape[1]
        starts = self._starts.setdefault(site, block_starts(positions, self.blocks))
        ends = [*starts[1:], positions]
        x, dlogits = x.to(dlogits.dtype), dlogits.transpose(1, 2)
        with no_autocast(x.device):  # sums over many selections: fp32, whatever the pass is in
            blocks = [
                torch.bmm(dlogits[:, :, start:end], x[:, start:end])
                for start, end in zip(starts, ends, strict=True)
            ]
        passing = torch.stack(blocks, 1).unflatten(0, (-1, self.batch_size))
        before = self._passing.get(site)
        self._passing[site] = passing if before is None else before + passing

    def absorb(self, spread: Tensor) -> None:
        """The losses of the part that was just collected are known.

        Args:
            spread: R - R_ref, [c, B, W].
        """
        for site, passing in self._passing.items():
            weighted = self._at_starts(site, spread).to(passing)[..., None, None] * passing
            for sums, part in ((self._first, weighted), (self._second, passing)):
                total = part.sum(0)
                sums[site] = sums[site].add_(total) if site in sums else total
        self._passing.clear()

    def gradient(self, site: Hashable, baseline: Tensor, scale: Tensor | float) -> Tensor | None:
        """The router's gradient of all collected selections, [n, in]; None where there are none.

        Args:
            site: Which.
            baseline: mean_m R - R_ref, [B, W].
            scale: [B, 1] or a number, of each input's advantages: 1 / (M - 1) among others.
        """
        if site not in self._first:
            return None
        first = self._first[site]
        baseline = self._at_starts(site, baseline).to(first)[..., None, None]
        if isinstance(scale, Tensor):
            scale = scale.to(first).view(-1, 1, 1, 1)
        return ((first - baseline * self._second[site]) * scale).sum((0, 1))

    def _at_starts(self, site: Hashable, returns: Tensor) -> Tensor:
        """[..., W] -> [..., blocks]; positions after the last loss have a return of 0."""
        width = returns.shape[-1]
        inside = [start for start in self._starts[site] if start < width]
        missing = len(self._starts[site]) - len(inside)
        if width == 1:
            return returns.expand(*returns.shape[:-1], len(self._starts[site]))
        return torch.nn.functional.pad(returns[..., inside], (0, missing))

"""Variance of the routers' gradient, estimator by estimator, from the same draws.

Several batches, for each some independent groups of 32 selections, run without gradients. What the
routers read and draw is kept, and from it every estimator's gradient is made for each disjoint set
of M selections: so they differ in nothing but what is compared. `check` first holds this to the
gradient that a real backward pass delivers.

    variance = E |g - E g|^2, summed over all routers' entries; g given the batch, mean over batches

`G1`: one selection with a graph and M - 1 without. Under sequence credit that is the same gradient;
under causal credit the M - 1 answer for blocks of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import relative_error
from remix_kernels.ops import selection_log_prob_bwd
from remix_model import sample_routing, token_losses
from remix_model.credit import CREDITS, leave_one_out
from remix_model.eligibility import CAUSAL_BLOCKS, block_starts
from remix_model.site import find_sites

SIZES = (2, 4, 8, 32)
MOST = max(SIZES)
ESTIMATORS = [
    (credit, log_prob, graph)
    for credit in ("sequence", "causal")
    for log_prob in ("ordered", "unordered")
    for graph in ("all", "G1")
]


class Kept:
    """Stands among a site's records, and keeps what it reads and draws."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.passes: list[Any] = []

    def add(self, selection: Any) -> None:
        """One pass."""
        self.passes.append(selection)


def draw(model: nn.Module, batch: dict[str, Tensor], seed: int, chunk: int) -> tuple[Any, Tensor]:
    """32 selections without gradients: what every site kept, and losses [32, B, T - 1]."""
    sites = find_sites(model)
    kept = {name: Kept() for name in sites}
    losses = []
    for name, site in sites.items():
        site.records.append(kept[name])  # type: ignore[arg-type]
    try:
        with (
            sample_routing(model, MOST, selection_chunk_size=chunk, seed=seed) as routing,
            torch.no_grad(),
        ):
            for part in routing.parts(batch):
                values, mask = token_losses(model, part)
                losses.append(values.view(-1, len(batch["input_ids"]), values.shape[1]))
                routing.add(values, mask)
    finally:
        for name, site in sites.items():
            site.records.remove(kept[name])  # type: ignore[arg-type]
    return kept, torch.cat(losses)


class Group:
    """One group of selections: every estimator's gradient of any part of it."""

    def __init__(self, kept: Any, losses: Tensor, batch: dict[str, Tensor]) -> None:
        """From what `draw` returns."""
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        self.losses = losses / labelled
        m, b = losses.shape[:2]
        counted = batch["attention_mask"].bool().expand(m, *batch["attention_mask"].shape)
        self.sites = []
        for record in kept.values():
            logits = torch.cat([s.logits for s in record.passes])
            drawn = torch.cat([s.drawn for s in record.passes])
            x = torch.cat([s.x for s in record.passes])
            scores = {
                log_prob: selection_log_prob_bwd(
                    logits.flatten(0, 1),
                    drawn.flatten(0, 1),
                    counted.reshape(-1).float(),
                    unordered=log_prob == "unordered",
                ).view(m, b, *logits.shape[1:])
                for log_prob in ("ordered", "unordered")
            }
            self.sites.append((scores, x.view(m, b, *x.shape[1:])))

    def gradient(self, part: slice, credit: str, log_prob: str, graph: str) -> Tensor:
        """All routers' gradient, flat."""
        advantages = leave_one_out(CREDITS[credit](self.losses[part]))
        positions = self.sites[0][1].shape[2]
        if credit == "causal":
            advantages = nn.functional.pad(advantages, (0, 1))
            if graph == "G1":
                starts = block_starts(positions, CAUSAL_BLOCKS)
                for start, end in zip(starts, [*starts[1:], positions], strict=True):
                    advantages[1:, :, start:end] = advantages[1:, :, start : start + 1]
        pieces = []
        for scores, x in self.sites:
            weighted = scores[log_prob][part] * advantages.unsqueeze(-1)
            pieces.append((weighted.flatten(0, 2).T @ x[part].flatten(0, 2)).flatten())
        return torch.cat(pieces)


def check(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The largest relative error of `Group.gradient` against delivered gradients.

    Raises:
        AssertionError: It is more than rounding; no figure would be worth anything.
    """
    kept, losses = draw(model, batch, seed=1, chunk=8)
    group, worst = Group(kept, losses, batch), 0.0
    for credit, log_prob, graph in ESTIMATORS:
        model.zero_grad(set_to_none=True)
        options: dict[str, Any] = {"credit": credit, "log_prob": log_prob}
        if graph == "G1":
            options["grad_selections"] = 1
            options["selection_chunk_size"] = 8
        with sample_routing(model, 2, seed=1, **options) as routing:
            for part in routing.parts(batch):
                routing.add(*token_losses(model, part))
            routing.loss().backward()
        delivered = torch.cat(
            [site.router_weight.grad.flatten() for site in find_sites(model).values()]  # type: ignore[union-attr]
        )
        # The first two of 32 selections are not the two of M = 2 only if draws depended on M.
        error = relative_error(group.gradient(slice(0, 2), credit, log_prob, graph), delivered)
        worst = max(worst, error)
    model.zero_grad(set_to_none=True)
    assert worst < 1e-3, f"the gradients differ by {worst}"
    return worst


def variances(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    groups: int,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[dict[str, object]]:
    """Rows of estimator, M, samples, variance, and its ratio to the paper's at equal M.

    Args:
        model: With routed layers.
        batches: What to take gradients of.
        groups: Of 32 selections for each batch, at least 2.
        chunk: Selections at once.
        progress: Told how many groups are done.
    """
    found: dict[tuple[Any, int], float] = {}
    samples: dict[int, int] = {}
    for number, batch in enumerate(batches):
        sums: dict[tuple[Any, int], tuple[Tensor, float, int]] = {}
        for done in range(groups):
            seed = 1000 + number * groups + done
            group = Group(*draw(model, batch, seed=seed, chunk=chunk), batch)
            for estimator in ESTIMATORS:
                for size in SIZES:
                    for first in range(0, MOST, size):
                        g = group.gradient(slice(first, first + size), *estimator).double()
                        total, squares, count = sums.get((estimator, size), (0.0, 0.0, 0))
                        square = squares + float(g.square().sum())
                        sums[estimator, size] = (total + g, square, count + 1)
            progress(number * groups + done + 1)
        for key, (total, squares, count) in sums.items():
            mean = total / count
            variance = (squares / count - float(mean.square().sum())) * count / (count - 1)
            found[key] = found.get(key, 0.0) + variance / len(batches)
            samples[key[1]] = count * len(batches)
    for (estimator, size), variance in found.items():
        credit, log_prob, graph = estimator
        paper = found[("sequence", "ordered", "all"), size]
        yield {
            "M": size,
            "credit": credit,
            "log_prob": log_prob,
            "graph": graph,
            "samples": samples[size],
            "variance": f"{variance:.4g}",
            "over_paper": f"{variance / paper:.4f}",
        }

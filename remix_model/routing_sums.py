"""What `record_routing` adds up on the device: sums over tokens, for many layers at once.

    taken[t, i]   1 where token t took expert i
    together      taken^T taken: how often i and j were taken by the same token; i = j: how often i
    ESS(p)        (|p|_1 / |p|_2)^2, and its sibling of order 1, exp(entropy of p / |p|_1)

A subset is an int64 with a bit for each expert. Those that were seen are kept as a sorted set of
fixed size, so that nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remix_kernels._routed import no_autocast

WEIGHT_BINS = 20  # of [0, 1]; the last one holds 1 as well
SUBSETS_KEPT = 4096  # of one layer; a layer that saw so many may have seen more
_BITS = 64
_LEAST = ("minima",)


def measure(
    logits: Tensor,
    chosen: Tensor,
    weights: Tensor | None,
    kept: Tensor | None,
    tasks: Tensor | None,
) -> dict[str, Tensor]:
    """Sums over the tokens of one pass, of L layers alike.

    Args:
        logits: [L, T, n] fp32.
        chosen: int64 [L, T, k], distinct for each token.
        weights: [L, T, k] fp32, what the chosen experts are multiplied by, up to a factor; None:
            all equal.
        kept: [T] bool, tokens that count; None: all.
        tasks: [T, tasks] fp32, one-hot; None: not told.

    Returns:
        together [L, n, n], first [L, n], tokens [L], sums and minima [L, v] of (entropy and ESS of
        the policy, then, with weights, their ESS of order 2 and of order 1), tasks [L, tasks, n],
        and, with weights, histogram [L, 2, WEIGHT_BINS] of all weights and of tokens' largest.
    """
    layers, rows, _ = logits.shape
    kept = logits.new_ones(rows, dtype=torch.bool) if kept is None else kept
    one = kept.to(logits.dtype)
    q = logits.softmax(-1)
    values = [torch.special.entr(q).sum(-1), 1.0 / q.square().sum(-1)]
    with no_autocast(logits.device):  # counts must not be rounded to bfloat16
        taken = torch.zeros_like(logits).scatter_(-1, chosen, 1.0).mul_(one.unsqueeze(-1))
        found = {"together": taken.mT @ taken, "tokens": one.sum().expand(layers)}
        if tasks is not None:
            found["tasks"] = tasks.mT @ taken
    found["first"] = _count(chosen[..., 0], one, logits.shape[-1])
    if weights is not None:
        size = weights.abs()  # a router of one's own may give any numbers
        share = size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        some = share.amax(-1) > 0  # else no expert acts: 0
        found_ess = (1.0 / share.square().sum(-1), torch.special.entr(share).sum(-1).exp())
        values += [ess.where(some, 0.0) for ess in found_ess]
        bins = (share * WEIGHT_BINS).long().clamp_(0, WEIGHT_BINS - 1)
        every = _count(bins.flatten(1), one.repeat_interleave(bins.shape[-1]), WEIGHT_BINS)
        found["histogram"] = torch.stack((every, _count(bins.amax(-1), one, WEIGHT_BINS)), 1)
    table = torch.stack(values, 1)  # [L, v, T]
    found["sums"] = table.where(kept, 0.0).sum(-1, dtype=torch.float64)
    found["minima"] = table.where(kept, math.inf).amin(-1)
    return found


def _count(index: Tensor, one: Tensor, size: int) -> Tensor:
    """How often each number below `size` stands in index [L, T], for the tokens that count."""
    counts = one.new_zeros(len(index), size)
    return counts.scatter_add_(1, index, one.expand_as(index))


def subset_ids(chosen: Tensor, kept: Tensor | None) -> Tensor:
    """The subset of each token as bits, [L, T] int64; 0 for tokens that do not count."""
    ids = torch.ones_like(chosen).bitwise_left_shift_(chosen).sum(-1)
    return ids if kept is None else ids * kept


def merge_subsets(held: Tensor, ids: Tensor) -> Tensor:
    """The union of two sets of subsets; 0 stands for none.

    Args:
        held: int64 [L, C].
        ids: int64 [L, T], with repetitions.

    Returns:
        int64 [L, C]: all of them, or C of them where there are more.
    """
    size = held.shape[1]
    found = torch.cat((held, ids), 1).sort(1).values
    new = found != 0
    new[:, 1:] &= found[:, 1:] != found[:, :-1]
    place = (new.cumsum(1) - 1).where(new, size).clamp_(max=size)  # the rest shares one column
    return found.new_zeros(len(found), size + 1).scatter_(1, place, found)[:, :size]


class LayerSums:
    """Running sums of layers alike: as many experts, as many of them active, the same device."""

    @torch.inference_mode(False)
    def __init__(self, layers: int, num_experts: int, top_k: int, device: torch.device) -> None:
        """Start empty.

        Args:
            layers: How many there are at most.
            num_experts: n.
            top_k: k.
            device: Where the sums are kept.
        """
        self.num_experts = num_experts
        self.top_k = top_k
        self.device = device
        self.slots: dict[str, int] = {}  # a layer's row in the sums, in the order of their passes
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._subsets: Tensor | None = None
        if num_experts <= _BITS:
            size = min(math.comb(num_experts, top_k), SUBSETS_KEPT)
            self._subsets = torch.zeros(layers, size, dtype=torch.int64, device=device)

    def slot(self, name: str) -> int:
        """A layer's row."""
        return self.slots.setdefault(name, len(self.slots))

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self,
        first: int,
        logits: Tensor,
        chosen: Tensor,
        weights: Tensor | None,
        kept: Tensor | None,
        tasks: Tensor | None,
    ) -> None:
        """Count one pass of the layers from row `first` on. Arguments as in `measure`."""
        for name, value in measure(logits, chosen, weights, kept, tasks).items():
            held = self._held(name, value)[first : first + len(value)]
            held.copy_(torch.minimum(held, value) if name in _LEAST else held + value)
        if self._subsets is not None:
            held = self._subsets[first : first + len(chosen)]
            held.copy_(merge_subsets(held, subset_ids(chosen, kept)))

    def _held(self, name: str, value: Tensor) -> Tensor:
        """All layers' sums of a kind; tasks may have become more."""
        held = self._sums.get(name)
        if held is None or held.shape[1:] < value.shape[1:]:
            start = math.inf if name in _LEAST else 0.0
            shape = (self._layers, *value.shape[1:])
            grown = torch.full(shape, start, dtype=torch.float64, device=self.device)
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._sums[name] = held = grown
        return held

    def read(self) -> dict[str, dict[str, Tensor]]:
        """Every layer's sums on the host, by its name. Waits for the device once for each kind."""
        found = {name: held.cpu() for name, held in self._sums.items()}
        if self._subsets is not None:
            found["subsets"] = (self._subsets != 0).sum(1).cpu()
        return {
            layer: {name: held[slot] for name, held in found.items()}
            for layer, slot in self.slots.items()
        }

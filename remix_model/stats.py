"""What the routers did: expert shares, entropy, effective sample sizes, over real tokens.

    ESS(p) = (|p|_1 / |p|_2)^2      1 for one-hot, m for uniform over m (ReMix section 2, eq. 3)

`ess` is that of the routing weights a token really gets: exactly k for ReMix, whose weights are
constant. `policy_ess` and `entropy` (nats) are those of the policy q = softmax(z), `share_ess`
that of the experts' shares over all tokens: n when they are used evenly, k when the same k experts
take everything.

Sums stay on the layer's device; `RoutingRecorder.stats` brings them to the host, and only then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_model.architecture import unwrapped
from remix_model.site import find_sites

if TYPE_CHECKING:
    from remix_model.site import Selection


class SiteRecord:
    """Running sums of one site."""

    def __init__(self, num_experts: int, recorder: RoutingRecorder) -> None:
        """Start empty."""
        self.num_experts = num_experts
        self.recorder = recorder
        self.sums: dict[str, Tensor] = {}

    def add(self, selection: Selection) -> None:
        """Count one forward pass; a sequence that is routed as one counts once."""
        state, index = selection.state, selection.drawn
        valid = self.recorder.valid if state is None else state.folded_pass().valid
        if selection.per_sequence:
            valid = None
        rows = selection.logits.reshape(-1, self.num_experts)
        chosen = index.reshape(-1, index.shape[-1]).long()
        kept = rows.new_ones(rows.shape[0])
        if valid is not None and valid.shape[0] and rows.shape[0] % valid.shape[0] == 0:
            width = rows.shape[0] // valid.shape[0]
            if width <= valid.shape[1]:  # with a cache, the mask covers the past as well
                kept = valid[:, -width:].reshape(-1).to(rows) if width else kept
        log_q = rows.log_softmax(-1)
        q = log_q.exp()
        weights = kept.unsqueeze(1).expand(chosen.shape).reshape(-1)
        counts = rows.new_zeros(self.num_experts).scatter_add_(0, chosen.reshape(-1), weights)
        first = rows.new_zeros(self.num_experts).scatter_add_(0, chosen[:, 0], kept)
        entropy = -(q * log_q).sum(-1)
        policy_ess = 1.0 / q.square().sum(-1)
        totals = torch.stack((kept.sum(), (entropy * kept).sum(), (policy_ess * kept).sum()))
        for name, value in (("counts", counts), ("first", first), ("totals", totals)):
            value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def layer_stats(self, name: str, top_k: int) -> LayerStats | None:
        """The sums as `LayerStats`; None when no token was seen."""
        if not self.sums:
            return None
        tokens, entropy, policy_ess = self.sums["totals"].tolist()
        if tokens == 0:
            return None
        share = (self.sums["counts"] / self.sums["counts"].sum()).tolist()
        first = (self.sums["first"] / tokens).tolist()
        return LayerStats(
            name=name,
            tokens=int(tokens),
            expert_share=share,
            top1_share=first,
            ess=float(top_k),
            policy_ess=policy_ess / tokens,
            share_ess=1.0 / sum(s * s for s in share),
            entropy=entropy / tokens,
            dead_experts=[i for i, s in enumerate(share) if s == 0.0],
        )


@dataclass(frozen=True)
class LayerStats:
    """One routed layer's record. Shares sum to 1."""

    name: str
    tokens: int
    expert_share: list[float]  # [n] of (token, slot) pairs
    top1_share: list[float]  # [n] of tokens whose first expert it is
    ess: float  # of the routing weights
    policy_ess: float  # of softmax(z), mean over tokens
    share_ess: float  # of expert_share
    entropy: float  # of softmax(z), nats, mean over tokens
    dead_experts: list[int]  # never chosen


@dataclass(frozen=True)
class RoutingStats:
    """Every routed layer's record, in the model's order."""

    layers: list[LayerStats]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, float]:
        """Means over layers, and the total of dead experts."""
        count = max(len(self.layers), 1)
        return {
            "entropy": sum(layer.entropy for layer in self.layers) / count,
            "ess": sum(layer.ess for layer in self.layers) / count,
            "policy_ess": sum(layer.policy_ess for layer in self.layers) / count,
            "share_ess": sum(layer.share_ess for layer in self.layers) / count,
            "dead_experts": float(sum(len(layer.dead_experts) for layer in self.layers)),
        }


class RoutingRecorder:
    """Collects from every site of a model between `record_routing`'s entry and exit."""

    def __init__(self, model: nn.Module) -> None:
        """Attach nothing yet; see `record_routing`."""
        self.valid: Tensor | None = None
        self._sites = find_sites(model)
        self._records = {
            name: SiteRecord(site.num_experts, self) for name, site in self._sites.items()
        }

    def attach(self) -> None:
        """Start counting at every site."""
        for name, site in self._sites.items():
            site.records.append(self._records[name])

    def detach(self) -> None:
        """Stop counting."""
        for name, site in self._sites.items():
            site.records.remove(self._records[name])

    def leave_with_model(self) -> None:
        """What was counted stays at the sites, for `recorded_stats`."""
        for name, site in self._sites.items():
            site.recorded = self._records[name]

    def note_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: which tokens of this pass are real."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", kwargs.get("attention_mask"))
        self.valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def forget_mask(self, *_: Any) -> None:
        """Forward hook: the next pass may have no mask."""
        self.valid = None

    def reset(self) -> None:
        """Forget what was counted."""
        for record in self._records.values():
            record.sums.clear()

    def stats(self) -> RoutingStats:
        """What was counted so far. One synchronisation with the device a layer."""
        layers = (
            record.layer_stats(name, self._sites[name].top_k)
            for name, record in self._records.items()
        )
        return RoutingStats([layer for layer in layers if layer is not None])


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Count what the routers choose in the forward passes inside the context.

    Recomputations by activation checkpointing are not counted again. Padding is left out where the
    model is given a two-dimensional `attention_mask`.

    Args:
        model: Any module with routed layers in it.

    Yields:
        The recorder; call its `stats()`, also after the context.

    Raises:
        ValueError: The model has no routed layer.
    """
    recorder = RoutingRecorder(model)
    # PEFT's generate() calls the model inside, so that is where every pass comes by.
    inner = unwrapped(model)
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()  # type: ignore[operator]
    hooks = [
        inner.register_forward_pre_hook(recorder.note_mask, with_kwargs=True),
        inner.register_forward_hook(recorder.forget_mask, always_call=True),
    ]
    recorder.attach()
    try:
        yield recorder
    finally:
        recorder.detach()
        recorder.leave_with_model()
        for hook in hooks:
            hook.remove()


def recorded_stats(model: nn.Module) -> RoutingStats:
    """What the last `record_routing` of this model counted; no layers where it counted nothing."""
    found = (
        site.recorded.layer_stats(name, site.top_k)
        for name, site in find_sites(model).items()
        if site.recorded is not None
    )
    return RoutingStats([layer for layer in found if layer is not None])

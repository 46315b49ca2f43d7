"""What the routers did: expert shares, entropy, effective sample sizes, over real tokens.

    ESS(p) = (|p|_1 / |p|_2)^2      1 for one-hot, m for uniform over m (ReMix section 2, eq. 3)

`ess` is that of the routing weights a token really gets: exactly k for ReMix, whose weights are
constant. `policy_ess` and `entropy` (nats) are those of the policy q = softmax(z), `share_ess`
that of the experts' shares over all tokens: n when they are used evenly, k when the same k experts
take everything.

Sums stay on the layers' device (`remix_model.routing_sums`). Layers that are alike are counted
together once several have run; `RoutingRecorder.stats` brings the sums to the host, and only then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remix_model.architecture import unwrapped
from remix_model.routing_sums import WEIGHT_BINS, LayerSums
from remix_model.site import find_sites

if TYPE_CHECKING:
    from remix_model.site import Selection

# Logits that may wait to be counted with those of other layers: 8 MiB.
_WAITING = 2**21


@dataclass(frozen=True)
class LayerStats:
    """One routed layer's record. Shares sum to 1."""

    name: str
    tokens: int
    expert_share: list[float]  # [n] of (token, slot) pairs
    top1_share: list[float]  # [n] of tokens whose first expert it is
    ess: float  # of the routing weights, mean over tokens
    policy_ess: float  # of softmax(z), mean over tokens
    share_ess: float  # of expert_share
    entropy: float  # of softmax(z), nats, mean over tokens
    dead_experts: list[int]  # never chosen
    ess_min: float = 0.0  # of the token with the least
    ess_exp: float = 0.0  # exp(entropy of the routing weights), mean over tokens
    policy_ess_min: float = 0.0
    distinct_subsets: int | None = None  # 4096: so many or more; None: more than 64 experts
    co_selection: list[list[int]] = field(default_factory=list)  # [n, n] tokens that took both
    task_share: dict[str, list[float]] = field(default_factory=dict)  # expert_share of each task
    weight_histogram: list[int] = field(default_factory=list)  # [20] bins of [0, 1]: all weights
    top_weight_histogram: list[int] = field(default_factory=list)  # likewise: a token's largest


# What takes more room than a handful of numbers for each expert.
_LARGE = ("co_selection", "task_share", "weight_histogram", "top_weight_histogram")
_PER_EXPERT = ("expert_share", "top1_share")


@dataclass(frozen=True)
class RoutingStats:
    """Every routed layer's record, in the model's order."""

    layers: list[LayerStats]

    def to_dict(self, *, matrices: bool = True) -> dict[str, Any]:
        """Plain lists and numbers, for JSON.

        Args:
            matrices: False leaves out what takes most room: co-selection, tasks and histograms.
        """
        left_out = () if matrices else _LARGE
        rows = [asdict(layer) for layer in self.layers]
        return {"layers": [{k: v for k, v in row.items() if k not in left_out} for row in rows]}

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each layer and expert.

        Columns: layer, expert, the two shares, the layer's numbers, and the share of each task as
        `task:NAME`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_frame() needs pandas, which is not installed: pip install pandas (to_dict() "
                "needs nothing)"
            ) from error
        rows = []
        for layer in self.layers:
            values = asdict(layer)
            scalars = {k: v for k, v in values.items() if not isinstance(v, (list, dict))}
            scalars["layer"] = scalars.pop("name")
            for expert in range(len(layer.expert_share)):
                shares = {name: values[name][expert] for name in _PER_EXPERT}
                of_tasks = {f"task:{t}": share[expert] for t, share in layer.task_share.items()}
                rows.append({"layer": "", "expert": expert, **shares, **scalars, **of_tasks})
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, float]:
        """Means over layers; of minima the least; and the total of dead experts."""
        count = max(len(self.layers), 1)
        found = {
            name: sum(getattr(layer, name) for layer in self.layers) / count
            for name in ("entropy", "ess", "ess_exp", "policy_ess", "share_ess")
        }
        for name in ("ess_min", "policy_ess_min"):
            found[name] = min((getattr(layer, name) for layer in self.layers), default=0.0)
        subsets = [s.distinct_subsets for s in self.layers if s.distinct_subsets is not None]
        if subsets:  # not counted beyond 64 experts, which is not none
            found["distinct_subsets"] = sum(subsets) / len(subsets)
        found["dead_experts"] = float(sum(len(layer.dead_experts) for layer in self.layers))
        return found


class SiteRecord:
    """Where a site's selections go."""

    def __init__(self, name: str, num_experts: int, top_k: int, recorder: RoutingRecorder) -> None:
        """Of one site, by one recorder."""
        self.name = name
        self.num_experts = num_experts
        self.top_k = top_k
        self.recorder = recorder
        self.sums: LayerSums | None = None  # with those of other layers

    def add(self, selection: Selection) -> None:
        """Count one forward pass; a sequence that is routed as one counts once."""
        self.recorder.add(self, selection)


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass, the same for all layers of it."""

    mask: Tensor | None  # what kept was made of
    count: int
    kept: Tensor | None  # [rows] bool
    tasks: Tensor | None  # [rows, tasks] one-hot


class RoutingRecorder:
    """Collects from every site of a model between `record_routing`'s entry and exit."""

    def __init__(self, model: nn.Module) -> None:
        """Attach nothing yet; see `record_routing`."""
        self.valid: Tensor | None = None
        self._sites = find_sites(model)
        self._records = {
            name: SiteRecord(name, site.num_experts, site.top_k, self)
            for name, site in self._sites.items()
        }
        self._sums: dict[tuple[Any, ...], LayerSums] = {}
        self._task_names: list[str] = []
        self._tasks: Tensor | None = None  # [B] numbers of the coming passes' tasks
        self._rows: _Rows | None = None
        # Layers of one pass that are not counted yet: (slot, logits, chosen, weights).
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        self._waiting_for: tuple[LayerSums, _Rows] | None = None

    def tasks(self, names: Sequence[str] | str | None) -> None:
        """Say which task each sequence of the coming batches is of, for `LayerStats.task_share`.

        It holds until it is said anew.

        Args:
            names: One for each sequence of the batch, before it is repeated for selections; or one
                for all sequences; None: no tasks.
        """
        given = [names] if isinstance(names, str) else names
        self._rows = self._tasks = None
        if given is not None:
            self._task_names += [n for n in dict.fromkeys(given) if n not in self._task_names]
            self._tasks = torch.tensor([self._task_names.index(name) for name in given])

    def add(self, record: SiteRecord, selection: Selection) -> None:
        """Take a copy of one layer's selection; count it with others when there are enough."""
        logits = selection.logits.detach().reshape(-1, record.num_experts)
        chosen = selection.drawn.detach().reshape(-1, record.top_k)
        weights = selection.drawn_weights
        if record.sums is None:
            record.sums = self._sums_of(record, weights is not None, logits.device)
        sums, rows = record.sums, self._rows_of(selection, logits)
        slot = sums.slot(record.name)
        if not self._continues(sums, rows, slot, logits):
            self._count()
        self._waiting_for = (sums, rows)
        if weights is not None:
            weights = weights.detach().reshape(chosen.shape).to(sums.device, torch.float32)
        # Copies: a compiled graph uses the memory of its tensors again.
        copied = logits.to(sums.device, copy=True)
        self._waiting.append((slot, copied, chosen.to(sums.device, torch.int64), weights))

    def _sums_of(self, record: SiteRecord, weighted: bool, device: torch.device) -> LayerSums:
        key = (record.num_experts, record.top_k, weighted, device)
        if key not in self._sums:
            alike = [r for r in self._records.values() if r.num_experts == record.num_experts]
            self._sums[key] = LayerSums(len(alike), record.num_experts, record.top_k, device)
        return self._sums[key]

    def _continues(self, sums: LayerSums, rows: _Rows, slot: int, logits: Tensor) -> bool:
        """Whether a layer is counted with those that wait."""
        if not self._waiting or self._waiting_for is None:
            return False
        same = self._waiting_for[0] is sums and self._waiting_for[1] is rows
        room = (len(self._waiting) + 1) * logits.numel() <= _WAITING
        return same and room and slot == self._waiting[-1][0] + 1

    def _count(self) -> None:
        """Count the layers that wait."""
        if not self._waiting or self._waiting_for is None:
            return
        sums, rows = self._waiting_for
        slots, logits, chosen, weights = zip(*self._waiting, strict=True)
        together = None if weights[0] is None else torch.stack(weights)
        sums.add(
            slots[0], torch.stack(logits), torch.stack(chosen), together, rows.kept, rows.tasks
        )
        self._waiting = []

    def _rows_of(self, selection: Selection, logits: Tensor) -> _Rows:
        """Which rows count, and what tasks they are of; found once for all layers of a pass."""
        folded = None if selection.state is None else selection.state.folded_pass()
        mask = self.valid if folded is None else folded.valid
        if selection.per_sequence:
            mask = None
        count, rows = len(logits), self._rows
        if rows is None or rows.mask is not mask or rows.count != count:
            sequences = None if folded is None else folded.sequences
            tasks = self._tasks_of(count, sequences, logits.device)
            rows = self._rows = _Rows(mask, count, _kept(mask, count), tasks)
        return rows

    def _tasks_of(self, count: int, sequences: int | None, device: torch.device) -> Tensor | None:
        """[rows, tasks], one-hot; sequences: those of a folded batch."""
        if self._tasks is None:
            return None
        given = len(self._tasks)
        sequences = given if sequences is None else sequences
        if given > 1 and (sequences % given or count % sequences):
            raise ValueError(
                f"tasks were given for {given} sequences, and a layer has {count} rows of "
                f"{sequences} sequences: give one name for each sequence of the batch"
            )
        ids = self._tasks.to(device, non_blocking=True)
        if given == 1:
            ids = ids.expand(count)
        else:
            ids = ids.repeat(sequences // given).repeat_interleave(count // sequences)
        known = torch.arange(len(self._task_names), device=device)
        return (ids.unsqueeze(1) == known).float()

    def fits(self) -> bool:
        """Whether the sites take as many experts as when this was made."""
        return all(site.top_k == self._records[name].top_k for name, site in self._sites.items())

    def attach(self) -> None:
        """Start counting at every site."""
        for name, site in self._sites.items():
            site.records.append(self._records[name])

    def detach(self) -> None:
        """Stop counting."""
        for name, site in self._sites.items():
            site.records.remove(self._records[name])
        self._count()
        self._rows = None

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
        self._waiting = []
        self._sums.clear()
        for record in self._records.values():
            record.sums = None

    def stats(self) -> RoutingStats:
        """What was counted so far. Waits for the device a few times, however many layers."""
        self._count()
        read = {id(sums): sums.read() for sums in self._sums.values()}
        layers = (
            _layer_stats(record, read[id(record.sums)][record.name], self._task_names)
            for record in self._records.values()
            if record.sums is not None
        )
        return RoutingStats([layer for layer in layers if layer is not None])


def _kept(mask: Tensor | None, count: int) -> Tensor | None:
    """[rows] bool, the rows of real tokens; None: all. mask [B, T] bool."""
    if mask is None or not mask.shape[0] or count % mask.shape[0]:
        return None
    width = count // mask.shape[0]
    # With a cache the mask covers the past as well.
    return mask[:, -width:].reshape(-1) if 0 < width <= mask.shape[1] else None


def _layer_stats(
    record: SiteRecord, sums: dict[str, Tensor], tasks: list[str]
) -> LayerStats | None:
    """One layer's sums as `LayerStats`; None when no token was seen."""
    tokens = int(sums["tokens"])
    if tokens == 0:
        return None
    together = sums["together"]
    share = (together.diagonal() / together.diagonal().sum()).tolist()
    means, minima = (sums["sums"] / tokens).tolist(), sums["minima"].tolist()
    if "histogram" in sums:
        ess, ess_exp, ess_min = means[2], means[3], minima[2]
        histogram = sums["histogram"].long().tolist()
    else:
        ess = ess_exp = ess_min = float(record.top_k)
        histogram = [[0] * WEIGHT_BINS for _ in range(2)]
        place = min(int(WEIGHT_BINS / record.top_k), WEIGHT_BINS - 1)  # all weights are 1 / k
        histogram[0][place], histogram[1][place] = tokens * record.top_k, tokens
    by_task = sums.get("tasks", torch.zeros(0, record.num_experts))
    return LayerStats(
        name=record.name,
        tokens=tokens,
        expert_share=share,
        top1_share=(sums["first"] / tokens).tolist(),
        ess=ess,
        policy_ess=means[1],
        share_ess=1.0 / sum(s * s for s in share),
        entropy=means[0],
        dead_experts=[i for i, s in enumerate(share) if s == 0.0],
        ess_min=ess_min,
        ess_exp=ess_exp,
        policy_ess_min=minima[1],
        distinct_subsets=int(sums["subsets"]) if "subsets" in sums else None,
        co_selection=together.long().tolist(),
        task_share={
            name: (row / row.sum()).tolist()
            for name, row in zip(tasks, by_task, strict=False)
            if row.sum() > 0
        },
        weight_histogram=histogram[0],
        top_weight_histogram=histogram[1],
    )


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
    sites = find_sites(model)
    recorders = {id(s.recorded.recorder): s.recorded.recorder for s in sites.values() if s.recorded}
    layers = {layer.name: layer for r in recorders.values() for layer in r.stats().layers}
    return RoutingStats([layers[name] for name in sites if name in layers])

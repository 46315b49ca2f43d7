"""What a trained model is worth: held-out losses by kind of routing, right answers, weights.

| routing | each token's experts |
| --- | --- |
| top_k | the k largest logits: how the model is used |
| sampled | drawn from the policy, as in training |
| random | drawn evenly |
| fixed | the same k in a layer for all tokens, drawn once |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.data import Item
from benchmarks.study.metrics import score
from remix_model import force_selection, record_routing, sample_routing, token_losses
from remix_model.data import Example
from remix_model.site import find_sites
from remix_model.stats import RoutingRecorder
from remix_model.tokens import DataCollator, prompt_ids

ROUTINGS = ("top_k", "sampled", "random", "fixed")
EVEN = 1e9  # a temperature at which every policy is even
Batch = dict[str, Tensor]


def held_out_loss(model: Any, batches: Sequence[Batch], routing: str = "top_k") -> float:
    """Mean loss over all labelled tokens.

    Args:
        model: A causal language model; with frozen routed layers, for a routing but top_k.
        batches: Collated rows; the same draws are made for the same ones.
        routing: A name of `ROUTINGS`.

    Raises:
        ValueError: The routing is unknown, or the model has no routed layers and it is not top_k.
    """
    total, tokens = 0.0, 0
    for seed, batch in enumerate(batches):
        with torch.no_grad(), routed(model, routing, seed) as expand:
            losses, mask = token_losses(model, expand(batch))
        total += float(losses.double().sum())
        tokens += int(mask.sum())
    return total / tokens


@contextmanager
def routed(model: Any, routing: str, seed: int) -> Iterator[Callable[[Batch], Any]]:
    """Inside, experts are chosen as the routing says; yields what a batch goes through first."""
    if routing not in ROUTINGS:
        raise ValueError(f"routing={routing!r}: choose one of {', '.join(ROUTINGS)}")
    if routing == "top_k":
        yield lambda batch: batch
    elif routing == "fixed":
        with force_selection(model, fixed_subset(model)):
            yield lambda batch: batch
    else:
        temperature = EVEN if routing == "random" else 1.0
        with sample_routing(model, 1, temperature=temperature, seed=seed) as state:
            yield state.expand


def fixed_subset(model: Any) -> dict[str, Tensor]:
    """k experts for each routed layer, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randperm(site.num_experts, generator=generator)[: site.top_k].to(model.device)
        for name, site in find_sites(model).items()
    }


def is_routed(model: Any) -> bool:
    """Whether the model has routed layers."""
    try:
        return bool(find_sites(model))
    except ValueError:
        return False


def all_losses(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """`loss` under top-k routing; of a model that draws, also `loss_sampled` and so on."""
    losses = {"loss": held_out_loss(model, batches)}
    if is_routed(model) and not any(is_learned(site) for site in find_sites(model).values()):
        for routing in ROUTINGS[1:]:
            losses[f"loss_{routing}"] = held_out_loss(model, batches, routing)
    return losses


def is_learned(site: Any) -> bool:
    """Whether a site's routing weights are learned, so that nothing is ever drawn."""
    return bool(getattr(getattr(site, "router", None), "learned", False))


class WeightRecord:
    """Routing weights of one site, as the tokens get them; attached like a routing record."""

    def __init__(self, top_k: int, recorder: RoutingRecorder) -> None:
        self.recorder = recorder  # which knows the tokens that are no padding
        self.sorted_sum = torch.zeros(top_k, dtype=torch.float64)
        self.tokens = 0

    def add(self, selection: Any) -> None:
        """Count one pass; weights that are not learned are all equal."""
        weights = getattr(selection, "weights", None)
        if weights is None:
            weights = torch.ones_like(selection.drawn, dtype=torch.float64)
        valid = self.recorder.valid
        if valid is not None and valid.shape == weights.shape[:-1]:
            weights = weights[valid]
        weights = weights.detach().double().cpu().reshape(-1, weights.shape[-1])
        ordered = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True).values
        self.sorted_sum += ordered.sum(0)
        self.tokens += len(ordered)


def routing_figures(model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """How a routed model routes, under top-k; nothing of another.

    Returns:
        ess, policy_ess, share_ess, dead_experts: means over layers (a total for the last), as in
        `RoutingStats`. least_ess: the least of any token in the last layer (ReMix, figure 3).
        weights: a token's largest weight, second largest, ...: their means over layers and tokens
        (figure 2), as JSON.
    """
    if not is_routed(model):
        return {}
    sites = find_sites(model)
    with record_routing(model) as recorder:
        records = {name: WeightRecord(site.top_k, recorder) for name, site in sites.items()}
        for name, site in sites.items():
            site.records.append(records[name])  # type: ignore[arg-type]
        try:
            held_out_loss(model, batches)
        finally:
            for name, site in sites.items():
                site.records.remove(records[name])  # type: ignore[arg-type]
    stats = recorder.stats()
    found = stats.summary()
    shares = [record.sorted_sum / record.tokens for record in records.values()]
    mean = torch.stack(shares).mean(0)
    return {
        **{key: found[key] for key in ("ess", "policy_ess", "share_ess", "dead_experts")},
        "least_ess": stats.layers[-1].ess_min,
        "weights": json.dumps([round(float(share), 4) for share in mean]),
    }


def batches_of(
    rows: Sequence[Mapping[str, Any]], collator: DataCollator, size: int, device: Any
) -> list[Batch]:
    """Collated rows, of similar length: less padding, the same mean."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    parts = (ordered[start : start + size] for start in range(0, len(ordered), size))
    return [{key: value.to(device) for key, value in collator(part).items()} for part in parts]


def accuracy(
    model: Any, tokenizer: Any, items: Sequence[Item], size: int, longest: int | None = None
) -> dict[str, float]:
    """Mean score of greedy answers, by group; answers are cut at a group's longest reference.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        items: At least one.
        size: Prompts at once.
        longest: New tokens at most; None: those of the longest reference of the group, and two.
    """
    found = {}
    for group in dict.fromkeys(item.group for item in items):
        ours = [item for item in items if item.group == group]
        ours.sort(key=lambda item: len(item.prompt))
        most = longest or 2 + max(len(tokenizer(item.response).input_ids) for item in ours)
        parts = [ours[start : start + size] for start in range(0, len(ours), size)]
        texts = [t for part in parts for t in answers(model, tokenizer, part, most)]
        scores = [score(i.metric, t, i.answers) for i, t in zip(ours, texts, strict=True)]
        found[group] = sum(scores) / len(scores)
    return found


def answers(model: Any, tokenizer: Any, items: Sequence[Item], most: int) -> list[str]:
    """Greedy answers to one batch of prompts, which are padded on the left."""
    rows = [prompt_ids(Example(item.group, prompt=item.prompt), tokenizer) for item in items]
    width = max(map(len, rows))
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in output[:, width:]]

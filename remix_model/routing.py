"""The contexts: `sample_routing` draws the experts, `force_selection` says which.

`sample_routing` opens a `RoutingState` (state.py) and hands it to every routed layer's
`RoutingSite`. Outside a context every layer takes the k largest logits (ReMix section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from remix_model.architecture import check_causal, check_decoder
from remix_model.delivery import in_backward
from remix_model.forced import check_forced
from remix_model.options import SamplingOptions
from remix_model.parallel import SelectionGroup
from remix_model.prefix import shared_prefix
from remix_model.site import RoutingSite, find_sites
from remix_model.state import RoutingState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def sample_routing(
    model: nn.Module,
    num_selections: int = 4,
    *,
    credit: str = "sequence",
    log_prob: str = "ordered",
    logprob_tokens: str = "all",
    grad_selections: int | None = None,
    selection_chunk_size: int | None = None,
    advantage_norm: str = "none",
    router_entropy_coef: float = 0.0,
    load_balancing_coef: float = 0.0,
    temperature: float = 1.0,
    seed: int,
    selection_group: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[RoutingState]:
    """Draw the routed layers' selections instead of taking the top k; train routers by RLOO.

    Decoder blocks below the first routed one run once for all selections, where the model's
    structure is known to allow it (`remix_model.prefix`).

        with sample_routing(model, num_selections=4, seed=step) as routing:
            losses, mask = token_losses(model, routing.expand(batch))
            loss = routing.loss(losses, mask)
        loss.backward()

    Args:
        model: Any module with routed layers in it.
        num_selections: M, the independent selections of each input. At least 2 if a router is
            trained.
        credit: "sequence", the paper's: a decision answers for the whole loss of its sequence.
            "causal": for the losses predicted from its position on; as unbiased, with less
            variance, in models where no position sees a later one. Needs per-token losses.
        log_prob: "ordered", the paper's: of the draw. "unordered": of the set that was drawn, since
            the output does not depend on the order; as unbiased, and never with more variance.
        logprob_tokens: "all" positions draw, or those of the "response" only (the prompt is then
            routed top-k).
        grad_selections: G: only the first G selections keep a graph, and LoRA's gradient is
            their mean; the others run without, and the router's gradient is still that of all M.
            None: all.
        selection_chunk_size: Selections that may be in memory at once; need not divide M. None: as
            many as keep a graph, and of forward-only ones eight times as many (as many, with
            activation checkpointing). Both need `routing.parts` in place of `routing.expand`.
        advantage_norm: "none", "input" or "batch": what advantages are divided by. Biased, see
            `remix_model.credit.advantage_scale`.
        router_entropy_coef: Of an entropy bonus in the router's gradient. Biased towards even
            policies.
        load_balancing_coef: Of a load-balancing term in the router's gradient. Biased towards even
            use of the experts.
        temperature: Divides the logits while sampling. Other than 1, it optimises the expected loss
            of another policy; top k is the same under all.
        seed: 64-bit integer; every module's draw mixes its own stream from it, by its place in
            `model`. Use a new one every step, and for every part of a model that has a context of
            its own.
        selection_group: Ranks that share the M selections: each runs M over the group's size of
            them, of the same batch and with the same seed, and gradients averaged over the ranks
            (by DDP, FSDP) are those of one process. See `remix_model.parallel.selection_mesh`.

    Yields:
        The `RoutingState` with `expand` and `loss`.

    Raises:
        ValueError: An argument is out of range or unknown, the model has no routed layer, or M < 2
            with a trainable router; or M or G is not a multiple of the group's size.
        RuntimeError: The model is already inside such a context.

    Source: ReMix (arXiv 2603.10160) section 3.2.
    """
    sites = find_sites(model)
    check_decoder(model)
    options = SamplingOptions(
        num_selections,
        credit,
        log_prob,
        logprob_tokens,
        grad_selections,
        selection_chunk_size,
        advantage_norm,
        router_entropy_coef,
        load_balancing_coef,
        temperature,
    )
    options.check()
    if credit == "causal":
        check_causal(model)
    trained = next((name for name, site in sites.items() if site.policy_is_trained()), None)
    if num_selections < 2 and trained is not None:
        raise ValueError(
            f"num_selections={num_selections}, but the router of {trained} is trained: RLOO's "
            "baseline needs num_selections >= 2 (or freeze the routers with requires_grad_(False))"
        )
    for name, value in (("num_selections", num_selections), ("temperature", temperature)):
        if value != 1 and all(site.router.learned for site in sites.values()):
            raise ValueError(
                f"{name}={value}, but the routers weigh their experts "
                f"({next(iter(sites.values())).router.name}) and nothing is drawn: use 1"
            )
    if (grad_selections or num_selections) < num_selections:
        _check_forward_only(sites, f"grad_selections={grad_selections} of {num_selections}")
    group = SelectionGroup(selection_group, num_selections, grad_selections)
    state = RoutingState(model, sites, options, seed, group)
    for stream, (name, site) in enumerate(sites.items()):
        if site.state is not None:
            raise RuntimeError(
                f"{name} is already inside a sample_routing context; close that one first"
            )
        site.stream = stream
        if site.replaying is not None and not in_backward():
            site.replaying.abort_backward()  # an error ended it
            site.replaying = None
        site.name = name
    for site in state.sites:
        site.state = state
    try:
        with shared_prefix(model, sites, state):
            yield state
    finally:
        state.close()
        for site in state.sites:
            site.state = None


def _check_forward_only(sites: Mapping[str, RoutingSite], what: str) -> None:
    """Raise ValueError where selections without a graph would lose a part of the gradient."""
    for name, site in sites.items():
        if not site.policy_is_trained():
            continue
        if not site.detached:
            raise ValueError(
                f"{what}: {name} has router_detach_input=False, and what reaches the layers before "
                "the router needs a graph of every selection; set it to True, or leave "
                "grad_selections None"
            )
        if not site.router.linear:
            raise ValueError(
                f"{what}: the gradient of {name}'s router of type {site.router.name!r}, which is "
                "no linear one, needs a graph of every selection; leave grad_selections None"
            )


@contextmanager
def force_selection(model: nn.Module, selections: Mapping[str, Tensor]) -> Iterator[None]:
    """Use given experts in some routed layers; inside `sample_routing` they are scored like draws.

    Args:
        model: Any module with routed layers in it.
        selections: Integer top_k_index by module name (as `model.named_modules()` gives it),
            broadcastable to the layer's input rows: [k], [T, k], [B, T, k] or [M * B, T, k].

    Raises:
        ValueError: A name is not a routed layer, or an index is out of range, repeated or of the
            wrong k.
    """
    sites = find_sites(model)
    unknown = sorted(set(selections) - set(sites))
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a routed layer of this model; they are "
            f"{', '.join(list(sites)[:4])}, ..."
        )
    for name, index in selections.items():
        check_forced(name, index, sites[name].num_experts, sites[name].top_k)
    previous = {name: sites[name].forced for name in selections}
    for name, index in selections.items():
        sites[name].forced = index
    try:
        yield
    finally:
        for name, before in previous.items():
            sites[name].forced = before

"""What the tests of estimators share: one step in parts, and the ways to route."""

from __future__ import annotations

import pytest
import torch

from remix_model import sample_routing, token_losses
from remix_model.site import find_sites

CONFIGS = [
    pytest.param({}, id="token-module"),
    pytest.param({"router_sharing": "block"}, id="block"),
    pytest.param({"routing_granularity": "sequence"}, id="sequence"),
    pytest.param({"routing_granularity": "sequence", "router_sharing": "block"}, id="both"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(model, batch, num_items=None, scale=1.0, loss_scale=1.0, **options):
    """One step in parts: (loss, state, every selection by site name [M B, T, k])."""
    selections = {}
    with sample_routing(model, **{"num_selections": 3, "seed": 5, **options}) as routing:
        for part in routing.parts(batch, loss_scale):
            routing.add(*token_losses(model, part))
            for name, site in find_sites(model).items():
                (drawn,) = routing.selections[site.stream]
                selections.setdefault(name, {})[routing.part.first] = drawn
        loss = routing.loss(num_items=num_items)
    (loss * scale).backward()
    every = {
        name: torch.cat([parts[first] for first in sorted(parts)])
        for name, parts in selections.items()
    }
    return loss, routing, every

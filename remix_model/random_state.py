"""torch's random numbers, for a part that runs twice: its second run has to draw the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def get_random_state() -> list[Tensor]:
    """The state of torch's generators: the processor's, and those of all GPUs in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


@contextmanager
def random_state(state: list[Tensor]) -> Iterator[None]:
    """Inside, torch's generators go on from `state`; afterwards from where they were."""
    before = get_random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])

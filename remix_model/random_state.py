"""Seeds of the streams that draw, and torch's own numbers for a part that runs twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MASK64 = 0xFFFFFFFFFFFFFFFF


def mix_seed(seed: int, *streams: int) -> int:
    """A 64-bit seed for each combination of numbers, by SplitMix64 (Steele et al. 2014)."""
    mixed = seed & _MASK64
    for stream in streams:
        mixed = (mixed + 0x9E3779B97F4A7C15 * ((stream & _MASK64) + 1)) & _MASK64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        mixed ^= mixed >> 31
    return mixed


def get_random_state() -> list[Tensor]:
    """The state of torch's generators: the processor's, and those of all GPUs in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


@contextmanager
def random_state(state: list[Tensor]) -> Iterator[None]:
    """Inside, torch's generators go on from `state`; afterwards from where they were.

    So the second run of a part draws the same noise.
    """
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

"""Runs a test's function in two processes that can talk to each other by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch


def run_on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """function(rank, *args) in two new processes; fails if one fails, or after five minutes.

    torchrun's variables are set; the process group is left to the function.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.spawn(_rank, (port, function, args), nprocs=2, join=False)
    if not any(ranks.join(timeout=10) for _ in range(30)):
        for process in ranks.processes:
            process.kill()
        pytest.fail("the two processes did not end within five minutes")


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
    )
    function(rank, *args)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes never let an interpreter end by itself

"""Runs a test's function in several processes that can talk to each other by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Imported once, by the process that all ranks are forked from.
_PRELOADED = ["torch", "transformers", "peft", "accelerate", "remix_model.trainer", "pytest"]


def run_on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """function(rank, *args) in two new processes, see `run_on_ranks`."""
    run_on_ranks(2, function, *args)


def run_on_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """function(rank, *args) in new processes; fails if one fails, or after five minutes.

    torchrun's variables are set; the process group is left to the function.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.set_forkserver_preload(_PRELOADED)
    processes = torch.multiprocessing.start_processes(
        _rank,
        (ranks, port, function, args),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )
    if not any(processes.join(timeout=10) for _ in range(30)):
        for process in processes.processes:
            process.kill()
        pytest.fail(f"the {ranks} processes did not end within five minutes")


def _rank(
    rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
    )
    function(rank, *args)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes never let an interpreter end by itself

"""`kill -9` at any moment of `remix train`: no checkpoint is half, and the run ends bit-equal.

REMIX_KILLS=20 kills that many runs; REMIX_KILL_SEED repeats the moments of a failure.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from remix_cli import main
from remix_cli.run_folder import _damage

KILLS = int(os.environ.get("REMIX_KILLS", "2"))
SEED = int(os.environ.get("REMIX_KILL_SEED", str(time.time_ns() % 10**6)))
ARGUMENTS = ("--save-steps", "2", "--save-total-limit", "2", "--num-samples", "0")
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir"}
# By what a run measures, and by how it was started, runs differ.
MEASURED = ("train_seconds", "tokens_per_s", "peak_rss_mib", "config")


def train(argv: list[str], folder: str, kill_at: int, count: Any) -> None:
    """In a process of its own: count what is done to the run's files, and die at one of them."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            count.value += 1
            if count.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.exit(main(["train", *argv, "--output-dir", folder]))


class Runs:
    """Starts runs in processes that are forked from one which has imported everything."""

    def __init__(self, config: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["remix_cli.train", "tests.remix_cli.test_kill"])
        self.argv = ["--config", str(config), *ARGUMENTS]

    def run(self, folder: Path, *argv: str, kill_at: int = 0, kill_after: float = 600) -> Any:
        """Return (exit code, events, seconds)."""
        count = self.context.Value("i", 0)
        start = time.monotonic()
        process = self.context.Process(
            target=train, args=([*self.argv, *argv], str(folder), kill_at, count)
        )
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        return process.exitcode, count.value, time.monotonic() - start


@pytest.fixture(scope="module")
def runs(workspace: Path) -> Runs:
    return Runs(workspace / "c.yaml")


@pytest.fixture(scope="module")
def straight(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int, float]:
    """(what an uninterrupted run leaves, its file events, its seconds)."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    code, events, seconds = runs.run(folder)
    assert code == 0
    assert events > 50
    return result(folder), events, seconds


def result(folder: Path) -> Any:
    """What a run leaves, without what it measures."""
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {key: value for key, value in metrics.items() if key not in MEASURED}
    for history in ("loss_history", "eval_history"):
        kept[history] = [
            {key: value for key, value in entry.items() if not re.search("per_second|time", key)}
            for entry in kept[history]
        ]
    last = folder / "checkpoint-8"
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (folder, last)]
    # One checkpoint too many may stay: the oldest is only removed when the newest has its name.
    names = {path.name for path in folder.iterdir()} - {"checkpoint-4"}
    return kept, weights, (last / "optimizer.pt").stat().st_size, names


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_ends_bit_equal(runs: Runs, straight: Any, tmp_path: Path, kill: int) -> None:
    """By file events and by the clock in turns, after some share of the whole run."""
    by_clock, share = kill % 2 == 1, random.Random(f"{SEED} {kill}").random()
    expected, events, seconds = straight
    folder = tmp_path / "run"
    when = {"kill_after": share * seconds} if by_clock else {"kill_at": 1 + int(share * events)}
    code, _, _ = runs.run(folder, **when)
    assert code in (-signal.SIGKILL, 0), "not killed, and not finished before that"

    left = sorted(folder.glob("checkpoint-*"))
    assert [_damage(checkpoint) for checkpoint in left] == [None] * len(left), SEED
    # Without a checkpoint there is nothing to resume, which is what --resume says.
    code, _, _ = runs.run(folder, "--resume")
    assert code == (0 if left else 2), SEED
    if not left:
        assert runs.run(folder, "--overwrite")[0] == 0
    assert result(folder) == expected, SEED

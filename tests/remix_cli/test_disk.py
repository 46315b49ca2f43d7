"""A full disk, a read-only folder: one sentence, nothing saved before is lost, the run goes on."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remix_cli.progress import ProgressCallback
from remix_cli.run_folder import write_json
from remix_model import saving
from tests.remix_cli.helpers import contents, fails, run

STEPS = ("--save-steps", "2", "--num-samples", "0")


@pytest.fixture
def files_may_grow() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Do something in the next run, when it has done so many steps."""
    count = ProgressCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count(self, args, state, control, **kwargs)
        if state.global_step == step:
            action()

    monkeypatch.setattr(ProgressCallback, "on_step_end", on_step_end)


def fail_later(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let a function succeed so many times, and then find the disk full."""
    original, done = getattr(owner, name), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        done.append(args)
        if len(done) > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("size", [600, 10_000, 30_000], ids=["configuration", "weights", "torch"])
def test_a_checkpoint_that_does_not_fit(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    files_may_grow: None,
    size: int,
) -> None:
    """Whoever writes too much: Python, safetensors or torch."""
    folder = tmp_path / "run"
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
        code = run(workspace, "train", "--output-dir", str(folder), *STEPS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    error = fails(capsys, code, expected=1)
    assert f"{folder / 'checkpoint-6'} could not be saved: " in error
    assert "MiB are free" in error
    assert f"the last good checkpoint is {folder / 'checkpoint-4'}; --resume continues" in error
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "routing.jsonl", "checkpoint-2", "checkpoint-4"}

    assert run(workspace, "train", "--output-dir", str(folder), *STEPS, "--resume") == 0
    same_adapter(folder, workspace / "run")


def same_adapter(folder: Path, other: Path) -> None:
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "owner,name,calls",
    [(os, "fsync", 0), (os, "fsync", 7), (Path, "rename", 0), (saving, "publish", 0)],
    ids=["first-fsync", "later-fsync", "rename", "publish"],
)
def test_a_checkpoint_that_is_not_brought_to_the_disk(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    calls: int,
) -> None:
    before = contents(finished)
    argv = ["--output-dir", str(finished), "--resume", "--max-steps", "10"]
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: fail_later(patch, owner, name, calls))
        code = run(workspace, "train", *argv)
    error = fails(capsys, code, expected=1)
    assert "checkpoint-10 could not be saved: No space left on device" in error
    after = contents(finished)
    for name in ("config.yaml", "routing.jsonl"):  # the run went on for two steps
        assert after.pop(name) != before.pop(name)
    assert after == before

    assert run(workspace, "train", *argv) == 0
    assert "checkpoint-10" in {path.name for path in finished.iterdir()}


def test_an_adapter_is_replaced_by_a_whole_one_or_not_at_all(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("adapter*")}
    argv = ["--output-dir", str(finished), "--resume", "--max-steps", "10"]
    with monkeypatch.context() as patch:
        fail_later(patch, saving, "replace_files", 0)
        error = fails(capsys, run(workspace, "train", *argv), expected=1)
    assert f"{finished} could not be saved: No space left on device" in error
    assert "checkpoint-10; --resume continues from it" in error
    assert before == {path.name: path.read_bytes() for path in finished.glob("adapter*")}
    assert not [path.name for path in finished.iterdir() if path.name.startswith(".")]
    assert run(workspace, "train", *argv) == 0
    same_adapter(finished, finished / "checkpoint-10")


def test_metrics_that_do_not_fit_are_named(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (finished / "metrics.json").read_bytes()
    argv = ["--output-dir", str(finished), "--resume", "--max-steps", "9"]
    with monkeypatch.context() as patch:

        def fail(values: Any, path: Path) -> None:
            fail_later(patch, os, "fsync", 0)
            write_json(values, path)

        patch.setattr("remix_cli.train.write_json", fail)
        error = fails(capsys, run(workspace, "train", *argv))
    assert error == f"remix: error: {finished / 'metrics.json'}: No space left on device\n"
    assert (finished / "metrics.json").read_bytes() == before
    assert run(workspace, "train", *argv) == 0


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_folder_that_may_not_be_written_is_named(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    before = contents(finished)
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **kw: Path(path) != finished and access(path, mode, **kw),
    )
    for command in ("validate", "train"):
        code = run(workspace, command, "--output-dir", str(finished), flag)
        assert f"output_dir {finished} cannot be written" in fails(capsys, code)
    assert contents(finished) == before

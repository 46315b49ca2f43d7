"""A run's folder: no run and no file of the user's is lost, whenever a start fails or is killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remix_cli import run_folder
from remix_cli.config import CONFIG_HEADER, RunConfig, build_config
from remix_cli.run_folder import RunStart, last_checkpoint, resolve_config, write_json
from tests.remix_cli.helpers import contents, fails, run

Break = Callable[[BaseException], None]


@pytest.fixture
def broken_start(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Lets the next run raise an error in its first evaluation, before its first step."""

    def break_with(error: BaseException) -> None:
        def evaluate(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("remix_cli.train._held_out_loss", evaluate)

    return break_with


@pytest.fixture
def run_of_mine(finished: Path) -> Path:
    """A finished run, and beside its files some that no run wrote."""
    (finished / "notes.txt").write_text("mine")
    (finished / "plots").mkdir()
    (finished / "plots" / "loss.svg").write_text("mine")
    return finished


def start_and_kill(folder: Path) -> None:
    """What `train --overwrite` leaves that is killed before its first step."""
    RunStart(folder).begin(build_config({"seed": 5}, folder / "config.yaml"))


def test_another_run_is_never_lost(
    workspace: Path, run_of_mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run_of_mine)
    out = ["--output-dir", str(run_of_mine)]
    assert "holds another run" in fails(capsys, run(workspace, "train", *out))
    assert "exclude each other" in fails(
        capsys, run(workspace, "train", *out, "--overwrite", "--resume")
    )
    # Bad input is found before anything is removed.
    assert "top_k" in fails(capsys, run(workspace, "train", *out, "--overwrite", "--top-k", "9"))
    assert contents(run_of_mine) == before

    assert run(workspace, "train", *out, "--overwrite", "--max-steps", "1") == 0
    assert json.loads((run_of_mine / "metrics.json").read_text())["train_steps"] == 1
    names = {path.name for path in run_of_mine.iterdir()}
    assert {"notes.txt", "plots", "checkpoint-1"} < names
    assert not {"checkpoint-4", "checkpoint-8", ".replaced-run", ".removed-run"} & names


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no"), 2), (KeyboardInterrupt(), 130)], ids=["error", "ctrl-c"]
)
def test_failed_start_brings_the_old_run_back(
    workspace: Path,
    run_of_mine: Path,
    broken_start: Break,
    error: BaseException,
    code: int,
) -> None:
    before = contents(run_of_mine)
    broken_start(error)
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == code
    assert contents(run_of_mine) == before


def test_start_that_fails_in_its_first_step_brings_the_old_run_back(
    workspace: Path,
    run_of_mine: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(run_of_mine)
    monkeypatch.setattr("remix_model.trainer.token_losses", _nan_losses)
    out = ["--output-dir", str(run_of_mine), "--overwrite", "--eval-size", "0"]
    assert "step 1" in fails(capsys, run(workspace, "train", *out), expected=1)
    assert contents(run_of_mine) == before


def _nan_losses(model: Any, batch: Any) -> Any:
    from remix_model import token_losses

    losses, mask = token_losses(model, batch)
    return losses * math.nan, mask


def test_old_run_is_gone_once_the_new_one_has_done_a_step(
    workspace: Path, run_of_mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(run_of_mine), "--overwrite", "--max-steps", "3"]
    code = run(workspace, "train", *out, "--learning-rate", "1e39", "--warmup-ratio", "0")
    assert "step 2" in fails(capsys, code, expected=1)
    assert {path.name for path in run_of_mine.iterdir()} == {"config.yaml", "notes.txt", "plots"}
    assert "learning_rate: 1.0e+39" in (run_of_mine / "config.yaml").read_text()


@pytest.mark.parametrize("place", ["new", "deep/er/new"])
def test_fresh_start_that_fails_leaves_no_folder(
    workspace: Path, tmp_path: Path, broken_start: Break, place: str
) -> None:
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(tmp_path / place)) == 2
    assert not list(tmp_path.iterdir())


def test_fresh_start_that_fails_leaves_the_users_empty_folder(
    workspace: Path, tmp_path: Path, broken_start: Break
) -> None:
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(tmp_path)) == 2
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_run_put_aside_by_a_killed_start_comes_back_with_the_next_failure(
    workspace: Path, run_of_mine: Path, broken_start: Break
) -> None:
    before = contents(run_of_mine)
    start_and_kill(run_of_mine)
    assert not (run_of_mine / "metrics.json").exists()
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == 2
    assert contents(run_of_mine) == before


def test_run_put_aside_by_a_killed_start_goes_with_the_next_success(
    workspace: Path, run_of_mine: Path
) -> None:
    start_and_kill(run_of_mine)
    argv = ["--output-dir", str(run_of_mine), "--overwrite", "--max-steps", "1"]
    assert run(workspace, "train", *argv) == 0
    names = {path.name for path in run_of_mine.iterdir()}
    assert {"metrics.json", "notes.txt", "plots"} < names
    assert not {".replaced-run", ".removed-run", "checkpoint-8"} & names


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "not-yet"])
@pytest.mark.parametrize("flag", ["--no-overwrite", "--resume"])
def test_killed_start_is_named(
    workspace: Path,
    run_of_mine: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    configured: bool,
) -> None:
    """Neither the new run nor, in its hiding place, the old one is taken for foreign files."""
    start_and_kill(run_of_mine)
    if not configured:
        (run_of_mine / "config.yaml").unlink()
    before = contents(run_of_mine)
    for command in ("train", "validate"):
        error = fails(capsys, run(workspace, command, "--output-dir", str(run_of_mine), flag))
        assert "was killed before its first step: start it again with --overwrite" in error
        assert str(run_of_mine / ".replaced-run") in error
    assert contents(run_of_mine) == before
    # The way out that the message names.
    for path in (run_of_mine / ".replaced-run").iterdir():
        path.replace(run_of_mine / path.name)
    (run_of_mine / ".replaced-run").rmdir()
    assert "holds another run" in fails(
        capsys, run(workspace, "train", "--output-dir", str(run_of_mine))
    )


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_start_killed_while_it_puts_the_old_run_aside_loses_nothing(
    workspace: Path,
    run_of_mine: Path,
    broken_start: Break,
    monkeypatch: pytest.MonkeyPatch,
    moves: int,
) -> None:
    before = contents(run_of_mine)
    with monkeypatch.context() as patch:
        _kill_after(patch, moves)
        with pytest.raises(_Killed):
            start_and_kill(run_of_mine)
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == 2
    assert contents(run_of_mine) == before


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_start_killed_while_it_brings_the_old_run_back_loses_nothing(
    workspace: Path,
    run_of_mine: Path,
    broken_start: Break,
    monkeypatch: pytest.MonkeyPatch,
    moves: int,
) -> None:
    before = contents(run_of_mine)
    start = RunStart(run_of_mine)
    start.begin(RunConfig(output_dir=str(run_of_mine)))
    with monkeypatch.context() as patch:
        _kill_after(patch, moves)
        with pytest.raises(_Killed):
            start.undo()
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == 2
    assert contents(run_of_mine) == before


class _Killed(BaseException):
    pass


def _kill_after(monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Let only so many files be moved."""
    rename, done = Path.rename, []

    def rename_or_die(self: Path, target: Path) -> Path:
        if len(done) == moves:
            raise _Killed
        done.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)


def test_old_run_that_is_removed_halfway_is_never_brought_back(
    workspace: Path, run_of_mine: Path, broken_start: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # the process is killed while it removes
        patch.setattr(run_folder.shutil, "rmtree", lambda *args, **kwargs: None)
        start = RunStart(run_of_mine)
        start.begin(RunConfig(output_dir=str(run_of_mine), top_k=1))
        start.commit()
    broken_start(ValueError("no"))
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == 2
    assert "top_k: 1\n" in (run_of_mine / "config.yaml").read_text()
    assert {path.name for path in run_of_mine.iterdir()} == {"config.yaml", "notes.txt", "plots"}


def test_configuration_that_cannot_be_written_brings_the_old_run_back(
    workspace: Path, run_of_mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device", "config.yaml")

    before = contents(run_of_mine)
    monkeypatch.setattr(run_folder, "write_yaml", disk_full)
    assert run(workspace, "train", "--output-dir", str(run_of_mine), "--overwrite") == 2
    assert contents(run_of_mine) == before


@pytest.mark.parametrize("flag", ["--overwrite", "--no-overwrite"])
def test_folder_that_no_run_wrote_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    code = run(workspace, "train", "--output-dir", str(tmp_path), flag)
    assert "holds files that no run wrote" in fails(capsys, code)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("flag", ["--overwrite", "--no-overwrite", "--resume"])
def test_folder_named_like_a_checkpoint_is_refused(
    workspace: Path, finished: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """Training removes old checkpoints by their names."""
    (finished / "checkpoint-99").mkdir()
    (finished / "checkpoint-99" / "notes.txt").write_text("mine")
    before = contents(finished)
    for command in ("train", "validate"):
        code = run(workspace, command, "--output-dir", str(finished), flag)
        assert "checkpoint-99 is named like a checkpoint and is none" in fails(capsys, code)
    assert contents(finished) == before


@pytest.mark.parametrize("left", ["optimizer.pt", "adapter_config.json", "README.md"])
def test_checkpoint_that_was_removed_halfway_is_cleaned(
    workspace: Path, finished: Path, left: str
) -> None:
    """By other programs than ours, file by file; it is not resumed from, and goes."""
    half = finished / "checkpoint-8"
    for path in half.iterdir():
        if path.name not in (left, "rng_state.pth"):
            path.unlink()
    (finished / "metrics.json").unlink()
    assert last_checkpoint(finished) == finished / "checkpoint-4"
    out = ["--output-dir", str(finished), "--resume", "--max-steps", "6"]
    assert run(workspace, "train", *out) == 0
    assert not half.exists()
    assert (finished / "checkpoint-6").is_dir()


def test_folder_that_cannot_be_made_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(workspace, "train", "--output-dir", str(workspace / "c.yaml" / "run"))
    assert "cannot be written" in fails(capsys, code)


def test_nothing_to_resume(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path), "--resume"]
    assert "no run to resume" in fails(capsys, run(workspace, "train", *out))
    (tmp_path / "config.yaml").write_text(CONFIG_HEADER)
    (tmp_path / "checkpoint-4").mkdir()  # cut short: without its last file
    assert "before its first checkpoint" in fails(capsys, run(workspace, "train", *out))


def test_a_resumed_run_is_told_again_that_code_may_be_run(finished: Path) -> None:
    path = finished / "config.yaml"
    path.write_text(path.read_text().replace("remote_code: false", "remote_code: true"))
    resumed = {"output_dir": str(finished), "resume": True}
    assert not resolve_config(None, resumed).trust_remote_code
    assert resolve_config(None, {**resumed, "trust_remote_code": True}).trust_remote_code


def test_json_is_whole_or_not_written(tmp_path: Path) -> None:
    write_json({"loss": 1.0}, tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": math.nan}, tmp_path / "metrics.json")
    assert contents(tmp_path) == {"metrics.json": b'{\n  "loss": 1.0\n}\n'}

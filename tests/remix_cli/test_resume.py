"""`train --resume`: the same bits, from the latest checkpoint that can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remix_cli import main
from remix_cli.run_folder import _damage
from remix_model.saving import PARTIAL, PARTIAL_FILES
from tests.remix_cli.helpers import contents, cut, fails, run


def test_resumed_run_ends_with_the_same_bits(workspace: Path, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoint-8")
    (finished / "adapter_model.safetensors").unlink()
    (finished / "metrics.json").unlink()
    assert run(workspace, "train", "--output-dir", str(finished), "--resume") == 0
    straight = load_file(workspace / "run" / "adapter_model.safetensors")
    resumed = load_file(finished / "adapter_model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["loss_history"]] == [2, 4, 6, 8]


def flip(path: Path) -> None:
    """Change a byte in a file's middle, as a worn disk would."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    path.write_bytes(bytes(whole))


def test_every_damage_is_found(finished: Path) -> None:
    checkpoint = finished / "checkpoint-8"
    assert _damage(checkpoint) is None
    torch_files = ["optimizer.pt", "rng_state.pth"]
    others = ["scheduler.pt", "adapter_config.json", "adapter_model.safetensors"]
    for name in (*torch_files, *others, "trainer_state.json"):
        path = checkpoint / name
        whole = path.read_bytes()
        for damage in (cut, flip) if name in torch_files else (cut,):
            damage(path)
            assert _damage(checkpoint) == f"{path} is damaged", damage
            path.write_bytes(whole)
        path.unlink()
        assert f"{name.split('.')[0]}" in str(_damage(checkpoint)), "it is missing"
        path.write_bytes(whole)
    assert _damage(checkpoint) is None


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("optimizer.pt", cut, "is damaged"),
        ("scheduler.pt", Path.unlink, "is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoint_gives_way_to_an_older_one(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    what: str,
) -> None:
    (finished / "metrics.json").unlink()
    damage(finished / "checkpoint-8" / name)
    out = ["--output-dir", str(finished), "--resume"]
    for command in ("validate", "train"):
        assert run(workspace, command, *out) == 0
        output = capsys.readouterr().out.replace("\n", "").replace(" ", "")
        assert what.replace(" ", "") + ":continuingfromanoldercheckpoint" in output
    assert "checkpoint-4step" in output  # "continuing from .../checkpoint-4", then the first line
    assert json.loads((finished / "metrics.json").read_text())["train_steps"] == 8


def test_only_damaged_checkpoints_are_refused(
    workspace: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(finished / "checkpoint-4" / "optimizer.pt")
    (finished / "checkpoint-8" / "scheduler.pt").unlink()
    before = contents(finished)
    for command in ("validate", "train"):
        code = run(workspace, command, "--output-dir", str(finished), "--resume")
        error = fails(capsys, code)
        assert "checkpoint-8/scheduler.pt is missing; " in error
        assert "checkpoint-4/optimizer.pt is damaged): start it again with --overwrite" in error
    assert contents(finished) == before


@pytest.mark.parametrize("steps", [8, 7, 5], ids=["same", "fewer", "whole-epoch"])
def test_finished_run_is_left_as_it_is(
    workspace: Path, finished: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    """Five steps are an epoch: the Trainer's own loop goes on where a run ends inside one."""
    out = ["--output-dir", str(finished), "--resume"]
    if steps == 5:
        assert run(workspace, "train", *out[:2], "--overwrite", "--max-steps", "5") == 0
    before = contents(finished)
    code = run(workspace, "train", *out, "--max-steps", str(steps), "--logging-steps", "1")
    assert code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "was finished already: raise max_steps to go on" in output
    assert contents(finished) == before


def test_run_killed_before_its_adapter_was_saved_is_completed(
    workspace: Path, finished: Path
) -> None:
    (finished / "adapter_model.safetensors").unlink()
    (finished / "metrics.json").unlink()
    assert run(workspace, "train", "--output-dir", str(finished), "--resume") == 0
    straight = load_file(workspace / "run" / "adapter_model.safetensors")
    resumed = load_file(finished / "adapter_model.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert json.loads((finished / "metrics.json").read_text())["train_steps"] == 8
    assert not (finished / "checkpoint-9").exists()


def test_metrics_of_fewer_steps_do_not_make_a_run_finished(workspace: Path, finished: Path) -> None:
    """It was finished with 4 steps, continued to 8, and killed before it was saved again."""
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "metrics.json").write_text(json.dumps({**metrics, "train_steps": 4}))
    shutil.copy(finished / "checkpoint-4" / "adapter_model.safetensors", finished)
    assert run(workspace, "train", "--output-dir", str(finished), "--resume") == 0
    assert json.loads((finished / "metrics.json").read_text())["train_steps"] == 8
    assert (finished / "adapter_model.safetensors").read_bytes() == (
        finished / "checkpoint-8" / "adapter_model.safetensors"
    ).read_bytes()


def test_longer_run_is_written_down_and_goes_on_as_long(
    workspace: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml says what the last start used, once that start has done a step."""
    out = ["--output-dir", str(finished), "--resume"]
    before = contents(finished)
    code = run(workspace, "train", *out, "--max-steps", "9", "--eval-limit", "7")
    assert "cannot go on with" in fails(capsys, code)
    assert contents(finished) == before
    for hidden in (PARTIAL, PARTIAL_FILES):  # a start that was killed while it saved
        (finished / hidden / "checkpoint-10").mkdir(parents=True)
        (finished / hidden / "checkpoint-10" / "half").touch()
    assert run(workspace, "train", *out, "--max-steps", "10", "--logging-steps", "1") == 0
    assert not [path for path in finished.rglob("*") if path.name in (PARTIAL, "half")]
    text = (finished / "config.yaml").read_text()
    assert "max_steps: 10\n" in text
    assert "logging_steps: 1\n" in text
    assert "resume" not in text
    # Killed after step 9, say: what is given again is what changes, and no more.
    shutil.rmtree(finished / "checkpoint-10")
    (finished / "metrics.json").unlink()
    assert main(["train", *out]) == 0
    assert json.loads((finished / "metrics.json").read_text())["train_steps"] == 10


def test_resume_refuses_to_become_another_run(
    workspace: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(finished), "--resume"]
    for argv, change in (
        (["--learning-rate", "0.5"], "learning_rate=0.01 and cannot go on with 0.5"),
        (["--seed", "1"], "seed=0 and cannot go on with 1"),
        (["--model", "other"], "cannot go on with 'other'"),
    ):
        for command in ("validate", "train"):
            assert change in fails(capsys, run(workspace, command, *out, *argv))


def test_home_folder_is_the_users(
    workspace: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell leaves --output-dir=~/run to us; the run's configuration is still the saved one."""
    monkeypatch.setenv("HOME", str(finished.parent))
    code = main(["train", "--output-dir=~/run", "--resume", "--learning-rate", "0.5"])
    assert "learning_rate=0.01 and cannot go on with 0.5" in fails(capsys, code)


def test_run_is_used_from_other_folders(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relative paths of one start mean the same files to the next, wherever it is made."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(workspace / "model", here / "model")
    there.mkdir()
    shutil.copy(workspace / "sums.jsonl", here / "sums.jsonl")
    shutil.copy(workspace / "sums.jsonl", here / "held.jsonl")
    settings = (workspace / "c.yaml").read_text().splitlines()
    settings = [line for line in settings if not line.startswith(("model", "dataset"))]
    (here / "c.yaml").write_text("\n".join(["model: model", "dataset: sums.jsonl", *settings]))

    monkeypatch.chdir(here)
    train = ["train", "--output-dir", "run", "--max-steps"]
    held_out = ["--config", "c.yaml", "--eval-dataset", "held.jsonl"]
    assert main([*train, "4", *held_out]) == 0
    assert main([*train, "5", *held_out, "--resume"]) == 0
    assert main([*train, "6", "--model", "./model", "--resume"]) == 0

    monkeypatch.chdir(there)
    assert main(["eval", "--adapter", "../here/run"]) == 0
    assert main(["generate", "--adapter", "../here/run", "--prompt", "1+2?"]) == 0
    train = ["train", "--output-dir", "../here/run", "--resume", "--max-steps"]
    assert main([*train, "7"]) == 0
    assert main([*train, "8", "--model", "../here/model"]) == 0
    capsys.readouterr()
    assert "cannot go on with 'model'" in fails(capsys, main([*train, "9", "--model", "model"]))

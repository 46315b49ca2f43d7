"""`remix eval`: the run's own numbers again, other data on request, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from remix_cli import main
from tests.remix_cli.helpers import fails, run


def evaluated(adapter: Path, folder: Path, *argv: str) -> dict[str, float]:
    out = folder / "eval.json"
    assert main(["eval", "--adapter", str(adapter), "--json", str(out), *argv]) == 0
    return dict(json.loads(out.read_text()))


def test_eval_agrees_with_the_run(workspace: Path, tmp_path: Path) -> None:
    result = evaluated(workspace / "run", tmp_path)
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert math.isclose(result["loss_base"], metrics["eval_loss_before"], rel_tol=1e-5)
    assert math.isclose(result["loss_adapter"], metrics["eval_loss_after"], rel_tol=1e-5)
    assert result["examples"] == 6


def test_data_set_given_for_it_is_evaluated_whole(workspace: Path, tmp_path: Path) -> None:
    sums = ["--dataset", str(workspace / "sums.jsonl")]
    assert evaluated(workspace / "run", tmp_path, *sums)["examples"] == 36
    assert evaluated(workspace / "run", tmp_path, *sums, "--eval-size", "4")["examples"] == 4


def test_data_set_given_for_it_replaces_the_runs_own(workspace: Path, tmp_path: Path) -> None:
    """Also where the run has an eval_dataset, which would otherwise come first."""
    held_out = ["--eval-dataset", str(workspace / "sums.jsonl"), "--max-steps", "1"]
    assert run(workspace, "train", "--output-dir", str(tmp_path / "run"), *held_out) == 0
    (tmp_path / "two.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 2)
    result = evaluated(tmp_path / "run", tmp_path, "--dataset", str(tmp_path / "two.jsonl"))
    assert result["examples"] == 2
    assert result["dataset"] == str(tmp_path / "two.jsonl")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-fewshot", "3"], "--num-fewshot belongs to --tasks"),
        (["--task-limit", "3"], "--task-limit belongs to --tasks"),
        (["--include-path", "{folder}"], "--include-path belongs to --tasks"),
        (["--json", "{folder}"], "is a folder: give a file in it"),
        (["--json", "{folder}/no/file.json"], "create it first"),
        (["--dataset", "missing.jsonl"], "no data file missing.jsonl"),
    ],
    ids=lambda value: " ".join(value)[2:] if isinstance(value, list) else "",
)
def test_bad_options_are_named(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    argv = [word.format(folder=tmp_path) for word in argv]
    assert message in fails(capsys, main(["eval", "--adapter", str(workspace / "run"), *argv]))
    assert not list(tmp_path.iterdir())


def test_missing_lm_eval_gives_the_command(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code = main(["eval", "--adapter", str(workspace / "run"), "--tasks", "arc_easy"])
    assert "pip install 'remix-lora[eval]'" in fails(capsys, code)

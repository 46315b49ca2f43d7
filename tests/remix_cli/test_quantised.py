"""`--load-in-4bit` and `--load-in-8bit`: trained, saved, and loaded the same way again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from remix_cli import main
from tests.remix_cli.helpers import fails, run

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
def test_a_quantised_run_is_loaded_as_it_was_trained(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = ["--load-in-8bit", "--output-dir", str(folder)]
    assert run(workspace, "train", *argv) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    results = tmp_path / "eval.json"
    assert main(["eval", "--adapter", str(folder), "--json", str(results)]) == 0
    again = json.loads(results.read_text())
    assert metrics["eval_loss_after"] == pytest.approx(again["loss_adapter"], rel=1e-4)
    assert main(["generate", "--adapter", str(folder), "--prompt", "1+2?"]) == 0
    capsys.readouterr()
    code = main(["train", "--output-dir", str(folder), "--resume", "--load-in-4bit"])
    assert "load_in_4bit=False and cannot go on with True" in fails(capsys, code)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_options_that_cannot_be_are_refused_at_once(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    out = ["--output-dir", str(tmp_path / "run"), "--load-in-4bit"]
    both = run(workspace, command, *out, "--load-in-8bit")
    assert "exclude each other" in fails(capsys, both)
    monkeypatch.setattr("remix_model.models.importlib.util.find_spec", lambda name: None)
    assert "pip install bitsandbytes" in fails(capsys, run(workspace, command, *out))
    assert not (tmp_path / "run").exists()

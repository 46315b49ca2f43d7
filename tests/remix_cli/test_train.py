"""A whole run on a tiny model: what it leaves, and what it says when it stops early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remix_cli.progress import ProgressCallback
from tests.remix_cli.helpers import fails, run


def test_run_folder_holds_all(workspace: Path) -> None:
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert metrics["train_steps"] == 8
    assert metrics["tokens_per_s"] > 0
    assert metrics["peak_rss_mib"] > 50
    per_pool = 3 * 2 * (32 + 48)  # gate, up and down: r (in + out)
    routers = 4 * (32 + 32 + 48)
    assert metrics["trainable_parameters"] == 2 * (4 * per_pool + routers)
    assert metrics["activated_parameters"] == 2 * (2 * per_pool + routers)
    assert [entry["step"] for entry in metrics["loss_history"]] == [2, 4, 6, 8]
    assert len(metrics["routing"]["layers"]) == 6
    assert metrics["config"]["num_selections"] == 2
    assert metrics["versions"]["torch"]
    names = {path.name for path in (workspace / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} < names
    assert {"checkpoint-4", "checkpoint-8", "config.yaml"} < names
    assert not [name for name in names if name.startswith(".")]


def test_base_loss_is_that_of_the_model_alone(workspace: Path) -> None:
    """Independently: mean cross-entropy of the held-out answers under the plain model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from remix_model.data import load_examples, split_examples

    examples = load_examples(
        workspace / "sums.jsonl", prompt_template="{question}", response_field="answer"
    )
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    losses = []
    for example in split_examples(examples, 6, seed=0)[1]:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = [*prompt, *tokenizer(example.response)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    assert math.isclose(metrics["eval_loss_before"], sum(losses) / len(losses), rel_tol=1e-5)


def test_validate_counts_what_train_trains_and_changes_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workspace, "validate", "--output-dir", str(tmp_path / "new")) == 0
    output = capsys.readouterr().out
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    for key in ("total_parameters", "trainable_parameters", "activated_parameters"):
        assert f"{metrics[key]:,}" in output
    assert "6 (down_proj, gate_proj, up_proj)" in output
    assert not list(tmp_path.iterdir())


def test_samples_that_do_not_fit_are_missed_aloud(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--max-new-tokens", "61"]
    assert run(workspace, "train", *out) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "no held-out prompt leaves room for max_new_tokens=61 in the model's 64" in output


def test_non_finite_loss_stops_and_keeps_the_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path / "run"), "--save-steps", "1", "--max-steps", "4"]
    # The first step of the warm-up has the rate 0.
    code = run(workspace, "train", *out, "--learning-rate", "1e39", "--warmup-ratio", "0.5")
    error = fails(capsys, code, expected=1)
    assert "training stopped" in error
    assert "step 2" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-1'}" in error
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


def test_weights_that_are_not_finite_are_never_saved(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only step's loss is a number; what the optimizer makes of it is not."""
    folder = tmp_path / "run"
    argv = ["--learning-rate", "1e39", "--warmup-ratio", "0", "--max-steps", "1"]
    code = run(workspace, "train", "--output-dir", str(folder), *argv)
    assert "is not finite after step 1" in fails(capsys, code, expected=1)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_held_out_loss_that_is_not_finite_is_named(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nan = lambda self: {"eval_loss": math.nan}  # noqa: E731
    monkeypatch.setattr("remix_model.ReMixTrainer.evaluate", nan)
    code = run(workspace, "train", "--output-dir", str(tmp_path / "run"))
    assert "the held-out loss before training is nan" in fails(capsys, code, expected=1)


@pytest.mark.parametrize(
    ("last_step", "hint"),
    [(2, "no checkpoint was saved yet"), (5, "checkpoint-4; --resume continues from it")],
)
def test_interrupted_run_says_what_is_left(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    last_step: int,
    hint: str,
) -> None:
    count = ProgressCallback.on_step_end

    def press_ctrl_c(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count(self, args, state, control, **kwargs)
        if state.global_step == last_step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressCallback, "on_step_end", press_ctrl_c)
    code = run(workspace, "train", "--output-dir", str(tmp_path / "run"))
    captured = capsys.readouterr()
    assert code == 130
    assert captured.err == "remix: error: interrupted\n"
    output = captured.out.replace("\n", "")  # the console folds a path where the line ends
    assert f"stopped at step {last_step}" in output
    assert hint.replace(" ", "") in output.replace(" ", "")


def test_debug_shows_the_traceback(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k"):
        run(workspace, "train", "--output-dir", str(tmp_path / "run"), "--top-k", "9", "--debug")


def test_training_with_the_triton_kernels(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REMIX_BACKEND=triton in the interpreter: the same losses, up to the order of sums."""
    pytest.importorskip("triton")
    from remix_kernels._launch import observe

    launched: set[str] = set()

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> bool:
        launched.add(kernel.fn.__name__)
        return True

    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("REMIX_BACKEND", backend)
        monkeypatch.setenv("REMIX_STRICT", "1")
        folder = tmp_path / backend
        short = ("--max-steps", "1", "--logging-steps", "1", "--num-samples", "0")
        short += ("--warmup-ratio", "0", "--per-device-train-batch-size", "2", "--eval-size", "2")
        with observe(note):
            code = run(workspace, "train", "--output-dir", str(folder), *short)
        assert code == 0
        assert bool(launched) == (backend == "triton")
        metrics = json.loads((folder / "metrics.json").read_text())
        losses = [entry["loss"] for entry in metrics["loss_history"]]
        found[backend] = [metrics["eval_loss_before"], *losses, metrics["eval_loss_after"]]
    assert found["triton"] == pytest.approx(found["torch"], rel=1e-4)
    score = "_unordered_log_prob_bwd_kernel"
    assert {"_dense_bwd_gram_kernel", "_sample_top_k_fwd_kernel", score} < launched

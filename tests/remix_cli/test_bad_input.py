"""Bad input is named in one line, by `validate` and `train` alike, before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remix_cli import main
from tests.remix_cli.helpers import contents, cut, fails, make_model, run


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail a test whose command comes as far as loading weights."""

    def too_late(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    if "workspace" in request.fixturenames:
        request.getfixturevalue("workspace")  # its run has weights
    monkeypatch.setattr("remix_cli.train.load_base", too_late)
    monkeypatch.setattr("remix_cli.prepare.load_base", too_late)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "5"], "top_k"),
        (["--top-k", "0"], "top_k"),
        (["--r", "0"], "r"),
        (["--num-selections", "1"], "num_selections=1"),
        (["--grad-selections", "9"], "grad_selections=9 is out of range"),
        (["--selection-chunk-size", "0"], "selection_chunk_size"),
        (["--temperature", "0"], "temperature=0"),
        (["--routing-granularity", "sequence", "--train-on", "all"], "set train_on=response"),
        (["--model", "/no/such/model"], "no model folder '/no/such/model'"),
        (["--dataset", "missing.jsonl"], "no data file missing.jsonl"),
        (["--response-field", "reply"], "line 1 has no field 'reply', only 'question', 'answer'"),
        (["--prompt-template", "{q}"], "line 1 has no field 'q'"),
        (["--eval-size", "36"], "holds out 36 of 36 examples"),
        (["--eval-size", "0", "--eval-steps", "1"], "eval_steps needs held-out data"),
        (["--train-sampling-strategy", "batch_rebalance"], "give gradient_accumulation_steps=2 or"),
        (["--warmup-ratio", "10"], "warmup_ratio must be a share below 1, got 10.0"),
        (["--max-length", "100"], "max_length=100 is more than the model's limit of 64"),
        (["--max-length", "4"], "tokens long and max_length is 4"),
        (["--max-steps", "0"], "max_steps=0: give at least 1, or -1"),
        (["--max-steps", "-5"], "max_steps=-5: give at least 1, or -1"),
        (["--max-steps", "-1", "--num-train-epochs", "0"], "num_train_epochs=0.0 would train"),
        (["--target-modules", "no_such_proj"], "no_such_proj"),
        (["--target-modules", "embed_tokens"], "embed_tokens"),
        (["--target-modules", "input_layernorm"], "input_layernorm"),
        (["--target-modules", "("], "target_modules='(' is not a regular expression"),
        (["--layers-to-transform", "7"], "7"),
        (["--attn-implementation", "foo"], 'attn_implementation="foo"'),
    ],
    ids=lambda value: " ".join(value)[2:] if isinstance(value, list) else "",
)
def test_bad_option_is_named(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    for command in ("validate", "train"):
        code = run(workspace, command, "--output-dir", str(tmp_path / "run"), *argv)
        assert message in fails(capsys, code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["--backend", "REMIX_BACKEND"])
def test_backend_that_is_not_there_is_named(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """Triton does not compile for a CPU; nor is its interpreter asked for here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flag, message = [], "REMIX_BACKEND='triton' is not available"
    if source == "REMIX_BACKEND":
        monkeypatch.setenv("REMIX_BACKEND", "triton")
    else:
        flag, message = ["--backend", "triton"], "backend='triton' is not available"
    for command in ("validate", "train"):
        code = run(workspace, command, "--output-dir", str(tmp_path / "run"), *flag)
        assert message in fails(capsys, code)
    adapter = ["--adapter", str(workspace / "run"), *flag]
    assert message in fails(capsys, main(["eval", *adapter]))
    assert message in fails(capsys, main(["generate", *adapter, "--prompt", "a"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no tokenizer", "holds no tokenizer: save one there with tokenizer.save_pretrained"),
        ("20 tokens", "knows 20 tokens: they do not belong together"),
        ("broken config", "cannot load the configuration"),
        ("no config", "holds no config.json"),
        ("broken tokenizer", "cannot load the tokenizer"),
    ],
    ids=lambda value: value if " " in value and len(value) < 20 else "",
)
def test_bad_model_folder_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    config = model / "config.json"
    if damage == "no tokenizer":
        for path in model.glob("*token*"):
            path.unlink()
    elif damage == "20 tokens":
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 20}))
    elif damage == "broken config":
        cut(config)
    elif damage == "no config":
        config.unlink()
    else:
        cut(model / "tokenizer.json")
    before = contents(tmp_path)
    for command in ("validate", "train"):
        argv = ["--model", str(model), "--output-dir", str(tmp_path / "run")]
        assert message in fails(capsys, run(workspace, command, *argv))
    assert contents(tmp_path) == before


def test_truncated_weights_are_named_and_leave_no_folder(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # here weights are what is read
    model = make_model(tmp_path / "model")
    cut(model / "model.safetensors")
    before = contents(tmp_path)
    argv = ["--model", str(model), "--output-dir", str(tmp_path / "run")]
    assert "cannot load the model of" in fails(capsys, run(workspace, "train", *argv))
    adapter = ["--adapter", str(workspace / "run"), "--model", str(model)]
    assert "cannot load the model of" in fails(capsys, main(["eval", *adapter]))
    assert "cannot load the model of" in fails(
        capsys, main(["generate", *adapter, "--prompt", "a"])
    )
    assert contents(tmp_path) == before

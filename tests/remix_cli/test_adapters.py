"""What `eval` and `generate` say of a folder that holds no adapter of ours, or another model's."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from remix_cli import main
from tests.damage import DAMAGES, canary
from tests.remix_cli.helpers import cut, fails, make_model

COMMANDS = [["eval"], ["generate", "--prompt", "a"]]


@pytest.mark.parametrize("command", COMMANDS, ids=["eval", "generate"])
def test_incomplete_adapters_are_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    folder = tmp_path / "adapter"
    argv = [*command, "--adapter", str(folder)]
    assert "no adapter folder" in fails(capsys, main(argv))
    folder.mkdir()
    assert "holds no adapter_config.json" in fails(capsys, main(argv))
    for name in ("adapter_config.json", "config.yaml"):
        shutil.copy(workspace / "run" / name, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    assert "read from safetensors only" in fails(capsys, main(argv))

    weights = folder / "adapter_model.safetensors"
    shutil.copy(workspace / "run" / weights.name, weights)
    cut(weights)
    assert "truncated or damaged" in fails(capsys, main(argv))
    shutil.copy(workspace / "run" / weights.name, weights)
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "lora_A.weight (12 tensors missing, 18 unknown)"),
        ({"peft_type": "NEW"}, "describes an adapter of type 'NEW': this command needs a mixture"),
        ({"peft_type": None}, "describes an adapter of type None: this command needs a mixture"),
        ({"r": "two"}, "r='two' must be an integer"),
        ("[1]", "adapter_config.json must hold an object, got list"),
        ("{bad", "adapter_config.json is not JSON"),
        ("[" * 100_000, "adapter_config.json is not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("command", COMMANDS, ids=["eval", "generate"])
def test_bad_adapter_config_is_named(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    change: dict[str, object] | str,
    message: str,
) -> None:
    path = finished / "adapter_config.json"
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(change)
    assert message in fails(capsys, main([*command, "--adapter", str(finished)]))


def test_other_base_model_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", hidden_size=16)
    argv = ["generate", "--adapter", str(workspace / "run"), "--prompt", "a"]
    assert "trained for base model" in fails(capsys, main([*argv, "--model", str(other)]))


@pytest.mark.filterwarnings("ignore:the adapter was trained on")
@pytest.mark.parametrize("command", COMMANDS, ids=["eval", "generate"])
def test_base_model_that_does_not_know_the_tokens_is_named(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Its shapes fit the adapter, and its embedding ends before the tokenizer does."""
    other = make_model(tmp_path / "other", vocab_size=20)
    argv = [*command, "--adapter", str(workspace / "run"), "--model", str(other)]
    assert "knows 20 tokens: they do not belong together" in fails(capsys, main(argv))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(DAMAGES)[::6])
def test_damaged_adapters_are_refused_in_a_sentence(
    finished: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`tests/remix_model/test_damaged_adapters.py` has all the damages, by other doors."""
    DAMAGES[name](finished, random.Random(name))
    command = COMMANDS[len(name) % 2]
    assert str(finished) in fails(capsys, main([*command, "--adapter", str(finished)]))
    assert not canary(finished).exists()


def test_a_folder_does_not_decide_that_its_code_is_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an adapter's run configuration nor its base model: only the flag does."""
    model = make_model(finished / "model")
    (model / "evil.py").write_text(f"open({str(finished / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": code})
    )
    path = finished / "config.yaml"
    lines = path.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    path.write_text(re.sub("^model:.*", f"model: {model}", lines, flags=re.M))
    for command in COMMANDS:
        fails(capsys, main([*command, "--adapter", str(finished)]))
        assert not (finished / "ran").exists()
    with suppress(Exception):  # no model comes out of it
        main([*COMMANDS[1], "--adapter", str(finished), "--trust-remote-code"])
    assert (finished / "ran").exists(), "the trap must be one"

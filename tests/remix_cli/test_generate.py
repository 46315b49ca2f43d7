"""`remix generate`: its prompts, answers beside the base model's, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from remix_cli import main
from tests.remix_cli.helpers import fails


def test_generate_compares_and_streams(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = ["--adapter", str(workspace / "run" / "checkpoint-8")]
    assert main(["generate", *adapter, "--prompt", "1+2?", "--compare"]) == 0
    output = capsys.readouterr().out
    assert output.index("base model") < output.index("with the adapter")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("1+2?")
    assert main(["generate", *adapter, "--prompt-file", str(prompt)]) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    assert answer in output
    with prompt.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["generate", *adapter]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a" * 61], "exceed the model's 64 positions"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt-file", "no-file.txt"], "no-file.txt: No such file"),
        (["--prompt-file", "{folder}/model/model.safetensors"], "is not UTF-8 text"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be a number of at least 0"),
        (["--prompt", "a", "--temperature", "inf"], "temperature must be a number of at least 0"),
        (["--prompt", "a", "--top-p", "nan"], "top_p in (0, 1]"),
        (["--prompt", "a", "--seed", "-1"], "between 0 and 2**32 - 1"),
    ],
    ids=lambda value: " ".join(value)[2:20] if isinstance(value, list) else "",
)
def test_bad_options_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    argv = [word.format(folder=workspace) for word in argv]
    assert message in fails(capsys, main(["generate", "--adapter", str(workspace / "run"), *argv]))

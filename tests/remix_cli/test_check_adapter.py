"""`remix validate --adapter`: a sound one is described, and what is wrong with another is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from remix_cli import main
from tests.damage import DAMAGES, canary
from tests.remix_cli.helpers import contents, fails, make_model


def test_a_sound_adapter_is_described(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    for folder in (finished, finished / "checkpoint-4"):
        assert main(["validate", "--adapter", str(folder)]) == 0
        output = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "adapted linears 6 (down_proj, gate_proj, up_proj)" in output
        assert "tensors 18" in output
        assert "sound and fits its base model" in output
        assert "not trained" not in output
    assert contents(finished) == before


def test_an_untrained_adapter_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t * ("lora_B" not in name) for name, t in tensors.items()}, path)
    assert main(["validate", "--adapter", str(finished)]) == 0
    assert "it was not trained" in capsys.readouterr().out


def test_what_is_no_mixture_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LoraConfig(base_model_name_or_path="anything").save_pretrained(str(finished))
    error = fails(capsys, main(["validate", "--adapter", str(finished)]))
    assert "describes an adapter of type 'LORA': this command needs a mixture" in error


def test_another_base_model_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", hidden_size=16)
    code = main(["validate", "--adapter", str(finished), "--model", str(other)])
    error = fails(capsys, code)
    assert f"adapter_model.safetensors does not fit {str(other)!r}" in error
    assert "as [4, 2, 48], which needs" in error or "as [4, 2, 32], which needs" in error
    assert "with --model" in error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(DAMAGES)[1::4])
def test_damage_is_named(finished: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    DAMAGES[name](finished, random.Random(name))
    assert str(finished) in fails(capsys, main(["validate", "--adapter", str(finished)]))
    assert not canary(finished).exists()

"""What the command line's tests share: a tiny model, a command's run, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remix_cli import main


def make_model(
    folder: Path, hidden_size: int = 32, vocab_size: int | None = None, positions: int = 64
) -> Path:
    """A random two-layer Llama with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size or len(vocab),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(workspace: Path, command: str, *argv: str) -> int:
    """A command with the workspace's configuration."""
    return main([command, "--config", str(workspace / "c.yaml"), *argv])


def fails(capsys: pytest.CaptureFixture[str], code: int, expected: int = 2) -> str:
    """Check that a command failed as a user's mistake should, and return its sentence."""
    error = capsys.readouterr().err
    assert code == expected, error
    assert error.startswith("remix: error: ")
    assert error.count("\n") == 1, error
    return error


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with a file's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def cut(path: Path) -> None:
    """Leave a file's first half, as a full disk or a killed process would."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])

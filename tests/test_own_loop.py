"""`examples/own_loop.py` runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import ROOT


def save_tiny_model(folder):
    words = [str(n) for n in range(64)] + ["times", "plus", "seven", "is", "and", ",", "."]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="and"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": len(words)}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))
    model.save_pretrained(folder)
    return model


def test_own_loop(tmp_path, monkeypatch, capsys):
    """In at most 30 lines: the loss falls, A, B and router get gradients, the adapter loads."""
    script, adapter = ROOT / "examples" / "own_loop.py", tmp_path / "adapter"
    assert len(script.read_text().splitlines()) <= 30
    base = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "model"), str(adapter)])
    torch.manual_seed(0)
    ran = runpy.run_path(str(script))
    losses = [float(value) for value in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.2
    batch = {key: value for key, value in ran["batch"].items() if key != "token_type_ids"}
    loaded = PeftModel.from_pretrained(base.to("cpu"), adapter).eval()
    with torch.no_grad():
        want = ran["model"].eval()(**batch).loss
        assert torch.equal(loaded(**batch).loss, want)
    moved = {
        n: ran["optimizer"].state[p] for n, p in ran["model"].named_parameters() if p.requires_grad
    }
    assert sum("router" in name for name in moved) == 3
    assert all(bool(state["exp_avg"].any()) for state in moved.values())

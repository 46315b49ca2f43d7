"""A fixed choice of experts as a plain LoRA: the same numbers.

`test_save_load` has the process that knows nothing of remix_model.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from remix_model import ReMixConfig, export_static_lora, force_selection, record_routing
from remix_model.site import find_sites

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def forced(model, batch, chosen):
    with force_selection(model, {name: torch.tensor(index) for name, index in chosen.items()}):
        return logits(model, batch)


def shake(model):
    """Move everything that is trained away from its start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()

    return make


CONFIGS = {
    "default": {},
    "k1": {"top_k": 1},
    "k-is-n": {"top_k": 4},
    "lora-scaling": {"use_rslora": False, "lora_alpha": 3.0},
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "regex": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "one-layer": {"layers_to_transform": [1]},
    "block": {"router_sharing": "block"},
    "sequence": {"routing_granularity": "sequence"},
    "bias": {"bias": "remix_only"},
    "all-biases": {"bias": "all"},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_forced_model(
    config, make_llama, make_remix, make_batch, random_selections, tmp_path
):
    make = lambda: make_llama(dtype=torch.float32, mlp_bias=True)  # noqa: E731
    model, batch = shake(make_remix(make(), **config)).eval(), make_batch()
    chosen = export_static_lora(model, random_selections(model), tmp_path)
    want = forced(model, batch, chosen)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), want, **TOLERANCE)
    if config.get("top_k") != 4:
        assert (logits(model, batch) - want).abs().max() > 0.01


def test_ranks_and_scalings_that_differ(
    make_llama, make_remix, make_batch, random_selections, tmp_path
):
    """Of one linear, from the others'."""
    model, batch = make_remix(make_llama(dtype=torch.float32)), make_batch()
    own = {"r": 5, "num_experts": 4, "top_k": 2, "lora_alpha": 3.0, "init_lora_weights": False}
    name = "base_model.model.model.layers.1.mlp.up_proj"
    model.get_submodule(name).update_layer("default", ReMixConfig(**own))
    chosen = export_static_lora(model.eval(), random_selections(model), tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(dtype=torch.float32), tmp_path).eval()
    assert loaded.get_submodule(name).r["default"] == 10
    torch.testing.assert_close(logits(loaded, batch), forced(model, batch, chosen), **TOLERANCE)


def test_conv1d(make_gpt2, make_remix, make_batch, random_selections, tmp_path):
    """GPT-2's linears, whose weights are transposed."""
    model, batch = make_remix(make_gpt2()).eval(), make_batch()
    chosen = export_static_lora(model, random_selections(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    loaded = PeftModel.from_pretrained(make_gpt2(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), forced(model, batch, chosen), **TOLERANCE)


def test_files(make_llama, make_remix, random_selections, tmp_path):
    model = make_remix(make_llama(dtype=torch.bfloat16))
    export_static_lora(model, random_selections(model), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert {k: tuple(v.shape) for k, v in tensors.items() if k.startswith(prefix)} == {
        f"{prefix}.lora_A.weight": (4, 32),
        f"{prefix}.lora_B.weight": (48, 4),
    }
    assert len(tensors) == 12
    own = model.get_submodule(prefix).remix_lora_A["default"]
    assert all(tensor.dtype == own.dtype for tensor in tensors.values())


# Which experts -----------------------------------------------------------------------------------


def test_most_frequent(make_llama, make_remix, make_batch, tmp_path):
    """The k experts with the largest counts, counted here by hand."""
    model, batch = make_remix(make_llama(dtype=torch.float32)).eval(), make_batch(sizes=(10, 10))
    name = "base_model.model.model.layers.0.mlp.gate_proj"
    inputs = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with record_routing(model) as recorder:
        logits(model, batch)
    hook.remove()
    index = (inputs[0] @ layer.remix_router["default"].T).topk(2, dim=-1).indices
    counts = index.flatten().bincount(minlength=4).tolist()
    chosen = export_static_lora(model, "most_frequent", tmp_path / "recorded")
    assert len(set(counts)) == 4, "no ties in this test's data"
    assert chosen[name] == sorted(sorted(range(4), key=counts.__getitem__)[-2:])
    assert export_static_lora(model, recorder.stats(), tmp_path / "stats") == chosen


def test_the_last_record_counts(make_llama, make_remix, make_batch, tmp_path):
    model = make_remix(make_llama(dtype=torch.float32)).eval()
    for i, experts in enumerate(([0, 3], [1, 2])):
        index = {name: torch.tensor(experts) for name in find_sites(model)}
        with record_routing(model), force_selection(model, index):
            logits(model, make_batch())
        chosen = export_static_lora(model, "most_frequent", tmp_path / str(i))
        assert all(value == experts for value in chosen.values())


def test_bad_selections_are_named(make_llama, make_remix, random_selections, tmp_path):
    model = make_remix(make_llama(dtype=torch.float32))
    good = random_selections(model)
    name = list(good)[1]
    for selection, message in [
        ("most_frequent", r"record_routing\(model\)"),
        ("most-frequent", "selection='most-frequent' is unknown"),
        ({k: v for k, v in good.items() if k != name}, f"lacks '{name}'"),
        ({**good, "lm_head": good[name]}, "names unknown 'lm_head'"),
        ({**good, name: [0, 4]}, "experts are numbered 0 to 3"),
        ({**good, name: [1, 1]}, "names an expert twice"),
        ({**good, name: [1]}, r"it must be integer \[\.\.\., 2\]"),
        ({**good, name: ["a", "b"]}, r"\['a', 'b'\]; it must be the numbers"),
        ({**good, name: [[0, 1], [2, 3]]}, r"a LoRA holds one for all tokens: \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_static_lora(model, selection, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_other_models_are_refused(make_llama, make_remix, random_selections, tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match="Sequential is no PEFT model"):
        export_static_lora(nn.Sequential(), "most_frequent", tmp_path)
    with pytest.raises(ValueError, match="activate one ReMix adapter"):
        export_static_lora(get_peft_model(make_llama(), LoraConfig()), "most_frequent", tmp_path)
    model = make_remix(make_llama(dtype=torch.float32))
    export_static_lora(model, random_selections(model), tmp_path)
    with pytest.raises(ValueError, match="holds an adapter already"):
        export_static_lora(model, random_selections(model), tmp_path)


def test_half_an_export_is_no_adapter(
    make_llama, make_remix, random_selections, monkeypatch, tmp_path
):
    """And may be written again."""

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = make_remix(make_llama(dtype=torch.float32))
    index = random_selections(model)
    with monkeypatch.context() as patch:
        patch.setattr("remix_model.export.save_file", disk_full)
        with pytest.raises(OSError, match="No space"):
            export_static_lora(model, index, tmp_path)
    export_static_lora(model, index, tmp_path)


def test_one_of_several_adapters(make_llama, make_remix, make_batch, random_selections, tmp_path):
    """The active one, whatever its name."""
    model, batch = make_remix(make_llama(dtype=torch.float32)), make_batch()
    second = ReMixConfig(r=3, num_experts=5, top_k=3, init_lora_weights=False)
    model.add_adapter("second", second)
    model.set_adapter("second")
    chosen = export_static_lora(model.eval(), random_selections(model), tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(dtype=torch.float32), tmp_path).eval()
    assert loaded.peft_config["default"].r == 9
    torch.testing.assert_close(logits(loaded, batch), forced(model, batch, chosen), **TOLERANCE)

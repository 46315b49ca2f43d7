"""Which linears are adapted, and errors that name the value and the linears there are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from remix_model import ReMixConfig, ReMixModel
from remix_model.site import find_sites
from remix_model.tuner import ReMixLayer

LINEARS = "LlamaForCausalLM are named q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ReMixLayer)}


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_default_targets_are_the_feed_forward_linears(make_remix):
    model = make_remix()
    names = {name.removeprefix("base_model.model.") for name in adapters(model)}
    assert names == {
        f"model.layers.{i}.mlp.{p}" for i in range(2) for p in ("gate_proj", "up_proj", "down_proj")
    }
    assert isinstance(model.base_model, ReMixModel)
    assert set(find_sites(model)) == set(adapters(model))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = ("remix_lora_A.default", "remix_lora_B.default", "remix_router.default")
    assert trained == {f"{name}.{kind}" for name in adapters(model) for kind in kinds}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj", "down_proj"]}, 4),
        ({"target_modules": r".*layers\.1\.mlp\.(up|gate)_proj"}, 2),
        ({"layers_to_transform": [0]}, 3),
        ({"exclude_modules": ["up_proj"]}, 4),
    ],
    ids=["all-linear", "names", "regex", "layers", "exclude"],
)
def test_targets_may_be_chosen(config, count, make_remix, make_batch):
    model = make_remix(**config)
    assert len(adapters(model)) == count
    assert logits(model, make_batch()).isfinite().all()


def make_t5(kind):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, vocab_size=64, decoder_start_token_id=0, feed_forward_proj=kind)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("kind", "names"), [("relu", {"wi", "wo"}), ("gated-gelu", {"wi_0", "wi_1", "wo"})]
)
def test_defaults_may_name_more_than_a_model_has(kind, names, make_remix, tmp_path):
    """T5's block has wi, or wi_0 and wi_1: both are known names, also after saving."""
    base, ids = make_t5(kind), torch.randint(3, 64, (2, 7))
    model = make_remix(copy.deepcopy(base)).eval()
    assert {name.rsplit(".", 1)[-1] for name in adapters(model)} == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        want, got = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded))
    assert torch.equal(got, want)


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["no_such_proj"]}, r"no_such_proj"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens.*Embedding is not a linear"),
        ({"target_modules": ["input_layernorm"]}, r"input_layernorm.*RMSNorm is not a linear"),
        ({"target_modules": ["mlp"]}, r"mlp.*LlamaMLP is not a linear"),
    ],
    ids=["nothing", "embedding", "norm", "block"],
)
def test_targets(options, message, make_llama):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_llama(), ReMixConfig(**options))


def test_unknown_architecture_asks_for_targets():
    class Model(nn.Module):
        config = {"model_type": "novel"}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"specify `target_modules`.*'novel' are not known"):
        get_peft_model(Model(), ReMixConfig())
    get_peft_model(Model(), ReMixConfig(target_modules=["linear"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["down_proj", "gate"]}, r"names 'gate', which is not there"),
        ({"target_modules": ["ffn_1", "ffn_2"]}, r"names 'ffn_1', which is not there"),
        ({"target_modules": []}, r"leaves nothing to adapt"),
        ({"target_modules": r"ffn_\d"}, r"'target_modules': 'ffn_.*leaves nothing to adapt"),
        (
            {"target_modules": ["up_proj"], "exclude_modules": ["up_proj"]},
            r"'exclude_modules': \{'up_proj'\}.*nothing to adapt",
        ),
    ],
    ids=["one-unmatched", "all-unmatched", "empty", "regex", "all-excluded"],
)
def test_targets_that_are_not_there(options, message, make_llama):
    with pytest.raises(ValueError, match=f"{message}.*{LINEARS}"):
        get_peft_model(make_llama(), ReMixConfig(**options))


@pytest.mark.parametrize("layers", [[7], [0, 2], 2], ids=str)
def test_layers_that_are_not_there(layers, make_llama):
    """Of two; also where another number is there. The model is as it was."""
    model = make_llama()
    before = [name for name, _ in model.named_modules()]
    wrong = layers if isinstance(layers, int) else layers[-1]
    with pytest.raises(ValueError, match=f"layers_to_transform names layer {wrong}, and .*Llama"):
        get_peft_model(model, ReMixConfig(layers_to_transform=layers))
    assert [name for name, _ in model.named_modules()] == before


def test_targets_of_a_second_adapter(make_remix):
    """The linears' names are still the model's, though adapters are in between."""
    config = ReMixConfig(r=2, num_experts=4, top_k=2, target_modules=["gate"])
    with pytest.raises(ValueError, match=f"names 'gate', which is not there.*{LINEARS}"):
        make_remix().add_adapter("other", config)


def test_targets_of_a_model_without_a_configuration():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"names '1st'.*linears of Sequential are named 0, 2"):
        get_peft_model(model, ReMixConfig(target_modules=["1st"]))
    assert len(adapters(get_peft_model(model, ReMixConfig(target_modules=["2"])))) == 1

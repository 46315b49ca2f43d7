"""Trained LoRAs as the pool: each expert is its LoRA exactly, and what does not fit is named."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from remix_model import ReMixConfig, force_selection, from_lora_adapters
from remix_model.site import find_sites

LORAS = {
    "rank-4": {"r": 4, "lora_alpha": 7},
    "rank-3-rslora": {"r": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "rank_pattern": {"layers.1.mlp.up_proj": 4},
        "alpha_pattern": {"down_proj": 3.0},
    },
}
TARGETS = ["up_proj", "down_proj", "q_proj"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def forced(model, batch, experts):
    index = {name: torch.tensor(experts) for name in find_sites(model)}
    with force_selection(model, index):
        return logits(model, batch)


@pytest.fixture
def make_base(make_llama):
    return lambda **config: make_llama(dtype=torch.float32, **config)


@pytest.fixture
def save_lora(make_base, tmp_path):
    """save_lora(name, **LoraConfig fields): (folder, the trained model)."""

    def save(name, seed=0, **config):
        torch.manual_seed(seed)
        model = get_peft_model(make_base(), LoraConfig(**{"target_modules": TARGETS, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model.eval()

    return save


@pytest.fixture
def trained(save_lora):
    """[(folder, model)] of three LoRAs, of other ranks and scalings."""
    return [save_lora(name, seed, **config) for seed, (name, config) in enumerate(LORAS.items())]


def pool(base, trained, **config):
    given = {"r": 4, "num_experts": len(trained), "top_k": 1, **config}
    return from_lora_adapters(base, [folder for folder, _ in trained], ReMixConfig(**given)).eval()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": False},
        {"r": 5, "lora_alpha": 16.0},
        {"target_modules": TARGETS},
        {"router_sharing": "block"},
        {"r": 2, "rank_pattern": {".*_proj": 4}},
    ],
    ids=str,
)
def test_every_expert_is_its_lora(config, make_base, make_batch, trained):
    model, batch = pool(make_base(), trained, **config), make_batch()
    for expert, (_, lora) in enumerate(trained):
        want = logits(lora, batch)
        torch.testing.assert_close(forced(model, batch, [expert]), want, **TOLERANCE)


def test_a_set_of_experts_is_the_sum_of_its_loras(make_base, make_batch, trained):
    """As PEFT has it with several active adapters."""
    model, batch = pool(make_base(), trained, top_k=2), make_batch()
    lora = PeftModel.from_pretrained(make_base(), trained[0][0], "0")
    lora.load_adapter(trained[2][0], "2")
    lora.base_model.set_adapter(["0", "2"])
    want = logits(lora.eval(), batch)
    torch.testing.assert_close(forced(model, batch, [2, 0]), want, **TOLERANCE)


def test_padding_can_be_trained(make_base, make_batch, trained, sampled_loss):
    """Columns of B beyond a LoRA's rank are zero, and get a gradient."""
    model = pool(make_base(), trained, top_k=2).train()
    name = "base_model.model.model.layers.0.mlp.down_proj"
    b = model.get_submodule(name).remix_lora_B["default"]
    assert not b[2, :, 2:].any() and b[2, :, :2].all() and b[0].all()
    sampled_loss(model, make_batch())[0].backward()
    assert b.grad[2, :, 2:].any()
    assert model.get_submodule(name).remix_router["default"].grad.any()


def test_saved_and_loaded(make_base, make_batch, trained, tmp_path):
    model, batch = pool(make_base(), trained), make_batch()
    model.save_pretrained(tmp_path / "pool")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "pool").eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_exported_again(make_base, make_batch, trained, tmp_path):
    """There and back."""
    from remix_model import export_static_lora

    model, batch = pool(make_base(), trained), make_batch()
    export_static_lora(model, {name: [1] for name in find_sites(model)}, tmp_path / "back")
    back = PeftModel.from_pretrained(make_base(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(back, batch), logits(trained[1][1], batch), **TOLERANCE)


# What does not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4}, "num_experts=4, and 3 LoRAs"),
        ({"r": 3}, r"r=3, and the LoRA in .*rank-4 has rank 4"),
        ({"target_modules": ["up_proj"]}, r"rank-4 adapts .* and config does not \(2 and 6"),
        ({"target_modules": [*TARGETS, "k_proj"]}, r"config adapts .*k_proj and .* does not"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(config, message, make_base, trained):
    with pytest.raises(ValueError, match=message):
        pool(make_base(), trained, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["up_proj"]}, "all experts of a pool adapt the same linears"),
        ({"use_dora": True}, "has use_dora=True, which a pool of LoRAs cannot hold"),
        ({"bias": "lora_only"}, "has bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices="),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*, which is no linear's A or B"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights too"),
    ],
    ids=str,
)
def test_loras_that_do_not_fit(config, message, make_base, save_lora, trained):
    other = save_lora("other", **config)
    with pytest.raises(ValueError, match=message):
        pool(make_base(), [*trained, other])


def test_damaged_loras_are_named(make_base, save_lora, trained, tmp_path):
    def refused(message, folder=trained[1][0]):
        with pytest.raises(ValueError, match=message):
            pool(make_base(), [trained[0], (folder, None)])

    weights, config = (
        trained[1][0] / f"adapter_{name}" for name in ("model.safetensors", "config.json")
    )
    tensors, whole, text = load_file(weights), weights.read_bytes(), config.read_text()
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    refused("holds no adapter_config.json", tmp_path)
    save_file({**tensors, name: torch.zeros(2, 32)}, weights)
    refused(r"A \[2, 32\] and B \[48, 3\]")
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refused(r"A \[\] and B \[48, 3\]")
    b = name.replace("lora_A", "lora_B")
    save_file({**tensors, name: torch.zeros(0, 32), b: torch.zeros(48, 0)}, weights)
    refused(r"A \[0, 32\] and B \[48, 0\]")
    save_file({}, weights)
    refused("adapts nothing")
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    refused("numbers that are not finite")
    weights.write_bytes(whole[:-1])
    refused("truncated or damaged")
    weights.write_bytes(whole)
    for change, message in [
        ({"peft_type": "REMIX"}, "of type 'REMIX': the pool is made of LoRAs"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ]:
        config.write_text(json.dumps({**json.loads(text), **change}))
        refused(message)
    config.write_text("{")
    refused("is not JSON")
    weights.unlink()
    config.write_text(text)
    refused(r"holds no adapter_model\.safetensors")


def test_the_given_configuration_stays_as_it_is(make_base, trained):
    config = ReMixConfig(r=4, num_experts=3, top_k=1)
    before = config.to_dict()
    from_lora_adapters(make_base(), [folder for folder, _ in trained], config)
    assert config.to_dict() == before


def test_another_base(make_base, trained):
    with pytest.raises(ValueError, match=r"is 48 -> 32 in this model and|is 32 -> 64 in this"):
        pool(make_base(intermediate_size=64), trained)
    base = make_base()
    base.name_or_path = "here/other-model"
    config = json.loads((trained[0][0] / "adapter_config.json").read_text())
    for folder, _ in trained:
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": "there/model", "r": 4})
        )
    with pytest.warns(UserWarning, match=r"trained on 'there/model' and becomes an expert on"):
        pool(base, trained)

"""What PEFT and transformers offer for adapters: states, exchange in place, ranks by name."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from remix_model import ReMixConfig, token_losses
from remix_model.site import find_sites
from remix_model.tuner import ReMixLayer

POOL = {"r": 2, "num_experts": 4, "top_k": 2, "init_lora_weights": False, "router_init_range": 0.5}


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def own_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".remix_" in name}


# Ranks by name ------------------------------------------------------------------------------------


def test_rank_pattern(make_remix, make_llama, make_batch, tmp_path):
    ranks = {"up_proj": 3, r"layers\.1\.mlp\.down_proj": 5}
    model, batch = make_remix(rank_pattern=ranks).eval(), make_batch()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ReMixLayer):
            found[name.split("layers.")[1]] = layer.r["default"]
            shapes = layer.remix_lora_A["default"].shape[1], layer.remix_lora_B["default"].shape[2]
            assert shapes == (layer.r["default"],) * 2
            assert layer.scaling["default"] == 2 / (2 * layer.r["default"]) ** 0.5
    assert found == {
        "0.mlp.gate_proj": 2, "0.mlp.up_proj": 3, "0.mlp.down_proj": 2,
        "1.mlp.gate_proj": 2, "1.mlp.up_proj": 3, "1.mlp.down_proj": 5,
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (["up_proj"], "must be a dict"),
        ({"up_proj": 0}, r"rank_pattern\['up_proj'\]=0; a rank"),
        ({"up_proj": True}, r"rank_pattern\['up_proj'\]=True; a rank"),
        ({"(": 2}, r"rank_pattern='\(' is not a regular expression"),
    ],
    ids=str,
)
def test_bad_rank_pattern(pattern, message):
    with pytest.raises(ValueError, match=message):
        ReMixConfig(rank_pattern=pattern)


# Exchange in place --------------------------------------------------------------------------------


@pytest.fixture
def other(make_remix, make_llama, make_batch, tmp_path):
    """other(**config): (folder of another adapter, what it makes of the batch)."""

    def make(**config):
        model = make_remix(make_llama(), seed=9, **config).eval()
        model.save_pretrained(tmp_path / "other")
        return tmp_path / "other", logits(model, make_batch())

    return make


@pytest.mark.parametrize("sharing", ["module", "block"])
def test_hotswap(sharing, other, make_remix, make_batch):
    folder, want = other(router_sharing=sharing)
    model, batch = make_remix(router_sharing=sharing).eval(), make_batch()
    places = {name: p.data_ptr() for name, p in own_parameters(model).items()}
    assert not torch.equal(logits(model, batch), want)
    hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model, batch), want)
    assert {name: p.data_ptr() for name, p in own_parameters(model).items()} == places


def test_hotswap_checks_the_file(other, make_remix, make_batch):
    folder, _ = other()
    model, batch = make_remix().eval(), make_batch()
    before = logits(model, batch)
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="numbers that are not finite"):
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle that can run code"):
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"top_k": 3}, "for top_k, 2 != 3"),
        ({"lora_alpha": 4.0}, r"for lora_alpha, 2\.0 != 4\.0"),
        ({"routing_granularity": "sequence"}, "for routing_granularity, token != sequence"),
        ({"num_experts": 5}, r"as \[5, 2, 32\], which needs to be \[4, 2, 32\]"),
        ({"target_modules": ["up_proj"]}, r"lacks .*down_proj.*\(12 tensors missing"),
        ({"modules_to_save": ["lm_head"]}, "holds .*lm_head.* too: use load_adapter"),
    ],
    ids=str,
)
def test_hotswap_of_what_does_not_fit(config, message, other, make_remix, make_batch):
    folder, _ = other(**config)
    model, batch = make_remix().eval(), make_batch()
    before = logits(model, batch)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model, batch), before)


def test_hotswap_of_other_methods_is_left_alone(make_llama, make_batch, tmp_path):
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = lambda: get_peft_model(make_llama(), LoraConfig(init_lora_weights=False)).eval()  # noqa: E731
    first, second, batch = lora(), lora(), make_batch()
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, tmp_path, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(first, batch), logits(second, batch))


# States -------------------------------------------------------------------------------------------


def test_status(make_remix):
    model = make_remix()
    model.add_adapter("other", ReMixConfig(**{**POOL, "target_modules": ["up_proj"]}))
    status = get_model_status(model)
    assert status.adapter_model_type == "ReMixModel"
    assert status.peft_types == {"default": "REMIX", "other": "REMIX"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (
        True,
        ["default"],
        [],
    )
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.num_adapter_layers == 6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trainable_params == trained > 0
    layers = {layer.name.split("layers.")[1]: layer for layer in get_layer_status(model)}
    assert layers["0.mlp.up_proj"].available_adapters == ["default", "other"]
    assert layers["0.mlp.down_proj"].available_adapters == ["default"]
    assert layers["0.mlp.down_proj"].module_type == "remix.ReMixLayer"
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


# Adapters that come later -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["add", "load"])
@pytest.mark.parametrize(
    "config",
    [{"router_sharing": "block"}, {"routing_granularity": "sequence"}],
    ids=["block", "sequence"],
)
def test_a_second_adapter_is_as_good_as_the_first(
    how, config, make_remix, make_llama, make_batch, tmp_path
):
    """Its blocks share routers, its layers hear of prompts: whatever the first one does."""
    batch = make_batch()
    want_model = make_remix(make_llama(), seed=9, **config).eval()
    model = make_remix().eval()
    if how == "load":
        want_model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "second")
    else:
        torch.manual_seed(9)
        model.add_adapter("second", ReMixConfig(**POOL, **config))
    model.set_adapter("second")
    model.eval()
    with torch.no_grad():
        want, got = (token_losses(m, batch)[0] for m in (want_model, model))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_deletion_leaves_nothing(make_remix):
    model = make_remix()
    model.add_adapter("gone", ReMixConfig(**POOL))
    model.delete_adapter("gone")
    for layer in (module for module in model.modules() if isinstance(module, ReMixLayer)):
        kept = {**vars(layer), **layer._modules}
        holders = [v for v in kept.values() if isinstance(v, (dict, torch.nn.Module))]
        assert not any("gone" in dict(h.items()) for h in holders if hasattr(h, "items"))


# Without PEFT's own model -------------------------------------------------------------------------


@pytest.fixture
def make_fp32(make_llama):
    return lambda: make_llama(dtype=torch.float32)


@pytest.mark.parametrize("name", ["b", "lora", "default_2"])
def test_names_that_are_in_other_names(name, other, make_remix, make_batch):
    """What is missing is looked for by the adapter's whole name."""
    folder, want = other()
    model, batch = make_remix().eval(), make_batch()
    model.load_adapter(str(folder), name)
    model.load_adapter(str(folder), "default")
    model.set_adapter(name)
    assert torch.equal(logits(model, batch), want)


def test_a_failure_leaves_the_base_model_as_it_was(other, make_llama, make_batch):
    folder, _ = other()
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")
    base, batch = make_llama().eval(), make_batch()
    before, names = logits(base, batch), dict(base.named_modules()).keys()
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(base, str(folder))
    assert dict(base.named_modules()).keys() == names
    assert torch.equal(logits(base, batch), before)


def test_models_without_embeddings_load(make_llama, make_remix, make_batch, tmp_path, monkeypatch):
    model, batch = make_remix().eval(), make_batch()
    model.save_pretrained(tmp_path)
    base = make_llama()

    def none():
        raise NotImplementedError

    monkeypatch.setattr(base, "get_input_embeddings", none)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_transformers_load_adapter(make_fp32, make_remix, make_batch, tmp_path):
    batch, adapted = make_batch(), make_remix(make_fp32()).eval()
    adapted.save_pretrained(tmp_path)
    model = make_fp32()
    base = logits(model, batch)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model.eval(), batch), logits(adapted, batch))
    model.disable_adapters()
    assert torch.equal(logits(model, batch), base)
    model.enable_adapters()
    assert torch.equal(logits(model, batch), logits(adapted, batch))


@pytest.mark.parametrize("sharing", ["module", "block"])
def test_transformers_add_adapter(sharing, make_fp32, make_batch, sampled_loss, take_grads):
    """A model with adapters that PEFT has not wrapped trains, saves and switches likewise."""
    model, batch = make_fp32(), make_batch()
    base = logits(model, batch)
    torch.manual_seed(1)
    for name in ("first", "second"):
        model.add_adapter(ReMixConfig(**POOL, router_sharing=sharing), name)
    model.set_adapter("first")
    assert len(find_sites(model)) == (6 if sharing == "module" else 2)
    first = logits(model.eval(), batch)
    assert not torch.allclose(first, base)
    sampled_loss(model.train(), batch)[0].backward()
    own = {name: p.grad for name, p in own_parameters(model).items() if ".first" in name}
    assert all(grad is not None and grad.any() for grad in own.values())
    saved = model.get_adapter_state_dict("first")
    assert len(saved) == len(own)
    model.set_adapter("second")
    assert not torch.equal(logits(model.eval(), batch), first)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model, batch), first)


def test_transformers_refuses_another_shape(make_fp32, make_remix, tmp_path):
    make_remix(make_fp32(), num_experts=5).save_pretrained(tmp_path)
    config = ReMixConfig.from_pretrained(tmp_path)
    config.num_experts = 4
    with pytest.raises(ValueError, match="do not belong together"):
        make_fp32().load_adapter(str(tmp_path), peft_config=config)

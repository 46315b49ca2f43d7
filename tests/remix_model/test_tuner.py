"""The PEFT method: what get_peft_model makes, several adapters, copies, dtypes, configuration."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from remix_model import ReMixConfig, force_selection, record_routing, sample_routing
from remix_model.site import find_sites
from remix_model.tuner import ReMixLayer, ReMixRuntimeConfig


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ReMixLayer)}


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# Sizes, and PEFT's LoRA -----------------------------------------------------------------------


def test_parameter_counts(make_remix):
    """n = 4 LoRAs of rank 2 in layers 32 -> 48, twice, and 48 -> 32; a token takes 2."""
    model = make_remix()
    pool, router = 4 * 2 * (32 + 48), 4 * (32 + 32 + 48)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (3 * pool + router)
    assert model.base_model.activated_parameters() == 2 * (3 * pool // 2 + router)


def test_gpt2_linears_are_stored_transposed(assert_same):
    """Conv1D: forced experts equal PEFT's LoRA with fan_in_fan_out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    base = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    config = ReMixConfig(r=2, num_experts=4, top_k=2, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert len(adapters(model)) == 4
    names = ["c_fc", "mlp.c_proj"]
    options = {"target_modules": names, "fan_in_fan_out": True, "use_rslora": True}
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=2, **options)).eval()
    chosen = [3, 1]
    copy_experts(model, lora, chosen)
    ids = torch.randint(3, 64, (2, 9))
    with force_selection(model, {name: torch.tensor(chosen) for name in adapters(model)}):
        got = model(input_ids=ids).logits
    assert_same(got.detach(), lora(input_ids=ids).logits.detach(), 1e-12)


def copy_experts(model, lora, chosen):
    """Give PEFT's LoRA the chosen experts, concatenated."""
    modules = dict(lora.named_modules())
    with torch.no_grad():
        for name, layer in adapters(model).items():
            a, b = layer.remix_lora_A["default"][chosen], layer.remix_lora_B["default"][chosen]
            modules[name].lora_A["default"].weight.copy_(a.flatten(0, 1))
            modules[name].lora_B["default"].weight.copy_(b.permute(1, 0, 2).flatten(1))


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("chosen", [[2], [3, 1], [0, 1, 2, 3]], ids=str)
def test_forced_subset_is_a_lora_of_rank_kr(
    use_rslora, chosen, make_llama, make_remix, make_batch, take_grads, assert_same
):
    """The whole model, forward and gradients, against PEFT's LoRA with lora_alpha=2."""
    k, r = len(chosen), 2
    model = make_remix(top_k=k, r=r, use_rslora=use_rslora).eval()
    names = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=k * r, lora_alpha=2, use_rslora=use_rslora, target_modules=names)
    lora = get_peft_model(make_llama(), config).eval()
    copy_experts(model, lora, chosen)
    batch = make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("remix_lora" in name)
    with force_selection(model, {name: torch.tensor(chosen) for name in adapters(model)}):
        got = model(**batch)
    got.loss.backward()
    want = lora(**batch)
    want.loss.backward()
    assert_same(got.logits.detach(), want.logits.detach(), 1e-12)
    grads, lora_grads = take_grads(model), take_grads(lora)
    for name in adapters(model):
        a, b = (grads[f"{name}.remix_lora_{x}.default"] for x in "AB")
        assert_same(a[chosen].flatten(0, 1), lora_grads[f"{name}.lora_A.default.weight"], 1e-10)
        b = b[chosen].permute(1, 0, 2).flatten(1)
        assert_same(b, lora_grads[f"{name}.lora_B.default.weight"], 1e-10)


# The zero start, switching off, unloading -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("num_selections", [2, 3, 5])
def test_zero_start(
    dtype, num_selections, make_llama, make_remix, make_batch, sampled_loss, take_grads
):
    base, batch = make_llama(dtype=dtype), make_batch()
    model = make_remix(copy.deepcopy(base), init_lora_weights=True)
    assert torch.equal(logits(model.eval(), batch), logits(base, batch))
    loss, routing = sampled_loss(model.train(), batch, num_selections=num_selections)
    assert not routing.advantages.any()
    loss.backward()
    grads = take_grads(model)
    assert not any(grad.any() for name, grad in grads.items() if "router" in name)
    assert all(grad.any() for name, grad in grads.items() if "lora_B" in name)


def test_disable_adapter_equals_base(make_llama, make_remix, make_batch):
    base, batch = make_llama(), make_batch()
    model = make_remix(copy.deepcopy(base)).eval()
    adapted = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))
    assert torch.equal(logits(model, batch), adapted)
    assert not torch.equal(adapted, logits(base, batch))


def test_disabled_adapters_draw_nothing(make_llama, make_remix, make_batch):
    batch = make_batch()
    model = make_remix().train()
    with sample_routing(model, num_selections=2, seed=0) as routing:
        folded = routing.expand(batch)
        with model.disable_adapter():
            got = logits(model, folded)
    assert not routing.selections
    assert torch.equal(got, logits(make_llama(), folded))


def test_unload_gives_the_base_back(make_llama, make_remix, make_batch):
    base, batch = make_llama(), make_batch()
    unloaded = make_remix(copy.deepcopy(base)).unload()
    assert not adapters(unloaded)
    assert torch.equal(logits(unloaded, batch), logits(base, batch))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "layer"])
def test_merging_is_refused_with_the_reason(how, make_remix, make_batch):
    model, batch = make_remix().eval(), make_batch()
    before = logits(model, batch)
    layer = next(iter(adapters(model).values()))
    call = layer.merge if how == "layer" else getattr(model, how)
    with pytest.raises(ValueError, match=r"cannot be merged.*depends on each token"):
        call()
    assert torch.equal(logits(model, batch), before)


def test_adding_adapters_up_is_refused_with_the_reason(two):
    with pytest.raises(ValueError, match=r"cannot be added up.*set_adapter"):
        two.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    assert set(two.peft_config) == {"default", "other"}


# Several adapters -------------------------------------------------------------------------------


@pytest.fixture
def two(make_remix):
    """A model with adapters "default" (n=4, k=2) and "other" (n=3, k=1, r=3, LoRA type)."""
    model = make_remix()
    torch.manual_seed(5)
    options = {"r": 3, "num_experts": 3, "top_k": 1, "use_rslora": False}
    model.add_adapter("other", ReMixConfig(**options, init_lora_weights=False))
    return model.eval()


def test_adapters_are_switched(two, make_remix, make_batch):
    batch = make_batch()
    first = logits(make_remix().eval(), batch)
    assert torch.equal(logits(two, batch), first)
    two.set_adapter("other")
    second = logits(two, batch)
    assert not torch.equal(first, second)
    assert {site.top_k for site in find_sites(two).values()} == {1}
    trained = {n for n, p in two.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(".other") for name in trained)
    two.set_adapter("default")
    assert torch.equal(logits(two, batch), first)


def test_adapters_are_deleted(two, make_remix, make_batch):
    batch = make_batch()
    first = logits(two, batch)
    two.delete_adapter("other")
    assert set(two.peft_config) == {"default"}
    assert not any("other" in key for key in two.state_dict())
    assert torch.equal(logits(two, batch), first)
    assert set(find_sites(two)) == set(adapters(two))


def test_two_active_adapters_add_up(two, make_batch):
    """Both deltas are added to the frozen linear, each under its own selection and stream."""
    two.base_model.set_adapter(["default", "other"])
    name, layer = next(iter(adapters(two).items()))
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = layer.base_layer(x)
    for adapter in ("default", "other"):
        layer.set_adapter(adapter)
        want = want + layer(x) - layer.base_layer(x)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    sites = find_sites(two)
    assert {f"{name}.default", f"{name}.other"} <= set(sites)
    assert len(sites) == 2 * len(adapters(two))
    with sample_routing(two.train(), num_selections=2, seed=0) as routing:
        two(input_ids=routing.expand(make_batch())["input_ids"])
    assert len(routing.selections) == len(sites)


def test_a_layer_of_another_adapter_only_is_left_alone(make_remix, make_batch):
    """ "other" adapts q_proj too; while "default" is active those layers are the frozen linear."""
    model, batch = make_remix().eval(), make_batch()
    want = logits(model, batch)
    model.add_adapter("other", ReMixConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(logits(model, batch), want)
    assert len(find_sites(model)) == 6


# Copies, dtypes, hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_start_clean(how, make_remix, make_batch, sampled_loss):
    model, batch = make_remix().train(), make_batch()
    duplicate = copy.deepcopy if how == "deepcopy" else lambda m: pickle.loads(pickle.dumps(m))
    with sample_routing(model, num_selections=2, seed=0) as routing:
        logits(model, routing.expand(batch))
        inside = duplicate(model)
    loss, _ = sampled_loss(model, batch)
    after = duplicate(model)
    loss.backward()
    want = logits(model.eval(), batch)
    for other in (inside, after):
        assert torch.equal(logits(other, batch), want)
        assert torch.equal(sampled_loss(other, batch)[0], loss)
        sites, originals = find_sites(other), find_sites(model)
        assert all(sites[name] is not originals[name] for name in sites)


def test_bf16_model_has_fp32_adapters(make_llama, make_remix, make_batch, sampled_loss, take_grads):
    base = make_llama(dtype=torch.bfloat16)
    model, batch = make_remix(base).train(), make_batch()
    for name, parameter in model.named_parameters():
        want = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == want, name
    assert logits(model, batch).dtype == torch.bfloat16
    loss, _ = sampled_loss(model, batch)
    loss.backward()
    for name, grad in take_grads(model).items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all(), name
        assert grad.any(), name


def test_bf16_adapters(make_llama, make_batch, sampled_loss, take_grads):
    """autocast_adapter_dtype=False leaves them in the model's dtype; logits stay fp32."""
    config = ReMixConfig(r=2, num_experts=4, top_k=2, init_lora_weights=False)
    base = make_llama(dtype=torch.bfloat16)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss, _ = sampled_loss(model, make_batch())
    loss.backward()
    assert all(grad.isfinite().all() and grad.any() for grad in take_grads(model).values())


@pytest.mark.parametrize("dropout", [0.0, 0.01])
def test_autocast(dropout, make_llama, make_remix, make_batch, sampled_loss, take_grads):
    base, batch = make_llama(dtype=torch.float32), make_batch()
    model = make_remix(base, lora_dropout=dropout).train()
    exact, _ = sampled_loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = sampled_loss(model, batch)
    loss.backward()
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.05 * abs(float(exact.detach()))
    grads = take_grads(model)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize("bias", ["none", "all", "remix_only"])
def test_bias(bias, make_llama, make_remix, make_batch, sampled_loss):
    base = make_llama(mlp_bias=True, attention_bias=True)
    model = make_remix(base, bias=bias).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
    mlp = {n for n, _ in model.named_parameters() if n.endswith("bias") and ".mlp." in n}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert trained == {"none": set(), "all": every, "remix_only": mlp}[bias]
    sampled_loss(model, make_batch())[0].backward()
    assert all(model.get_parameter(name).grad.any() for name in trained if "k_proj" not in name)


def test_modules_to_save_and_token_indices_are_trained(make_remix, make_batch, sampled_loss):
    batch = make_batch()
    tokens = batch["input_ids"][0, :2].tolist()
    model = make_remix(modules_to_save=["lm_head"], trainable_token_indices=tokens).train()
    sampled_loss(model, batch)[0].backward()
    for part in ("lm_head.modules_to_save.default.weight", "trainable_tokens_delta.default"):
        (grad,) = [p.grad for n, p in model.named_parameters() if part in n]
        assert grad.isfinite().all()
        assert grad.any()


# Configuration ----------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    config = ReMixConfig(
        r=3,
        num_experts=6,
        top_k=2,
        lora_alpha=4.0,
        use_rslora=False,
        target_modules=["up_proj", "down_proj"],
        router_temperature=0.5,
        router_detach_input=False,
        runtime_config={"strategy": "grouped"},
    )
    assert config.runtime_config == ReMixRuntimeConfig(strategy="grouped")
    config.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "REMIX"
    assert "runtime_config" not in saved
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is ReMixConfig
    assert loaded.runtime_config == ReMixRuntimeConfig()
    fields = set(saved) - {"peft_version"}
    assert {f: getattr(loaded, f) for f in fields} == {f: getattr(config, f) for f in fields}


def test_runtime_config_reaches_the_layers(make_remix, make_batch, assert_same):
    batch = make_batch()
    want = logits(make_remix().eval(), batch)
    for runtime in ({"strategy": "gather"}, {"strategy": "grouped"}, {"backend": "reference"}):
        model = make_remix(runtime_config=runtime).eval()
        assert next(iter(adapters(model).values())).runtime == {
            "default": ReMixRuntimeConfig(**runtime)
        }
        assert_same(logits(model, batch), want, 1e-12)


def test_each_adapter_has_its_own_runtime(make_remix, make_batch, monkeypatch):
    """A second adapter's backend and strategy are not the first one's."""
    import remix_model.layer

    used = []
    run = remix_model.layer.routed_linear

    def spy(*args, **options):
        used.append((options["backend"], options["strategy"]))
        return run(*args, **options)

    monkeypatch.setattr(remix_model.layer, "routed_linear", spy)
    model, batch = make_remix(runtime_config={"strategy": "gather"}).eval(), make_batch()
    config = {"r": 2, "num_experts": 4, "top_k": 2}
    model.add_adapter("other", ReMixConfig(**config, runtime_config={"backend": "reference"}))
    want = {"default": ("auto", "gather"), "other": ("reference", "auto")}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        used.clear()
        logits(model, batch)
        assert set(used) == {want[name]}


def test_paper_defaults():
    config = ReMixConfig()
    assert (config.lora_alpha, config.use_rslora, config.lora_dropout) == (2.0, True, 0.0)
    assert (config.router_type, config.routing_granularity) == ("remix", "token")


def test_statistics_are_named_like_the_modules(two, make_batch):
    with record_routing(two) as record:
        logits(two, make_batch())
    assert [layer.name for layer in record.stats().layers] == list(adapters(two))


def test_repr_names_the_method(make_remix):
    assert "remix.ReMixLayer" in repr(make_remix())


def test_plain_modules_and_peft_agree(make_remix, assert_same):
    """RoutedLoRALinear and the PEFT layer are the same function of the same parameters."""
    from remix_model import RoutedLoRALinear

    layer = next(iter(adapters(make_remix()).values()))
    plain = RoutedLoRALinear(nn.Linear(32, 48, bias=False), num_experts=4, top_k=2, r=2)
    plain.double()
    plain.load_state_dict(
        {
            "base_layer.weight": layer.base_layer.weight,
            "lora_A": layer.remix_lora_A["default"],
            "lora_B": layer.remix_lora_B["default"],
            "router": layer.remix_router["default"],
        }
    )
    x = torch.randn(5, 32, dtype=torch.float64)
    assert_same(plain.eval()(x).detach(), layer.eval()(x).detach(), 1e-14)

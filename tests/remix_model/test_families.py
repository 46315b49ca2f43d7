"""Model families, each a tiny random one: what is adapted, computed, trained, saved, generated."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from remix_kernels.reference import routed_lora_ref
from remix_model import ReMixConfig, force_selection, load_model, sample_routing, token_losses
from remix_model.site import find_sites
from remix_model.tuner import ReMixLayer

GATED = {"gate_proj", "up_proj", "down_proj"}
FAMILIES = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "phi": {"fc1", "fc2"},
    "phi3": {"gate_up_proj", "down_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_fc", "c_proj"},
    "mixtral": None,
    "qwen2_moe": None,
    "t5": {"wi", "wo"},
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
OWN = {
    "mistral": SLIDING,
    "qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": {"n_inner": 48},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "t5": {"d_ff": 48, "d_kv": 8, "num_decoder_layers": 2, "decoder_start_token_id": 0},
}
MOE_TARGETS = {
    "mixtral": ["q_proj", "o_proj"],
    "qwen2_moe": ["shared_expert.up_proj", "shared_expert.down_proj", "o_proj"],
}
DECODERS = [name for name in FAMILIES if name != "t5"]
ATTENTIONS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if (family, attention) != ("gemma2", "sdpa")  # transformers has none
]


def make_base(family, attention=None):
    config = AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {})})
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    torch.manual_seed(0)
    return kind.from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def make_model(make_remix):
    """make_model(family, attention=None, **config): the family's defaults, B random."""

    def make(family, attention=None, **config):
        targets = MOE_TARGETS.get(family)
        return make_remix(make_base(family, attention), target_modules=targets, **config).eval()

    return make


def logits(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model(**inputs).logits


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ReMixLayer)}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family, make_model):
    """The feed-forward's linears; a mixture of experts has none, and says what it has."""
    if FAMILIES[family] is None:
        with pytest.raises(
            ValueError, match=rf"'{family}' are not known.*q_proj.*experts\.down_proj"
        ):
            get_peft_model(make_base(family), ReMixConfig())
    else:
        names = adapters(make_model(family))
        assert {name.rpartition(".")[2] for name in names} == FAMILIES[family]
        assert not any("attn" in name or "Attention" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_start_is_the_base(family, make_model, make_batch):
    model, batch = make_model(family, init_lora_weights=True), make_batch()
    assert torch.equal(logits(model, batch), logits(make_base(family), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_computes_the_formula(family, make_model, make_batch):
    """y = W x + b + omega sum of B_i A_i x over the k largest logits, on what the layer gets."""
    model = make_model(family)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, y: seen.update({m: (args[0], y)}))
        for layer in adapters(model).values()
    ]
    logits(model, make_batch())
    assert len(seen) == len(hooks) > 1
    for layer, (x, y) in seen.items():
        pool = [p["default"] for p in (layer.remix_lora_A, layer.remix_lora_B)]
        router = layer.remix_router["default"]
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        weight = weight.T if type(layer.base_layer).__name__ == "Conv1D" else weight
        base = torch.nn.functional.linear(x, weight, bias)
        index = (x @ router.T).topk(2).indices
        want = routed_lora_ref(x, *pool, index, 2 / 4**0.5, base=base)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_sampled_step(family, make_model, make_batch, sampled_loss, take_grads):
    model = make_model(family).train()
    sampled_loss(model, make_batch())[0].backward()
    grads = take_grads(model)
    assert len(grads) == 3 * len(adapters(model))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, make_model, make_batch, tmp_path):
    model, batch = make_model(family), make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not torch.equal(logits(model, batch), logits(make_base(family), batch))


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_cache_changes_nothing(family, attention, make_model, make_batch):
    """Left-padded prompts."""
    model = make_model(family, attention)
    assert model.config._attn_implementation == attention
    batch = {k: v.flip(1) for k, v in make_batch((8, 6)).items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    runs = [model.generate(**batch, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    cached, whole = (torch.stack(run.logits) for run in runs)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


# What is special about some -----------------------------------------------------------------------


def test_an_encoder_decoder_is_not_sampled(make_model, make_batch):
    """Its rows are not one sequence's; adapters with frozen routers train as any others."""
    model, batch = make_model("t5").train(), make_batch()
    with pytest.raises(ValueError, match="encoder-decoder"):
        token_losses(model, batch)
    with pytest.raises(ValueError, match="encoder-decoder"):
        sample_routing(model, num_selections=2, seed=0).__enter__()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("remix_lora" in name)
    labels = batch["labels"].masked_fill(batch["labels"] < 0, 0)
    model(input_ids=batch["input_ids"], labels=labels).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.isfinite().all() and grad.any() for grad in trained)


def test_stacked_experts_are_left_alone_and_named():
    """Their names are those of linears elsewhere in the model: adapted, with a warning."""
    base = make_base("qwen2_moe")
    with pytest.warns(UserWarning, match=r"mlp\.experts\.down_proj|experts\.down_proj are left"):
        model = get_peft_model(copy.deepcopy(base), ReMixConfig(target_modules=sorted(GATED)))
    assert all("shared_expert" in name for name in adapters(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(base, ReMixConfig(target_modules=MOE_TARGETS["qwen2_moe"]))


def test_forced_in_a_mixture_of_experts(make_model, make_batch):
    """The shared expert gets rows [B T, d]; a selection for all of them is one index."""
    model, batch = make_model("qwen2_moe"), make_batch()
    before = logits(model, batch)
    with force_selection(model, {name: torch.tensor([0, 1]) for name in find_sites(model)}):
        assert not torch.allclose(logits(model, batch), before)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_flash_attention_is_not_there(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(
        ImportError, match=r"'flash_attention_2' needs.*remix-lora\[flash\].*'sdpa'"
    ):
        load_model(str(tmp_path), attn_implementation="flash_attention_2")

"""What PEFT's tests are given instead of their own methods, and which of them cannot pass."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from remix_model import ReMixConfig

# Their files, and the task of the models in them.
TASKS = {
    "test_custom_models": None,
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
}

SMALL = {"r": 2, "num_experts": 4, "top_k": 2}
RANDOM = {**SMALL, "init_lora_weights": False}


def _mlp(name: str, **options: Any) -> tuple[str, str, type, dict[str, Any]]:
    return f"MLP {name}", "MLP", ReMixConfig, {**SMALL, **options}


def _pair(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, ReMixConfig, ReMixConfig]:
    return "ReMix", ReMixConfig(**{**RANDOM, **first}), ReMixConfig(**{**RANDOM, **second})


# In place of whatever the tests are parametrized with, by the names of the parameters.
CASES: dict[str, list[Any]] = {
    "test_name, model_id, config_cls, config_kwargs": [
        _mlp("lin0", target_modules=["lin0"]),
        _mlp("regex", target_modules="lin0"),
        _mlp("lin1", target_modules=["lin1"]),
        _mlp("both", target_modules=["lin0", "lin1"]),
        _mlp("modules_to_save", target_modules=["lin0"], modules_to_save=["lin1"]),
        _mlp("dropout", target_modules=["lin0"], lora_dropout=0.1),
        _mlp("one expert", target_modules=["lin0"], num_experts=1, top_k=1),
        _mlp("shared router", target_modules=["lin0"], router_sharing="block"),
        _mlp("rank_pattern", target_modules=["lin0", "lin1"], rank_pattern={"lin1": 3}),
        ("Conv1D", "EmbConv1D", ReMixConfig, {**SMALL, "target_modules": ["conv1d"]}),
        (
            "Conv1D and tokens",
            "EmbConv1D",
            ReMixConfig,
            {**SMALL, "target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        ),
    ],
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": [
        (f"ReMix {name}", "remix", ReMixConfig, *({**RANDOM, "target_modules": t} for t in targets))
        for name, targets in {
            "same": (["lin0"], ["lin0"]),
            "different": (["lin0"], ["lin1"]),
        }.items()
    ],
    "config_cls": [ReMixConfig],
}
# The same for tests with pairs of adapters, by the name of the test; no entry: of other methods.
_SAME = _pair({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": 3, "top_k": 1})
_SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
PAIRS: dict[str, list[Any]] = {
    "test_mixed_adapter_batches_mlp": [_SAME],
    "test_mixed_adapter_batches_different_target_layers": [
        _pair({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]})
    ],
    "test_mixed_adapter_batches_multiple_modules_to_save": [_pair(_SAVED, _SAVED)],
    "test_mixed_adapter_batches_partly_overlapping_target_layers": [
        _pair({"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]})
    ],
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [_SAME[:2]],
    "test_mixed_adapter_batches_length_mismatch_raises": [_SAME],
    "test_mixed_adapter_batches_training_mode_raises": [_SAME],
    "test_mixed_adapter_batches_disabled": [_SAME],
    "test_mixed_adapter_batches_merged_raises": [_SAME],
}

# Run all the same, and have to fail: (names of tests, as a pattern; with which error; why).
_MERGING = "which LoRAs apply depends on the token, so there is nothing to merge"
_DEFAULTS = "patches the default targets of LoRA and DeLoRA"
EXPECTED_FAILURES: list[tuple[str, type[Exception] | tuple[type[Exception], ...], str]] = [
    ("test_merge_layers*", ValueError, _MERGING),
    ("test_safe_merge*", ValueError, _MERGING),
    ("test_*merge_and_unmerge*", ValueError, _MERGING),
    ("test_*sequential_merge*", ValueError, _MERGING),
    ("test_disable_adapters_with_merging*", ValueError, _MERGING),
    ("test_delete_merged_adapter_*", ValueError, _MERGING),
    ("test_mixed_adapter_batches_merged_raises*", ValueError, _MERGING),
    ("test_forward_*float16*", ValueError, f"after the pass it merges: {_MERGING}"),
    ("test_only_params_are_updated*", AssertionError, "routers learn inside sample_routing only"),
    ("test_save_pretrained*_pickle*", ValueError, "a pickle can run code when read: refused"),
    ("test_default_target_modules_list_of_str*", ValueError, _DEFAULTS),
    ("test_default_target_modules_str*", ValueError, _DEFAULTS),
    ("test_prompt_learning_*", (OSError, ValueError), "reads a model or data set from the hub"),
]

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
# In place of models from the hub. Not "gpt2": tests skip methods that they do not know there.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "test_decoder_models": {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4},
        "gpt-2": {"model_type": "gpt2", "n_head": 4, "n_inner": 48},
        "gptj": {"n_head": 4, "rotary_dim": 4},
        "llama": _HEADS,
        "qwen2": _HEADS,
        "gemma3_text": {**_HEADS, "sliding_window": 4},
    },
    "test_encoder_decoder_models": {
        "t5": {"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "decoder_start_token_id": 0},
        "bart": {
            "d_model": 32,
            **{f"{side}_{n}": v for side in ("encoder", "decoder") for n, v in _BLOCKS.items()},
        },
    },
}


def save_models(folder: str) -> dict[str, list[str]]:
    """Write the tiny models; their folders, by the file of tests that they are for."""
    return {
        file: [_save_model(folder, file, name, own) for name, own in models.items()]
        for file, models in MODELS.items()
    }


def _save_model(folder: str, file: str, name: str, own: dict[str, Any]) -> str:
    config = AutoConfig.for_model(**{"model_type": name, **_SIZES, **own})
    kind = AutoModelForCausalLM if TASKS[file] == "CAUSAL_LM" else AutoModelForSeq2SeqLM
    kind.from_config(config).save_pretrained(f"{folder}/{name}")
    return f"{folder}/{name}"

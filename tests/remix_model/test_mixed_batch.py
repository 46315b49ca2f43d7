"""Another adapter for each row: every row is what its adapter alone makes of it."""

from __future__ import annotations

import pytest
import torch

from remix_model import ReMixConfig, record_routing, sample_routing
from tests.remix_model.test_prefix import make_tiny

NAMES = ["other", "__base__", "default", "other"]
KINDS = {
    "token": {},
    "block": {"router_sharing": "block"},
    "sequence": {"routing_granularity": "sequence"},
    "both": {"routing_granularity": "sequence", "router_sharing": "block"},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
}


@pytest.fixture
def make_two(make_remix):
    """make_two(base=None, **config): "default", and "other" with another pool on other linears."""

    def make(base=None, **config):
        model = make_remix(base, **config)
        torch.manual_seed(5)
        pool = {"r": 3, "num_experts": 3, "top_k": 1, "init_lora_weights": False}
        targets = None if config.get("router_sharing") == "block" else ["q_proj", "down_proj"]
        if model.config.model_type == "opt":
            targets = ["q_proj", "fc2"]
        model.add_adapter("other", ReMixConfig(**pool, **{"target_modules": targets, **config}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens_delta" in name:
                    parameter.add_(torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def batch(make_batch):
    batch = make_batch((9, 6, 8, 4))
    return {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}  # left-padded


def alone(model, name, call):
    """What `call` returns when all rows have one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    result = call()
    model.set_adapter("default")
    return result


def assert_rows_are_their_adapters(model, call):
    """`call(**options)` returns a tensor with a row for each of the batch's."""
    got = call(adapter_names=NAMES)
    every = {name: alone(model, name, call) for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(got[row], every[name][row], rtol=1e-6, atol=1e-6)
        for other in set(NAMES) - {name}:
            assert not torch.allclose(got[row].double(), every[other][row].double(), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_adapter(kind, make_two, batch):
    model = make_two(**KINDS[kind])
    real = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        assert_rows_are_their_adapters(model, lambda **names: model(**batch, **names).logits * real)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_rows_that_a_model_flattens(kind, make_two, batch):
    """OPT's feed-forward linears get [B T, d]."""
    model = make_two(make_tiny("opt").double(), **KINDS[kind])
    real = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        assert_rows_are_their_adapters(model, lambda **n: model(**batch, **n).logits * real)


@pytest.mark.parametrize("kind", ["token", "sequence", "both", "saved"])
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 1),
        ({"use_cache": False}, 1),
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
    ],
    ids=["cache", "no-cache", "beams", "several"],
)
def test_generate(kind, options, copies, make_two, batch):
    model = make_two(**KINDS[kind])
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    call = lambda **names: model.generate(**batch, **fixed, **options, **names)  # noqa: E731
    got = call(adapter_names=NAMES).unflatten(0, (-1, copies))
    for row, name in enumerate(NAMES):
        assert torch.equal(got[row], alone(model, name, call).unflatten(0, (-1, copies))[row])


def test_beams_of_the_generation_config(make_two, batch):
    model = make_two()
    model.generation_config.num_beams = 2
    assert model.generate(**batch, max_new_tokens=2, adapter_names=NAMES).shape[0] == 4


def test_encoder_and_decoder(make_two):
    """Beams repeat the decoder's rows only."""
    from tests.remix_model.test_targets import make_t5

    model = make_two(make_t5("relu"), router_sharing="block")
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    fixed = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    got = model.generate(input_ids=ids, adapter_names=NAMES, **fixed)
    for row, name in enumerate(NAMES):
        want = alone(model, name, lambda: model.generate(input_ids=ids, **fixed))[row]
        assert torch.equal(got[row, : len(want)], want)


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (NAMES[:3], ValueError, "Length of `adapter_names` .* got 3 and 4"),
        (NAMES[:2], ValueError, "Length of `adapter_names` .* got 2 and 4"),
        (["no"] * 4, ValueError, "non-existing adapter.*: no. There are default, other"),
        ("default", TypeError, "adapter_names='default' must be a list"),
        ([], TypeError, r"adapter_names=\[\] must be a list"),
    ],
    ids=["three", "two", "unknown", "string", "empty"],
)
def test_wrong_names(names, error, message, make_two, batch):
    model = make_two()
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=message):
        model(**batch, adapter_names=names)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_a_cache_is_of_its_adapters(make_two, batch):
    """Routed by sequence: rows that change adapters have no decisions in the cache."""
    model = make_two(routing_granularity="sequence")
    cache = model(**batch, adapter_names=NAMES, use_cache=True).past_key_values
    following = {"input_ids": batch["input_ids"][:, -1:], "past_key_values": cache}
    with pytest.raises(RuntimeError, match="run the prompt through it first"):
        model(**following, adapter_names=NAMES[::-1])


def test_refused_in_training_and_sampling(make_two, batch):
    model = make_two()
    with sample_routing(model, num_selections=2, seed=0) as routing:
        folded = routing.expand(batch)
        with pytest.raises(ValueError, match="does not go with sample_routing"):
            model(**folded, adapter_names=NAMES * 2)
    with pytest.raises(ValueError, match=r"in training mode. Call model.eval"):
        model.train()(**batch, adapter_names=NAMES)


def test_refused_where_names_would_be_lost(make_two, batch):
    model = make_two()
    with record_routing(model), pytest.raises(ValueError, match="does not go with record_routing"):
        model(**batch, adapter_names=NAMES)
    model.base_model.model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="does not reach blocks that are compiled"):
        model(**batch, adapter_names=NAMES)


def test_disabled_adapters_come_first(make_two, make_llama, batch):
    model = make_two()
    with model.disable_adapter(), torch.no_grad():
        got = model(**batch, adapter_names=NAMES).logits
    assert torch.equal(got, make_llama()(**batch).logits)

"""Bad input: a clear error that names the value and what would be right, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remix_model import (
    ReMixConfig,
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)
from remix_model.site import find_sites


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return RoutedLoRALinear(nn.Linear(5, 3), num_experts=4, top_k=2, r=2).train()


def sampling(model, **options):
    return sample_routing(model, **{"num_selections": 2, "seed": 0, **options})


def opens(model, **options):
    with sampling(model, **options):
        pass


# Sizes and names, in the plain module and in the configuration ---------------------------------

POOLS = [
    ({"top_k": 5}, r"top_k=5 .*1 <= top_k <= num_experts = 4"),
    ({"top_k": 0}, r"top_k=0 "),
    ({"top_k": -1}, r"top_k=-1 "),
    ({"r": 0}, r"r=0"),
    ({"num_experts": 0, "top_k": 0}, r"num_experts=0"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1.0.*\[0, 1\)"),
    ({"lora_dropout": -0.1}, r"lora_dropout=-0.1"),
    ({"lora_dropout": "a"}, r"lora_dropout='a' must be a finite number"),
    ({"router_temperature": 0.0}, r"router_temperature=0.0.*positive"),
    ({"router_temperature": None}, r"router_temperature=None must be a finite number"),
    ({"router_init_range": -1.0}, r"router_init_range=-1.0"),
    ({"lora_alpha": 0.0}, r"lora_alpha=0.0"),
    ({"lora_alpha": "2"}, r"lora_alpha='2' must be a finite number"),
    ({"lora_alpha": float("nan")}, r"lora_alpha=nan must be a finite number"),
    ({"lora_alpha": True}, r"lora_alpha=True must be a finite number"),
    ({"r": 2.0}, r"r=2.0 must be an integer"),
    ({"top_k": "2"}, r"top_k='2' must be an integer"),
    ({"num_experts": True}, r"num_experts=True must be an integer"),
    ({"use_rslora": "no"}, r"use_rslora='no' must be True or False"),
    ({"router_detach_input": None}, r"router_detach_input=None must be True or False"),
    ({"init_lora_weights": "gaussian"}, r"init_lora_weights='gaussian' must be True or False"),
]


@pytest.mark.parametrize(("options", "message"), POOLS, ids=lambda v: str(v)[:40])
def test_sizes(options, message):
    options = {"num_experts": 4, "top_k": 2, "r": 2, **options}
    with pytest.raises(ValueError, match=message):
        RoutedLoRALinear(nn.Linear(5, 3), **options)
    with pytest.raises(ValueError, match=message):
        ReMixConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_type": "magic"}, r"router_type='magic' is unknown.*remix"),
        ({"routing_granularity": "word"}, r"routing_granularity='word' is unknown.*token"),
        ({"router_sharing": "all"}, r"router_sharing='all' is unknown.*module"),
        ({"bias": "lora_only"}, r"bias='lora_only' is unknown.*remix_only"),
        ({"router_kwargs": {"a": 1}}, r"router_kwargs=.*no options"),
        ({"runtime_config": {"backend": "cuda"}}, r"backend='cuda' is unknown.*torch"),
        ({"runtime_config": {"strategy": "fast"}}, r"strategy='fast' is unknown.*grouped"),
        ({"target_modules": 3}, r"target_modules=3 must be a list of names or a regular expr"),
        ({"target_modules": [3]}, r"target_modules=\[3\] must be a list of names"),
        ({"exclude_modules": 3}, r"exclude_modules=3 must be a list of names"),
        ({"target_modules": "("}, r"target_modules='\(' is not a regular expression.*give a list"),
        ({"layers_pattern": "layers"}, r"layers_pattern='layers'.*layers_to_transform"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        ReMixConfig(**options)


def test_base_of_a_plain_module_must_be_linear():
    with pytest.raises(TypeError, match=r"nn\.Linear, got Embedding"):
        RoutedLoRALinear(nn.Embedding(4, 3), num_experts=4, top_k=2, r=2)


# Opening a context ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_selections": 1}, r"num_selections=1.*router.*num_selections >= 2"),
        ({"num_selections": 0}, r"num_selections=0; it must be a whole number, at least 1"),
        ({"num_selections": -2}, r"num_selections=-2"),
        ({"num_selections": "2"}, r"num_selections='2'; it must be a whole number"),
        ({"num_selections": 2.5}, r"num_selections=2.5; it must be a whole number"),
        ({"num_selections": True}, r"num_selections=True; it must be a whole number"),
        ({"credit": "karma"}, r"credit='karma' is unknown; choose one of sequence"),
        ({"log_prob": "exact"}, r"log_prob='exact' is unknown; choose one of ordered"),
        ({"logprob_tokens": "some"}, r"logprob_tokens='some' is unknown; choose one of all, resp"),
        ({"grad_selections": 0}, r"grad_selections=0 .*1 <= grad_sel.* <= num_selections = 2"),
        ({"grad_selections": 3}, r"grad_selections=3 .*1 <= grad_sel.* <= num_selections = 2"),
        ({"grad_selections": 1.0}, r"grad_selections=1.0"),
        ({"selection_chunk_size": 0}, r"selection_chunk_size=0.*need not divide"),
        ({"advantage_norm": "std"}, r"advantage_norm='std' is unknown; choose one of none, input"),
        ({"router_entropy_coef": -0.1}, r"router_entropy_coef=-0.1; it must be .* not negative"),
        ({"load_balancing_coef": float("nan")}, r"load_balancing_coef=nan"),
        ({"temperature": 0}, r"temperature=0 samples nothing"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_sample_routing_arguments(options, message, layer):
    with pytest.raises(ValueError, match=message):
        opens(layer, **options)
    opens(layer)  # nothing was left behind


def test_one_selection_is_enough_for_frozen_routers(layer):
    layer.router.requires_grad_(False)
    opens(layer, num_selections=1)


def test_contexts_do_not_nest(layer):
    with (
        sampling(layer) as routing,
        pytest.raises(RuntimeError, match="already inside a sample_routing context"),
    ):
        opens(layer, seed=1)
    # The outer context went on unharmed.
    with sampling(layer) as again:
        layer(again.expand({"x": torch.ones(2, 5)})["x"])
    assert routing is not again


def test_a_refused_inner_context_leaves_the_outer_one_working(layer):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    with sampling(layer) as routing:
        with pytest.raises(RuntimeError):
            opens(layer)
        layer(routing.expand({"x": x})["x"])
    assert len(routing.selections) == 1
    assert layer.site.state is None


@pytest.mark.parametrize("context", [sampling, record_routing, lambda m: force_selection(m, {})])
def test_models_without_routed_layers(context, make_llama):
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM has no routed layer; .*ReMixConfig"),
        context(make_llama()),
    ):
        pass


# Folding --------------------------------------------------------------------------------------


def test_forward_without_expand(layer):
    with sampling(layer), pytest.raises(RuntimeError, match=r"call routing\.expand\(batch\)"):
        layer(torch.ones(2, 5))


def test_loss_without_expand(layer):
    with sampling(layer) as routing, pytest.raises(RuntimeError, match=r"call routing\.expand"):
        routing.loss(torch.ones(4))


@pytest.mark.parametrize("rows", [(2, 3), (3, 3), (5, 3), (4, 4)], ids=str)
def test_a_batch_that_was_not_folded(rows, layer):
    """[M B, T] = [4, 3] was promised; 4 positions contradict the mask."""
    with sampling(layer) as routing:
        routing.expand({"x": torch.ones(2, 3, 5), "attention_mask": torch.ones(2, 3)})
        with pytest.raises(ValueError, match=r"4 sequences of 3 positions.*routing\.expand"):
            layer(torch.ones(*rows, 5))


def test_batches_without_tensors_or_of_two_sizes(layer):
    with sampling(layer) as routing:
        with pytest.raises(
            ValueError, match=r"no tensor \[B, \.\.\.\]; its keys are \['use_cache'\]"
        ):
            routing.expand({"use_cache": False})
        with pytest.raises(ValueError, match=r"batch size 3.*'labels': 2"):
            routing.expand({"input_ids": torch.ones(3, 4), "labels": torch.ones(2, 4)})


def test_empty_batches(layer):
    with sampling(layer) as routing:
        with pytest.raises(ValueError, match=r"the batch is empty: \{'x': 0\}; leave it out"):
            routing.expand({"x": torch.ones(0, 3, 5)})
        with pytest.raises(ValueError, match=r"the batch is empty: .*'input_ids': 0"):
            routing.expand({"input_ids": torch.ones(0, 3), "labels": torch.ones(0, 3)})


def test_response_needs_labels(layer):
    with sampling(layer, logprob_tokens="response") as routing:
        for batch in ({}, {"labels": torch.ones(2)}):
            with pytest.raises(ValueError, match=r"'response' needs labels \[B, T\]"):
                routing.expand({"input_ids": torch.ones(2, 3), **batch})


PACKED = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])},
    "positions-with-mask": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    },
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
    "max_length": {"max_length_k": 3},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]])},
}


@pytest.mark.parametrize("batch", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("tokens", ["all", "response"])
def test_packed_batches(batch, tokens, layer):
    with (
        sampling(layer, logprob_tokens=tokens) as routing,
        pytest.raises(ValueError, match=r"packed.*packing=False and padding_free=False"),
    ):
        routing.expand({"input_ids": torch.ones(1, 6), **batch})


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 3]])},
        {"position_ids": torch.tensor([[5, 6, 7, 8]])},
        {
            "position_ids": torch.tensor([[1, 1, 0, 1]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        },
        {
            "position_ids": torch.tensor([[0, 1, 2, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        },
        {"position_ids": None, "cu_seq_lens_q": None},
    ],
    ids=["plain", "shifted", "left-padding", "right-padding", "none"],
)
def test_positions_of_one_input_are_not_packing(batch, layer):
    with sampling(layer) as routing:
        routing.expand({"input_ids": torch.ones(1, 4), **batch})


# The loss -------------------------------------------------------------------------------------


def test_loss_shapes(layer):
    with sampling(layer) as routing:
        routing.expand({"x": torch.ones(3, 4, 5)})
        for shape in ((3, 4), (5,), (6, 4, 1), ()):
            with pytest.raises(ValueError, match=r"must be \[6, T\] or \[6\]: 2 selections of 3"):
                routing.loss(torch.ones(shape))
        with pytest.raises(ValueError, match=r"mask is \[6, 3\] and token_losses \[6, 4\]"):
            routing.loss(torch.ones(6, 4), torch.ones(6, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"num_items": 0},
        {"num_items": -1},
        {"num_items": torch.tensor(0)},
        {"mask": torch.zeros(4, 3)},
    ],
    ids=["zero", "negative", "zero-tensor", "all-masked"],
)
def test_no_loss_counts(options, layer):
    with sampling(layer) as routing:
        routing.expand({"x": torch.ones(2, 3, 5)})
        with pytest.raises(ValueError, match="no loss counts; is everything masked"):
            routing.loss(torch.ones(4, 3), **options)


def test_sequence_longer_than_the_model(make_remix, make_batch):
    model = make_remix().train()
    with (
        sampling(model) as routing,
        pytest.raises(ValueError, match=r"80 tokens .* 64 positions; shorten max_length"),
    ):
        token_losses(model, routing.expand(make_batch((80, 70))))


def test_labels_missing(make_remix, make_batch):
    model, batch = make_remix().train(), make_batch()
    del batch["labels"]
    with sampling(model) as routing, pytest.raises(ValueError, match=r"needs labels \[B, T\]"):
        token_losses(model, routing.expand(batch))


# Forced selections ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 4]), r"expert 0 to 4; experts are numbered 0 to 3"),
        (torch.tensor([-1, 2]), r"expert -1 to 2"),
        (torch.tensor([[0, 1], [2, 2]]), r"twice in one row"),
        (torch.tensor([0, 1, 2]), r"\[3\] torch.int64; it must be integer \[\.\.\., 2\]"),
        (torch.tensor(1), r"must be integer \[\.\.\., 2\]"),
        (torch.tensor([0.0, 1.0]), r"torch.float32; it must be integer"),
    ],
    ids=["too-large", "negative", "twice", "wrong-k", "scalar", "float"],
)
def test_forced_selection_values(index, message, make_remix):
    model = make_remix()
    first, name = list(find_sites(model))[:2]
    good = {first: torch.tensor([0, 1])}
    with (
        pytest.raises(ValueError, match=message) as error,
        force_selection(model, {**good, name: index}),
    ):
        pass
    assert name in str(error.value)
    assert all(site.forced is None for site in find_sites(model).values())


@pytest.mark.parametrize("index", [[0, 1], None, 1], ids=str)
def test_forced_selection_must_be_a_tensor(index, layer):
    message = f"the selection for ffn is a {type(index).__name__}; it must be a tensor"
    with (
        pytest.raises(TypeError, match=message),
        force_selection(nn.ModuleDict({"ffn": layer}), {"ffn": index}),
    ):
        pass


def test_forced_selection_of_an_unknown_layer(make_remix):
    model = make_remix()
    with (
        pytest.raises(ValueError, match=r"'layers\.0' is not a routed layer.*gate_proj"),
        force_selection(model, {"layers.0": torch.tensor([0, 1])}),
    ):
        pass


@pytest.mark.parametrize("shape", [(6,), (3, 7), (2, 6), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_forced_selection_that_does_not_broadcast(shape, sampled, layer):
    index = torch.rand(*shape, 4).topk(2).indices
    model = nn.Sequential(layer)
    x = torch.ones(3, 7, 5) if shape != (3, 7) else torch.ones(2, 7, 5)
    with (
        force_selection(model, {"0": index}),
        pytest.raises(ValueError, match=r"the selection for .*does not broadcast"),
    ):
        if sampled:
            with sampling(model) as routing:
                model(routing.expand({"x": x})["x"])
        else:
            with torch.no_grad():
                model(x)


@pytest.mark.parametrize("bad", [torch.int64, torch.uint8])
def test_forced_selection_of_any_integer_type(bad, layer):
    with torch.no_grad(), force_selection(layer, {"": torch.tensor([3, 1], dtype=bad)}):
        layer(torch.ones(2, 5))


# Inputs of a layer ----------------------------------------------------------------------------


def test_features_that_do_not_fit(layer):
    """Named inside a context, which is where names are known."""
    with pytest.raises(ValueError, match=r"a routed layer got x \[2, 6\], of another width.*, 5\]"):
        layer(torch.ones(2, 6))
    model = nn.ModuleDict({"ffn": layer})
    with sampling(model), pytest.raises(ValueError, match=r"ffn got x \[2, 6\], of another"):
        layer(torch.ones(2, 6))


# Trainers' arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remix_num_selections": 0}, r"remix_num_selections=0"),
        ({"remix_num_selections": 2.5}, r"remix_num_selections=2.5; it must be a whole number"),
        ({"remix_credit": "karma"}, r"remix_credit='karma'.*sequence"),
        ({"remix_log_prob": "exact"}, r"remix_log_prob='exact'.*ordered"),
        ({"remix_logprob_tokens": "some"}, r"remix_logprob_tokens='some'.*all, response"),
        ({"remix_advantage_norm": "std"}, r"remix_advantage_norm='std'"),
        ({"remix_router_entropy_coef": -0.1}, r"remix_router_entropy_coef=-0.1"),
        ({"remix_load_balancing_coef": -1}, r"remix_load_balancing_coef=-1"),
        ({"remix_grad_selections": 0}, r"remix_grad_selections=0"),
        ({"remix_grad_selections": 5}, r"remix_grad_selections=5.*remix_num_selections = 4"),
        ({"remix_selection_chunk_size": 0}, r"remix_selection_chunk_size=0"),
        ({"remix_temperature": 0}, r"remix_temperature=0"),
        ({"remix_temperature_end": 0.0}, r"remix_temperature_end=0.0"),
        ({"remix_router_learning_rate": -1.0}, r"remix_router_learning_rate=-1.0"),
        ({"remix_router_max_grad_norm": -1.0}, r"remix_router_max_grad_norm=-1.0"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_training_arguments(options, message, tmp_path):
    from remix_model import ReMixTrainingArguments

    with pytest.raises(ValueError, match=message):
        ReMixTrainingArguments(output_dir=str(tmp_path), **options)

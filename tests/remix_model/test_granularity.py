"""Routing by sequence: decided from the prompt, once, and kept while decoding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel
from torch import nn

from remix_model import (
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)
from remix_model.batch import prompt_positions
from remix_model.site import find_sites


@pytest.fixture
def model(make_remix):
    return make_remix(routing_granularity="sequence").eval()


def logits_of(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs)


def test_the_mean_of_the_prompt_decides(model, make_batch):
    """By hand: pooled inputs, their top k, the same experts at every position."""
    batch = make_batch((10, 7, 9), prompt=3)
    name, site = next(iter(find_sites(model).items()))
    seen = {}
    layer = dict(model.named_modules())[name]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    chosen = {}
    select = site.select
    site.select = lambda *args: chosen.setdefault("it", select(*args))
    with torch.no_grad():
        token_losses(model, batch)
    hook.remove()
    del site.select
    x, router = seen["x"], layer.remix_router["default"]
    pooled = x[:, :3].mean(1)
    want = (pooled @ router.T).topk(2).indices
    torch.testing.assert_close(chosen["it"].drawn, want)
    assert torch.equal(chosen["it"].index, want[:, None].expand(3, 10, 2))


def test_nothing_after_the_prompt_decides(model, make_batch):
    """Labelled tokens change no loss before them: routing does not see the future."""
    batch = make_batch((10, 10), prompt=3)
    other = {key: value.clone() for key, value in batch.items()}
    other["input_ids"][:, 6:] = (other["input_ids"][:, 6:] + 7) % 60 + 3
    other["labels"][:, 6:] = other["input_ids"][:, 6:]
    with torch.no_grad():
        (one, _), (two, _) = token_losses(model, batch), token_losses(model, other)
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert (one[:, 5:] - two[:, 5:]).abs().min() > 0


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_padding_does_not_decide(left, model, make_batch):
    batch = make_batch((6, 6), prompt=3)
    padded = {
        key: nn.functional.pad(
            value, (3, 0) if left else (0, 3), value=-100 if key == "labels" else 0
        )
        for key, value in batch.items()
    }
    with torch.no_grad():
        losses, mask = token_losses(model, batch)
        same, same_mask = token_losses(model, padded)
    torch.testing.assert_close(same[same_mask], losses[mask])


def test_prompt_positions_by_hand():
    """Up to the first label, padding on either side left out; later gaps are no prompt."""
    labels = torch.tensor([[-100, -100, 5, -100, 7, -100], [-100, -100, -100, 4, 4, 4]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    want = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    found = prompt_positions({"labels": labels, "attention_mask": real})
    assert torch.equal(found, want)
    given = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    found = prompt_positions({"prompt_mask": given, "labels": labels, "attention_mask": real})
    assert torch.equal(found, given.bool() & real.bool())
    none = torch.full((1, 4), -100)
    assert prompt_positions({"labels": none}).all()


def test_padding_does_not_decide_at_prefill(make_remix):
    """No labels: the mask alone tells what is real."""
    model = make_remix(routing_granularity="sequence", num_experts=8, top_k=1).eval()
    ids = torch.randint(3, 64, (8, 5), generator=torch.Generator().manual_seed(0))
    left = nn.functional.pad(ids, (7, 0), value=9)  # not 0, whose embedding is zero
    mask = nn.functional.pad(torch.ones_like(ids), (7, 0))
    want = logits_of(model, ids).logits
    got = logits_of(model, left, mask).logits[:, 7:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # positions differ, in fp32


def test_decoding_repeats_the_prefill(model, make_batch):
    """With a cache, token by token, as in one pass with the prompt's end known."""
    ids = make_batch((9, 9))["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).logits
    out = logits_of(model, ids[:, :4], use_cache=True)
    steps = [out.logits]
    for t in range(4, 9):
        out = logits_of(model, ids[:, t : t + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_two_caches_at_once(model, make_batch):
    """Each remembers its own prefill, whatever ran in between."""
    ids = make_batch((9, 9))["input_ids"]
    alone = []
    for row in (0, 1):
        out = logits_of(model, ids[row : row + 1, :6], use_cache=True)
        alone.append(logits_of(model, ids[row : row + 1, 6:], past_key_values=out.past_key_values))
    caches = [
        logits_of(model, ids[row : row + 1, :6], use_cache=True).past_key_values for row in (0, 1)
    ]
    logits_of(model, ids[:, :3])
    for row in (0, 1):
        out = logits_of(model, ids[row : row + 1, 6:], past_key_values=caches[row])
        torch.testing.assert_close(out.logits, alone[row].logits)


def test_generate(model, make_batch):
    """Greedy and beams: the same as choosing by hand from the prompt and forcing it."""
    ids = make_batch((6, 6))["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    modules, chosen, hooks = dict(model.named_modules()), {}, []
    for name, site in find_sites(model).items():

        def keep(layer, args, site=site, name=name):
            if args[0].shape[1] > 1:
                pooled = args[0].mean(1)
                router = layer.remix_router["default"]
                chosen.setdefault(name, (pooled @ router.T).topk(site.top_k).indices)

        hooks.append(modules[name].register_forward_pre_hook(keep))
    tokens = model.generate(input_ids=ids, **options)
    for hook in hooks:
        hook.remove()
    for row in (0, 1):
        with force_selection(model, {n: index[row] for n, index in chosen.items()}):
            forced = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(tokens[row : row + 1], forced)
    beams = model.generate(input_ids=ids, num_beams=3, **options)
    alone = [model.generate(input_ids=ids[r : r + 1], num_beams=3, **options) for r in (0, 1)]
    assert torch.equal(beams, torch.cat(alone))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, :2] = 0
    left = torch.cat((torch.zeros(2, 2, dtype=torch.long), ids), 1)
    padded = model.generate(input_ids=left, attention_mask=mask, **options)
    assert torch.equal(padded[:, 2:], tokens)


def test_a_cache_of_another_model(model, make_remix, make_batch):
    ids = make_batch((6, 6))["input_ids"]
    other = make_remix(routing_granularity="sequence").eval()
    cache = logits_of(other, ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="not filled by this model"):
        logits_of(model, ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("sharing", ["module", "block"])
def test_save_and_load(sharing, make_remix, make_llama, make_batch, tmp_path):
    model = make_remix(routing_granularity="sequence", router_sharing=sharing).eval()
    batch = make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(token_losses(other, batch)[0], token_losses(model, batch)[0])
        ids = batch["input_ids"][:, :5]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            other.generate(input_ids=ids, **options), model.generate(input_ids=ids, **options)
        )


def test_statistics_count_sequences(model, make_batch):
    with record_routing(model) as record, torch.no_grad():
        token_losses(model, make_batch((10, 7, 9)))
    for layer in record.stats().layers:
        assert layer.tokens == 3


def test_plain_modules():
    """Without a language model: the mean of all rows, or of prompt_mask's while sampling."""
    torch.manual_seed(0)
    layer = RoutedLoRALinear(
        nn.Linear(4, 3),
        num_experts=5,
        top_k=2,
        r=2,
        router_init_range=1.0,
        init_lora_weights=False,
        routing_granularity="sequence",
    )
    x = torch.randn(3, 6, 4)
    index = (x.mean(1) @ layer.router.T).topk(2).indices
    want = layer(x)
    plain = RoutedLoRALinear(
        copy.deepcopy(layer.base_layer), num_experts=5, top_k=2, r=2, router_init_range=1.0
    )
    plain.load_state_dict(layer.state_dict())
    with force_selection(nn.Sequential(plain), {"0": index[:, None]}):
        torch.testing.assert_close(plain(x), want)
    with sample_routing(nn.Sequential(layer), 2, seed=0) as routing:
        part = routing.expand({"x": x, "prompt_mask": torch.arange(6).expand(3, 6) < 2})
        layer(part["x"])
    (drawn,) = routing.selections[0]
    assert drawn.shape == (6, 2)


@pytest.mark.parametrize("how", ["no labels", "labelled from the start", "wrong rows"])
def test_refuses(how, model, make_batch):
    batch = make_batch((10, 7, 9), prompt=0 if how == "labelled from the start" else 3)
    if how == "wrong rows":
        layer = RoutedLoRALinear(
            nn.Linear(4, 3), num_experts=3, top_k=1, r=1, routing_granularity="sequence"
        )
        with pytest.raises(ValueError, match=r"routes by sequence and got x \[5, 4\]"):
            layer(torch.zeros(5, 4))
        return
    if how == "no labels":
        del batch["labels"]
        message = "needs labels"
    else:
        message = "row 0 has no prompt"
    with sample_routing(model, 2, seed=0) as routing, pytest.raises(ValueError, match=message):
        routing.expand(batch)
    if how == "labelled from the start":
        with pytest.raises(ValueError, match=message):
            token_losses(model, batch)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.filterwarnings("ignore:a ReMix model is being trained outside")
def test_recomputation_reads_the_same_prompt(
    kind, make_remix, make_batch, take_grads, assert_same, checkpointing
):
    """Unsampled training: what the pass around a layer was is gone when it is recomputed."""
    batch, grads = make_batch(), []
    for switched in ("off", kind):
        model = checkpointing(make_remix(routing_granularity="sequence"), switched)
        losses, mask = token_losses(model, batch)
        (losses.sum() / mask.sum()).backward()
        grads.append(take_grads(model))
    assert_same(
        {n: g for n, g in grads[1].items() if "lora" in n},
        {n: g for n, g in grads[0].items() if "lora" in n},
        1e-9,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_generate_decides_from_the_prompt(options, make_remix):
    """Each decodes as its token-routed twin would with the prompt's experts forced."""
    model = make_remix(
        routing_granularity="sequence", num_experts=8, top_k=1, router_init_range=2.0
    ).eval()
    ids = torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(3))
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    chosen, modules, hooks = {}, dict(model.named_modules()), []
    for name, site in find_sites(model).items():

        def keep(layer, args, site=site, name=name):
            pooled = args[0][:, :7].mean(1)
            top = (pooled @ layer.remix_router["default"].T).topk(1).indices
            chosen.setdefault(name, top[0])

        hooks.append(modules[name].register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    with force_selection(model, chosen):
        want = model.generate(input_ids=ids, **plain, **options)
    assert torch.equal(model.generate(input_ids=ids, **plain, **options), want)
    left = nn.functional.pad(ids, (4, 0), value=9)
    mask = nn.functional.pad(torch.ones_like(ids), (4, 0))
    if "prompt_lookup_num_tokens" not in options:  # which would look into the padding
        got = model.generate(input_ids=left, attention_mask=mask, **plain, **options)
        assert torch.equal(got[:, 4:], want)


def test_chunked_prefill_is_refused(model, make_batch):
    ids = make_batch((9, 9))["input_ids"]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(input_ids=ids, max_new_tokens=3, prefill_chunk_size=4, pad_token_id=0)


def test_prompt_mask_beside_labels(model, make_batch):
    """Labels everywhere, and the prompt said by hand."""
    batch = make_batch((8, 8), prompt=0)
    batch["prompt_mask"] = torch.arange(8).expand(2, 8) < 3
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][:, :3] = -100
    del other["prompt_mask"]
    with torch.no_grad():
        want, _ = token_losses(model, other)
        got, _ = token_losses(model, batch)
        torch.testing.assert_close(got[:, 3:], want[:, 3:])
        with sample_routing(model, 2, seed=0) as routing:
            routing.loss(*token_losses(model, routing.expand(batch)))


def test_a_pass_that_routes_nothing_needs_no_prompt(model, make_batch):
    batch = make_batch((8, 8), prompt=0)
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    with pytest.raises(ValueError, match="no prompt"), torch.no_grad():
        model(**batch)


def test_labels_of_whole_sequences(make_remix):
    """Not of tokens: all real tokens are read."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, vocab_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = make_remix(LlamaForSequenceClassification(config), routing_granularity="sequence")
    ids = torch.randint(3, 64, (2, 6))
    with torch.no_grad():
        assert model(input_ids=ids, labels=torch.tensor([0, 2])).loss.isfinite()


def test_a_copied_cache_keeps_its_decisions(model, make_batch):
    ids = make_batch((9, 9))["input_ids"]
    cache = logits_of(model, ids[:, :6], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    want = logits_of(model, ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits_of(model, ids[:, 6:], past_key_values=copied).logits, want)


def test_a_mask_that_does_not_say_what_is_real(model, make_batch):
    ids = make_batch((6, 6))["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 1, 6, 6\].*needs \[B, T\]"):
        logits_of(model, ids, torch.ones(2, 1, 6, 6))

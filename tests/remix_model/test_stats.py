"""`record_routing`: shares, entropy and effective sample sizes against hand computation."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from remix_model import (
    RoutedLoRALinear,
    RoutingStats,
    force_selection,
    record_routing,
    routing_sums,
    sample_routing,
)
from remix_model.routing_sums import merge_subsets

pytestmark = pytest.mark.filterwarnings("ignore:a ReMix model is being trained")


class Masked(nn.Module):
    """A routed module of 4 experts, 2 active, that is told what is padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"num_experts": 4, "top_k": 2, "r": 2, "router_init_range": 1.0}
        self.routed = RoutedLoRALinear(nn.Linear(5, 3), **options)

    def forward(self, x, attention_mask=None):
        return self.routed(x)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INDEX = torch.tensor(
    [
        [[0, 1], [1, 0], [2, 0]],
        [[1, 2], [0, 2], [3, 1]],  # the last is padding
    ]
)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def recorded(model, x, index=INDEX, mask=MASK):
    with record_routing(model) as record, force_selection(model, {"routed": index}):
        model(x, attention_mask=mask)
    (layer,) = record.stats().layers
    return layer


def test_shares_of_forced_selections():
    layer = recorded(Masked(), random(2, 3, 5))
    assert layer.name == "routed"
    assert layer.tokens == 5
    assert layer.expert_share == pytest.approx([4 / 10, 3 / 10, 3 / 10, 0])
    assert layer.top1_share == pytest.approx([2 / 5, 2 / 5, 1 / 5, 0])
    assert layer.dead_experts == [3]
    assert layer.ess == 2.0
    assert layer.share_ess == pytest.approx(1 / (0.4**2 + 0.3**2 + 0.3**2))


def test_without_a_mask_every_row_counts():
    layer = recorded(Masked(), random(2, 3, 5), mask=None)
    assert layer.tokens == 6
    assert layer.expert_share == pytest.approx([4 / 12, 4 / 12, 3 / 12, 1 / 12])
    assert layer.dead_experts == []


def test_policy_entropy_and_ess_by_hand():
    model, x = Masked(), random(2, 3, 5)
    layer = recorded(model, x)
    entropies, sizes = [], []
    for row, real in zip(x.view(6, 5), MASK.view(6), strict=True):
        if real:
            z = (model.routed.router @ row).tolist()
            total = sum(math.exp(v) for v in z)
            q = [math.exp(v) / total for v in z]
            entropies.append(-sum(p * math.log(p) for p in q))
            sizes.append(sum(q) ** 2 / sum(p * p for p in q))
    assert layer.entropy == pytest.approx(sum(entropies) / 5, rel=1e-5)
    assert layer.policy_ess == pytest.approx(sum(sizes) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "entropy", "ess"), [(0.0, math.log(4), 4.0), (100.0, 0.0, 1.0)], ids=["even", "one"]
)
def test_extremes(logits, entropy, ess):
    model = Masked()
    with torch.no_grad():
        model.routed.router.zero_()
        model.routed.router[2] = logits
    layer = recorded(model, torch.ones(2, 3, 5))
    assert layer.entropy == pytest.approx(entropy, abs=1e-6)
    assert layer.policy_ess == pytest.approx(ess)


@pytest.mark.parametrize("same", [True, False])
def test_share_ess_is_k_when_collapsed_and_n_when_even(same):
    index = torch.tensor([[[0, 1], [1, 0], [0, 1], [1, 0]]])
    if not same:
        index = torch.tensor([[[0, 1], [2, 3], [1, 2], [3, 0]]])
    layer = recorded(Masked(), random(1, 4, 5), index, torch.ones(1, 4))
    assert layer.share_ess == pytest.approx(2.0 if same else 4.0)
    assert layer.dead_experts == ([2, 3] if same else [])


def test_sums_over_passes_and_reset():
    model, x = Masked(), random(2, 3, 5)
    with record_routing(model) as record:
        for mask in (MASK, MASK, None):
            model(x, attention_mask=mask)
        assert record.stats().layers[0].tokens == 5 + 5 + 6
        record.reset()
        assert record.stats().layers == []
        model(x, attention_mask=MASK)
    assert record.stats().layers[0].tokens == 5


def test_sampled_passes_count_every_selection():
    model, x = Masked().train(), random(2, 3, 5)
    with (
        record_routing(model) as record,
        sample_routing(model, num_selections=3, seed=0) as routing,
    ):
        batch = routing.expand({"x": x, "attention_mask": MASK})
        model(**batch)
    (layer,) = record.stats().layers
    assert layer.tokens == 15
    (index,) = routing.selections[0]
    counts = torch.bincount(index[routing.folded.valid].flatten().long(), minlength=4)
    assert layer.expert_share == pytest.approx((counts / 30).tolist())


def test_recording_leaves_nothing_behind_and_changes_nothing():
    model, x = Masked().eval(), random(2, 3, 5)
    want = model(x)
    with record_routing(model) as record:
        assert torch.equal(model(x, attention_mask=MASK), want)
    assert not model._forward_pre_hooks
    assert not model.routed._forward_pre_hooks
    model(x)
    assert record.stats().layers[0].tokens == 5
    with pytest.raises(KeyError), record_routing(model):
        raise KeyError
    assert not model._forward_pre_hooks


def test_recorders_nest():
    """An inner recorder, a trainer's for example, does not end the outer one's counting."""
    model, x = Masked(), random(2, 3, 5)
    with record_routing(model) as outer:
        with record_routing(model) as inner:
            model(x)
        model(x)
    assert inner.stats().layers[0].tokens == 6
    assert outer.stats().layers[0].tokens == 12


def test_stats_of_nothing():
    with record_routing(Masked()) as record:
        pass
    stats = record.stats()
    assert stats.layers == []
    assert json.dumps(stats.to_dict()) == '{"layers": []}'
    assert set(stats.summary()) >= {"entropy", "ess", "policy_ess", "share_ess", "dead_experts"}


def test_to_dict_is_json_and_summary_is_the_mean():
    model = nn.Sequential(Masked(), Masked())
    model[1].routed = RoutedLoRALinear(nn.Linear(3, 5), num_experts=3, top_k=1, r=2)
    with record_routing(model) as record:
        model(random(2, 3, 5))
    stats = record.stats()
    assert isinstance(stats, RoutingStats)
    data = json.loads(json.dumps(stats.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["0.routed", "1.routed"]
    first, second = data["layers"]
    assert set(first) == {
        "name",
        "tokens",
        "expert_share",
        "top1_share",
        "ess",
        "policy_ess",
        "share_ess",
        "entropy",
        "dead_experts",
        "ess_min",
        "ess_exp",
        "policy_ess_min",
        "distinct_subsets",
        "co_selection",
        "task_share",
        "weight_histogram",
        "top_weight_histogram",
    }
    assert set(stats.to_dict(matrices=False)["layers"][0]) == {
        key for key in first if "histogram" not in key
    } - {"co_selection", "task_share"}
    summary = stats.summary()
    for key in ("entropy", "ess", "policy_ess", "share_ess"):
        assert summary[key] == pytest.approx((first[key] + second[key]) / 2)
    assert summary["dead_experts"] == len(first["dead_experts"]) + len(second["dead_experts"])


# Padding of language models ---------------------------------------------------------------------


def tokens_of(record):
    """Tokens that each layer counted; the same in all of them."""
    (count,) = {layer.tokens for layer in record.stats().layers}
    return count


@pytest.fixture
def language_model(make_remix):
    return make_remix().eval()


@pytest.fixture
def padded(make_batch):
    """Three prompts of 10, 7 and 9 tokens, right-padded, without labels."""
    batch = make_batch((10, 7, 9))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def test_padding_is_left_out(language_model, padded):
    with record_routing(language_model) as record:
        language_model(**padded)
    assert tokens_of(record) == 10 + 7 + 9


@torch.no_grad()
def test_the_mask_may_be_positional(language_model, padded):
    """PeftModel takes it second; so does the model inside."""
    for model in (language_model, language_model.get_base_model()):
        with record_routing(model) as record:
            model(padded["input_ids"], padded["attention_mask"])
        assert tokens_of(record) == 10 + 7 + 9


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_padding_on_the_left_while_generating(use_cache, language_model, padded):
    """The prompts' 26 real tokens and 3 x 4 new ones: with a cache each once, else every time."""
    left = {name: value.flip(1) for name, value in padded.items()}
    with record_routing(language_model) as record:
        language_model.generate(
            **left, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache
        )
    assert tokens_of(record) == (26 + 3 * 4 if use_cache else 5 * 26 + 3 * (1 + 2 + 3 + 4))


@torch.no_grad()
def test_a_mask_is_forgotten_after_its_pass(language_model, padded):
    """Also when that pass failed: whoever comes next without a mask counts every position."""
    ids = padded["input_ids"]
    layer = language_model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    x = torch.zeros(3, 10, 32).double()
    counted = lambda record: record.stats().layers[0].tokens  # noqa: E731
    with record_routing(language_model) as record:
        language_model(**padded)
        assert counted(record) == 26
        layer(x)  # by itself, and with as many rows
        assert counted(record) == 26 + 30
        language_model(input_ids=ids)
        assert counted(record) == 26 + 30 + 30
        with pytest.raises(IndexError):
            language_model(input_ids=ids + 1000, attention_mask=padded["attention_mask"])
        layer(x)
        assert counted(record) == 26 + 30 + 30 + 30


@torch.no_grad()
def test_nothing_is_left_on_a_language_model(language_model, padded):
    with record_routing(language_model) as record:
        language_model(**padded)
    language_model(**padded)
    assert tokens_of(record) == 26
    for module in language_model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# Subsets, pairs, tasks and weights ----------------------------------------------------------------


def test_pairs_and_subsets_by_hand():
    layer = recorded(Masked(), random(2, 3, 5))
    assert layer.distinct_subsets == 3  # {0, 1}, {0, 2} and {1, 2}; {1, 3} is padding
    assert layer.co_selection == [[4, 2, 2, 0], [2, 3, 1, 0], [2, 1, 3, 0], [0, 0, 0, 0]]
    assert layer.ess == layer.ess_min == layer.ess_exp == 2.0
    assert sum(layer.weight_histogram) == layer.weight_histogram[10] == 10  # all are 1 / 2
    assert layer.top_weight_histogram[10] == 5


@pytest.mark.parametrize("n,k", [(5, 2), (64, 3)])
def test_distinct_subsets_over_passes_are_exact(n, k):
    """Against Python's sets; with 64 experts the last one's bit is the sign."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(RoutedLoRALinear(nn.Linear(4, 4), num_experts=n, top_k=k, r=1))
    seen = set()
    with record_routing(model) as record:
        for _ in range(3):
            index = torch.rand(40, n, generator=generator).topk(k).indices
            index[:4] = torch.tensor([n - 1, *range(k - 1)])
            seen |= {frozenset(row) for row in index.tolist()}
            with force_selection(model, {"0": index}):
                model(torch.ones(40, 4))
    assert record.stats().layers[0].distinct_subsets == len(seen)


@pytest.mark.parametrize("n,counted", [(64, True), (65, False)])
def test_subsets_that_are_not_counted_are_not_called_none(n, counted):
    model = nn.Sequential(RoutedLoRALinear(nn.Linear(4, 4), num_experts=n, top_k=2, r=1))
    with record_routing(model) as record:
        model(torch.ones(3, 4))
    assert record.stats().summary().get("distinct_subsets") == (1 if counted else None)


def test_subsets_beyond_the_cap_are_cut_off():
    held = merge_subsets(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[9, 9, 2, 0]]))
    assert sorted(held[0].tolist()) == [0, 2, 9]
    assert (merge_subsets(held, torch.tensor([[5, 7, 8]])) != 0).sum() == 3


def test_tasks_of_sequences_also_when_selections_are_folded():
    model = Masked().train()
    with record_routing(model) as record:
        record.tasks(["add", "sort"])
        with force_selection(model, {"routed": INDEX}):
            model(random(2, 3, 5), attention_mask=MASK)
        record.tasks(["sort", "name"])
        with sample_routing(model, num_selections=2, seed=0) as routing:
            folded = torch.cat([torch.tensor([[0, 1]]), torch.tensor([[2, 3]])] * 2)[:, None]
            with force_selection(model, {"routed": folded.expand(4, 3, 2)}):
                model(**routing.expand({"x": random(2, 3, 5)}))
        record.tasks(None)
        model(random(2, 3, 5))
    (layer,) = record.stats().layers
    assert layer.tokens == 5 + 12 + 6
    assert layer.task_share["add"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert layer.task_share["sort"] == pytest.approx([7 / 16, 7 / 16, 2 / 16, 0])  # 1+6, 1+6, 2
    assert layer.task_share["name"] == pytest.approx([0, 0, 0.5, 0.5])
    with record_routing(model) as record, pytest.raises(ValueError, match="2 sequences"):
        record.tasks(["add", "sort"])
        model(random(3, 1, 5))


def test_learned_weights_by_hand():
    model = Masked()
    weights = torch.tensor([[0.96, 0.04], [0.5, 0.5], [0.2, 0.8]])
    with record_routing(model) as record:
        add = record.add
        record.add = lambda site, selection: add(site, replace(selection, drawn_weights=weights))
        model(random(3, 5))
    (layer,) = record.stats().layers
    sizes = [1 / (a * a + b * b) for a, b in weights.tolist()]
    assert layer.ess == pytest.approx(sum(sizes) / 3, rel=1e-5)
    assert layer.ess_min == pytest.approx(min(sizes), rel=1e-5)
    entropies = [-sum(p * math.log(p) for p in row) for row in weights.tolist()]
    assert layer.ess_exp == pytest.approx(sum(map(math.exp, entropies)) / 3, rel=1e-5)
    assert [i for i, c in enumerate(layer.weight_histogram) for _ in range(c)] == [
        0, 4, 10, 10, 16, 19,
    ]  # fmt: skip
    assert [i for i, c in enumerate(layer.top_weight_histogram) for _ in range(c)] == [10, 16, 19]


@torch.no_grad()
def test_mixlora_weighs_unevenly_and_remix_does_not(make_remix, padded):
    for router_type, even in (("mixlora", False), ("remix", True)):
        model = make_remix(router_type=router_type, router_init_range=1.0).eval()
        with record_routing(model) as record:
            model(**padded)
        for layer in record.stats().layers:
            assert (layer.ess_min == layer.ess == 2) == even
            assert 1 <= layer.ess_min <= layer.ess <= layer.ess_exp <= 2
            assert sum(layer.top_weight_histogram) == layer.tokens == 26
            assert not any(layer.top_weight_histogram[:9])


def test_counting_is_not_rounded_under_autocast():
    model = Masked()
    with record_routing(model) as record, torch.autocast("cpu", torch.bfloat16):
        model(random(1, 1003, 5))
        record.stats()
    (layer,) = record.stats().layers
    assert sum(row[i] for i, row in enumerate(layer.co_selection)) == 2 * 1003


def test_layers_are_counted_together(monkeypatch):
    """And as if each were alone: one update a pass, or one each where logits are many."""
    model = nn.Sequential(*(Masked() for _ in range(3)))
    for i, part in enumerate(model):
        options = {"num_experts": 4, "top_k": 2, "r": 2, "router_init_range": 1.0 + i}
        part.routed = RoutedLoRALinear(nn.Linear(5, 5), **options)
    updates, seen = [], {}
    add = routing_sums.LayerSums.add
    counted = lambda self, *args: (updates.append(len(args[1])), add(self, *args))  # noqa: E731
    monkeypatch.setattr(routing_sums.LayerSums, "add", counted)
    for room in (2**21, 1):
        monkeypatch.setattr("remix_model.stats._WAITING", room)
        with record_routing(model) as record:
            model(random(2, 3, 5))
            model(random(2, 3, 5))
        seen[room] = record.stats()
    assert updates == [3, 3, 1, 1, 1, 1, 1, 1]
    assert seen[1].to_dict() == seen[2**21].to_dict()
    assert len({layer.entropy for layer in seen[1].layers}) == 3


def test_inference_mode_and_then_none():
    model = Masked()
    with record_routing(model) as record:
        with torch.inference_mode():
            model(random(2, 3, 5))
        model(random(2, 3, 5))
    assert record.stats().layers[0].tokens == 12


def test_to_frame_has_a_row_for_each_expert(monkeypatch):
    pandas = pytest.importorskip("pandas")
    model = Masked()
    with record_routing(model) as record:
        record.tasks("add")
        model(random(2, 3, 5))
    frame = record.stats().to_frame()
    (layer,) = record.stats().layers
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["layer"]) == ["routed"] * 4
    assert list(frame["expert_share"]) == layer.expert_share == list(frame["task:add"])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        record.stats().to_frame()

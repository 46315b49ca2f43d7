"""One router for the linears of a block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel

from remix_model import force_selection, record_routing, sample_routing, token_losses
from remix_model.routers import make_router
from remix_model.sharing import FollowingSite, SharedSelection
from remix_model.site import find_sites
from remix_model.tuner.layer import ReMixLayer


@pytest.fixture
def model(make_remix):
    return make_remix(router_sharing="block").eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ReMixLayer)}


def test_one_router_a_block(model):
    assert [name.rsplit(".", 1)[-1] for name in find_sites(model)] == ["gate_proj"] * 2
    for name, layer in layers(model).items():
        assert ("default" in layer.remix_router) == name.endswith("gate_proj")
    saved = [name for name, _ in model.named_parameters() if "router" in name]
    assert len(saved) == 2
    n, r, k = 4, 2, 2
    each = 3 * r * (32 + 48)
    assert model.base_model.activated_parameters() == 2 * (k * each + n * 32)


def test_the_others_follow(model, make_remix, make_batch):
    """The same experts in all three linears: those that a module router would take in the first."""
    batch = make_batch()
    other = make_remix(router_sharing="module").eval()
    with torch.no_grad():
        for name, layer in layers(other).items():
            mine = layers(model)[name]
            layer.remix_lora_A["default"].copy_(mine.remix_lora_A["default"])
            layer.remix_lora_B["default"].copy_(mine.remix_lora_B["default"])
        chosen = {}
        for name, site in find_sites(model).items():
            put = site.shared.put
            site.shared.put = lambda s, name=name, put=put: (chosen.update({name: s.index}), put(s))
        losses, _ = token_losses(model, batch)
        forced = {
            f"{name.rpartition('.')[0]}.{linear}": index
            for name, index in chosen.items()
            for linear in ("gate_proj", "up_proj", "down_proj")
        }
        with force_selection(other, forced):
            torch.testing.assert_close(token_losses(other, batch)[0], losses)


def test_forced_and_recorded_by_the_first(model, make_batch):
    batch = make_batch()
    forced = {name: torch.tensor([3, 1]) for name in find_sites(model)}
    with force_selection(model, forced), record_routing(model) as record, torch.no_grad():
        token_losses(model, batch)
    shares = [layer.expert_share for layer in record.stats().layers]
    assert shares == [[0.0, 0.5, 0.0, 0.5]] * 2
    follower = next(name for name in layers(model) if name.endswith("up_proj"))
    with (
        pytest.raises(ValueError, match="is not a routed layer"),
        force_selection(model, {follower: torch.tensor([0, 1])}),
    ):
        pass


def test_generate_save_and_load(model, make_llama, make_batch, tmp_path):
    ids = make_batch((6, 6))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(input_ids=ids, **options)
    assert torch.equal(tokens, model.generate(input_ids=ids, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(input_ids=ids, **options), tokens)
        for name, layer in layers(other).items():
            if not name.endswith("gate_proj"):
                leader = layers(other)[name.rpartition(".")[0] + ".gate_proj"]
                shared = leader.sites["default"].shared
                assert isinstance(layer.sites["default"], FollowingSite)
                assert layer.sites["default"].shared is shared
                assert shared is not layers(model)[name].sites["default"].shared


def test_two_adapters_and_deletion(model, make_batch):
    from remix_model import ReMixConfig

    batch = make_batch()
    with torch.no_grad():
        want = token_losses(model, batch)[0]
        model.add_adapter(
            "other", ReMixConfig(num_experts=3, top_k=1, r=2, init_lora_weights=False)
        )
        torch.testing.assert_close(token_losses(model, batch)[0], want)
        model.set_adapter("other")
        assert len(find_sites(model)) == 6
        assert not torch.allclose(token_losses(model, batch)[0], want)
        model.delete_adapter("other")
        model.set_adapter("default")
        torch.testing.assert_close(token_losses(model, batch)[0], want)
        with model.disable_adapter():
            assert not torch.allclose(token_losses(model, batch)[0], want)


def test_sampled_passes_do_not_leak(model, make_batch):
    """A sampled pass, then top k: every linear follows its own pass."""
    batch = make_batch()
    with torch.no_grad():
        want = token_losses(model, batch)[0]
        with sample_routing(model, 2, seed=0) as routing:
            token_losses(model, routing.expand(batch))
        assert len(routing.selections) == 2
        torch.testing.assert_close(token_losses(model, batch)[0], want)


def test_a_linear_that_runs_first():
    class Selected:
        index = torch.zeros(3, 2)

    shared = SharedSelection("gate")
    up = FollowingSite(make_router("remix", 4, 2), "up", shared)
    with pytest.raises(RuntimeError, match="up follows the router of gate, which has not run"):
        up.select(torch.zeros(3, 4), None, False)
    shared.put(Selected())
    with pytest.raises(ValueError, match=r"up got \[5\] rows .* which had \[3\]"):
        up.select(torch.zeros(5, 4), None, False)
    assert up.select(torch.zeros(3, 4), None, False).index.shape == (3, 2)
    with pytest.raises(RuntimeError, match="has not run"):
        up.select(torch.zeros(3, 4), None, False)


def test_each_follows_once_a_pass():
    """Also where a pass broke off, as a recomputation may that needs no more."""

    class Selected:
        index = torch.zeros(3, 2)

    shared = SharedSelection("gate")
    up, down = (
        FollowingSite(make_router("remix", 4, 2), "up", shared),
        FollowingSite(make_router("remix", 4, 2), "down", shared),
    )
    x = torch.zeros(3, 4)
    shared.put(Selected())
    up.select(x, None, False)
    with pytest.raises(RuntimeError, match="up follows"):
        up.select(x, None, False)
    shared.put(Selected())
    up.select(x, None, False)
    down.select(x, None, False)

"""Every type of router against its formula written out, with autograd; then in a language model."""

from __future__ import annotations

import json
import warnings
from itertools import combinations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from remix_model import (
    ReMixConfig,
    ReMixTrainer,
    RoutedLoRALinear,
    Router,
    export_static_lora,
    force_selection,
    from_lora_adapters,
    record_routing,
    register_router,
    rloo_surrogate,
    sample_routing,
    token_losses,
)
from remix_model.routers import ROUTERS, make_router
from remix_model.site import find_sites
from tests.remix_model.trainer_helpers import examples

KINDS = {
    "mixlora": {},
    "mixlora_block": {},
    "hydralora": {},
    "mor": {"router_kwargs": {"num_routers": 3}},
}
NO_BALANCE = {"load_balancing_coef": 0.0}
ALL = {**KINDS, "uniform": {}, "mor_rloo": {"router_kwargs": {"train": "rloo"}}}
IN, OUT, N, K, R = 6, 5, 4, 2, 3


def router_of(kind, config):
    return {"router_type": kind.removesuffix("_rloo"), **config}


def make_layer(kind, **options):
    torch.manual_seed(3)
    options = {"lora_alpha": 3.0, "router_init_range": 0.8, "init_lora_weights": False, **options}
    layer = RoutedLoRALinear(
        nn.Linear(IN, OUT), num_experts=N, top_k=K, r=R, **router_of(kind, options)
    )
    return layer.double()


def chosen_of(shares):
    """The k largest, renormalised, as [rows, n] with zeros."""
    top, index = shares.topk(K, -1)
    return torch.zeros_like(shares).scatter(-1, index, top / top.sum(-1, keepdim=True))


def mixlora(x, router):
    return chosen_of((x @ router.T).softmax(-1))


def hydralora(x, router):
    return (x @ router.T).softmax(-1)


def mor(x, router, count=3):
    main, votes = (x @ router.T).split((count, count * N), -1)
    votes = votes.view(*x.shape[:-1], count, N).softmax(-1)
    return chosen_of((main.softmax(-1).unsqueeze(-1) * votes).sum(-2))


@pytest.mark.parametrize("rslora", [True, False], ids=["rslora", "lora"])
@pytest.mark.parametrize("shares", [mixlora, hydralora, mor], ids=lambda f: f.__name__)
def test_learned_weights_are_the_formula(shares, rslora, assert_same):
    layer = make_layer(shares.__name__, use_rslora=rslora, **KINDS[shares.__name__])
    scaling = 3.0 / (R**0.5 if rslora else R)
    x = torch.randn(2, 7, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 7, OUT, dtype=torch.float64)

    a = layer.lora_A.expand(N, R, IN)
    experts = torch.einsum("nor,nri,bti->btno", layer.lora_B, a, x)
    delta = (shares(x, layer.router).unsqueeze(-1) * experts).sum(-2)
    want = layer.base_layer(x) + scaling * delta
    inputs = [x, layer.lora_A, layer.lora_B, layer.router]
    want_grads = torch.autograd.grad((want * dy).sum(), inputs)
    got = layer(x)
    assert_same(got, want, 1e-6)
    for grad, want_grad in zip(
        torch.autograd.grad((got * dy).sum(), inputs), want_grads, strict=True
    ):
        assert float(want_grad.norm()) > 1e-3
        assert_same(grad, want_grad, 1e-6)


def test_the_gradient_may_stop_at_the_router(assert_same):
    layer = make_layer("hydralora", router_kwargs={"detach_input": True})
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weights = (x @ layer.router.T).softmax(-1).detach()
    y = torch.einsum("nor,ri,ti,tn->to", layer.lora_B, layer.lora_A[0], x, weights) * layer.scaling
    want = torch.autograd.grad((layer.base_layer(x) + y).square().sum(), x)[0]
    got = torch.autograd.grad(layer(x).square().sum(), (x, layer.router))
    assert_same(got[0], want, 1e-6)
    assert float(got[1].norm()) > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "mor_rloo"])
@pytest.mark.parametrize("checkpointed", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient(kind, checkpointed, grads_of, assert_same):
    config = router_of(kind, ALL[kind])
    options = {"num_selections": 2 if kind == "mor_rloo" else 1, "load_balancing_coef": 0.1}
    want = grads_of("off", config=config, **options)
    assert all(float(grad.norm()) > 0 for grad in want.values())
    assert_same(grads_of(checkpointed, config=config, **options), want, 1e-9)


@pytest.mark.parametrize("checkpointed", ["reentrant", "non-reentrant"])
def test_forced_experts_are_recomputed(
    checkpointed, make_remix, make_batch, checkpointing, take_grads, random_selections, assert_same
):
    """In the backward pass force_selection has ended; two losses with other experts share it."""
    grads = []
    for kind in ("off", checkpointed):
        model = checkpointing(make_remix(router_type="hydralora", router_sharing="block"), kind)
        total = 0.0
        for seed in (0, 1):
            with sample_routing(model, num_selections=1, seed=seed) as routing:
                losses, mask = token_losses(model, routing.expand(make_batch(seed=seed)))
                total = total + routing.loss(losses, mask)
        total.backward()
        grads.append(take_grads(model))
        model = checkpointing(make_remix(router_type="mixlora", router_kwargs=NO_BALANCE), kind)
        with force_selection(model, random_selections(model)):
            loss = model(**make_batch()).loss
        loss.backward()
        grads.append(take_grads(model))
    assert_same(grads[2], grads[0], 1e-9)
    assert_same(grads[3], grads[1], 1e-9)


@pytest.mark.parametrize("checkpointed", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("second", [[2, 3], None], ids=["forced", "free"])
def test_each_loss_has_its_own_forced_experts(
    second, checkpointed, make_remix, make_batch, checkpointing, take_grads, assert_same
):
    """Recomputed after another context, which forced other experts or none."""
    grads = []
    for kind in ("off", checkpointed):
        model = checkpointing(make_remix(router_type="mixlora"), kind)
        forced, names = [], find_sites(model)
        for seed, experts in enumerate(([0, 1], second)):
            selections = {name: torch.tensor(experts) for name in names if experts is not None}
            with (
                sample_routing(model, num_selections=1, seed=seed) as routing,
                force_selection(model, selections),
            ):
                losses, mask = token_losses(model, routing.expand(make_batch()))
                forced.append(routing.loss(losses, mask))
        for loss in forced:
            loss.backward()
        grads.append(take_grads(model))
    assert_same(grads[1], grads[0], 1e-9)


@pytest.mark.parametrize("checkpointed", ["off", "reentrant", "non-reentrant"])
def test_a_random_draw_outside_sampling_is_repeated(
    checkpointed, make_remix, make_batch, checkpointing, take_grads, assert_same
):
    grads = []
    for kind in ("off", checkpointed):
        model = checkpointing(make_remix(router_type="uniform"), kind)
        torch.manual_seed(5)
        model(**make_batch()).loss.backward()
        grads.append(take_grads(model))
    assert_same(grads[1], grads[0], 1e-10)


def test_load_balancing_is_its_formula(
    make_remix, make_batch, sampled_loss, take_grads, assert_same
):
    """Through both layers, with padding, num_items and a scaled loss."""
    batch, coef, scale = make_batch(), 0.3, 8.0
    model = make_remix(router_type="mixlora").train()
    sites = find_sites(model)
    seen = {}
    for name in sites:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0])
        )
    losses, mask = token_losses(model, batch)
    loss, items = (losses * mask).sum() / 40, 40
    real = batch["attention_mask"].bool()
    for name in sites:
        q = (seen[name] @ model.get_submodule(name).remix_router["default"].T).softmax(-1)[real]
        taken = torch.zeros_like(q).scatter(-1, q.topk(K, -1).indices, 1.0)
        balance = 4 * (taken.mean(0) / K * q.mean(0)).sum()
        loss = loss + coef * balance / len(sites) * (mask.sum() / items)
    (loss * scale).backward()
    want = take_grads(model)
    loss, state = sampled_loss(model, batch, items, num_selections=1, load_balancing_coef=coef)
    assert not state.selections  # nothing was drawn, so nothing is kept
    (loss * scale).backward()
    assert_same(take_grads(model), want, 1e-6)


def test_a_policys_temperature_is_no_business_of_weights(
    make_remix, make_batch, make_trainer, sampled_loss
):
    """Beside a policy, which is drawn at 4, the weights stay those of inference."""
    model, batch = make_remix(router_type="hydralora"), make_batch()
    model.add_adapter("drawn", ReMixConfig(num_experts=4, top_k=2, r=2))  # B is zero
    model.base_model.set_adapter(["default", "drawn"])
    with torch.no_grad():
        loss, _ = sampled_loss(model, batch, num_selections=2, temperature=4.0)
        want = model.eval()(**batch).loss
    torch.testing.assert_close(loss.to(want), want, rtol=1e-5, atol=0)
    for name in ("remix_temperature", "remix_temperature_end"):
        with pytest.raises(ValueError, match=f"{name}=3.0: the routers weigh"):
            make_trainer(make_remix(router_type="mixlora"), ReMixTrainer, **{name: 3.0})


def test_load_balancing_comes_with_mixlora(make_remix, make_batch, sampled_loss, take_grads):
    def grads(**kwargs):
        model = make_remix(router_type="mixlora", router_kwargs=kwargs).train()
        loss, _ = sampled_loss(model, make_batch(), num_selections=1)
        loss.backward()
        return take_grads(model)

    default, same, none = grads(), grads(load_balancing_coef=0.01), grads(load_balancing_coef=0)
    for name, grad in default.items():
        assert torch.equal(grad, same[name])
        assert not torch.equal(grad, none[name]) or "layers.1" in name or "lora" in name


def test_the_loss_without_its_load_balancing_is_warned_of(make_remix, make_batch):
    model = make_remix(router_type="mixlora").train()
    with pytest.warns(UserWarning, match="load-balancing term of weight 0.01 is left out"):
        model(**make_batch()).loss.backward()
    quiet = make_remix(router_type="hydralora").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet(**make_batch()).loss.backward()
    assert all(float(p.grad.norm()) > 0 for n, p in quiet.named_parameters() if "router" in n)


@pytest.mark.parametrize("detached", [True, False], ids=["detached", "undetached"])
def test_mor_as_a_policy_is_trained_by_rloo(
    detached, make_remix, make_batch, take_grads, assert_same
):
    """Against plain autograd through log s, with the selections that were drawn."""
    config = {"router_kwargs": {"train": "rloo"}, "router_detach_input": detached}
    model, batch = make_remix(router_type="mor", **config).train(), make_batch()
    with sample_routing(model, num_selections=3, seed=1, log_prob="ordered") as routing:
        losses, mask = token_losses(model, routing.expand(batch))
        loss = routing.loss(losses, mask)
    drawn = {name: routing.drawn_at(site)[0] for name, site in find_sites(model).items()}
    loss.backward()
    got = take_grads(model)
    seen = {}
    for name in drawn:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(
                name, args[0].detach() if detached else args[0]
            )
        )
    folded = {key: value.repeat(3, 1) for key, value in batch.items()}
    with force_selection(model, drawn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses, mask = token_losses(model, folded)
    sequences = ((losses * mask).sum(-1) / batch["labels"][:, 1:].ne(-100).sum()).view(3, -1)
    real, score = folded["attention_mask"].bool(), 0.0
    for name, index in drawn.items():
        main, votes = (seen[name] @ model.get_submodule(name).remix_router["default"].T).split(
            (2, 8), -1
        )
        votes = votes.view(*votes.shape[:-1], 2, 4).softmax(-1)
        s = (main.softmax(-1).unsqueeze(-1) * votes).sum(-2)
        first, second = (s.gather(-1, index[..., j : j + 1].long()).squeeze(-1) for j in (0, 1))
        log_q = first.log() + (second / (1 - first)).log()
        score = score + (log_q * real).sum(-1).view(3, -1)
    rloo_surrogate(sequences, score).backward()
    assert_same(got, take_grads(model), 5e-5)


def test_uniform_takes_all_subsets_alike():
    layer = make_layer("uniform").eval()
    x = torch.randn(6000, IN, dtype=torch.float64)
    with record_routing(layer), torch.no_grad():
        torch.manual_seed(0)
        first = layer(x)
        assert not torch.equal(layer(x), first)
        torch.manual_seed(0)
        assert torch.equal(layer(x), first)
    torch.manual_seed(1)
    drawn = layer.site.select(x, None, False).index.sort(-1).values
    for pair in combinations(range(N), K):
        share = (drawn == torch.tensor(pair)).all(-1).double().mean()
        assert abs(share - 1 / 6) < 4 * (1 / 6 * 5 / 6 / 6000) ** 0.5
    assert [name for name, _ in layer.named_parameters() if "router" in name] == []


@pytest.mark.parametrize("kind", ALL)
def test_an_adapter_is_saved_and_loaded(kind, make_llama, make_remix, make_batch, tmp_path):
    model = make_remix(**router_of(kind, ALL[kind])).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    outputs = []
    for one in (model, again):
        torch.manual_seed(0)
        outputs.append(one(**make_batch()).logits)
    assert torch.equal(outputs[0], outputs[1])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["router_kwargs"] == ALL[kind].get("router_kwargs", {})


@pytest.mark.parametrize("sharing", ["module", "block"])
def test_nothing_is_made_by_a_number_of_the_file(
    sharing, make_llama, make_remix, tmp_path, monkeypatch
):
    model = make_remix(router_type="mor", router_sharing=sharing)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_llama(), tmp_path)
    config = tmp_path / "adapter_config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps({**saved, "router_kwargs": {"num_routers": 1000}}))
    monkeypatch.setattr("remix_model.tuner.layer.make_parameter", None)  # not even called
    with pytest.raises(ValueError, match=r"needs adapter weights of \[5000, (32|'any')\]"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


SHAPES = {
    "vector": lambda self, in_features: (self.num_experts,),
    "bias": lambda self, in_features: [self.num_experts, in_features + 1],
    "transposed": lambda self, in_features: (in_features, self.num_experts),
}
SCORES = {
    "vector": lambda self, x, weight: weight.expand(*x.shape[:-1], -1),
    "bias": lambda self, x, weight: F.linear(x, weight[:, :-1], weight[:, -1]),
    "transposed": lambda self, x, weight: x @ weight,
}


@pytest.mark.parametrize("sharing", ["module", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_may_have_any_shape(
    name, sharing, make_llama, make_remix, make_batch, tmp_path, monkeypatch
):
    kind = type(name, (Router,), {"parameter_shape": SHAPES[name], "logits": SCORES[name]})
    monkeypatch.setitem(ROUTERS, name, kind)
    kind.name = name
    model = make_remix(router_type=name, router_sharing=sharing).train()
    model(**make_batch()).loss.backward()
    assert all(float(p.grad.norm()) > 0 for n, p in model.named_parameters() if "router" in n)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(again(**make_batch()).logits, model.eval()(**make_batch()).logits)


def test_effective_sizes_of_weights_of_any_sign(make_remix, make_batch, monkeypatch):
    """(|w|_1 / |w|_2)^2 of each token; 0 where no expert acts."""
    seen = []

    class Gates(Router):
        name = "gates"

        def weights(self, logits, top_k_index):
            gates = logits.gather(-1, top_k_index.long()).clamp(max=0.5) - 0.3
            gates[..., :2, :] = 0.0
            seen.append(gates.detach())
            return gates

    monkeypatch.setitem(ROUTERS, "gates", Gates)
    model = make_remix(router_type="gates", layers_to_transform=[0], target_modules=["up_proj"])
    with record_routing(model) as recorder, torch.no_grad():
        model(input_ids=make_batch()["input_ids"])
    (layer,), (gates,) = recorder.stats().layers, seen
    assert bool((gates < 0).any())
    ess = (gates.abs().sum(-1) / gates.norm(dim=-1)).square().nan_to_num(0.0)
    assert layer.ess == pytest.approx(float(ess.mean()), rel=1e-5)
    assert layer.ess_min == 0.0 and 0.0 < layer.ess_exp < 2.0


def test_a_shared_a_is_stored_and_counted_once(make_remix):
    model = make_remix(router_type="hydralora", num_experts=5)
    layer = next(m for m in model.modules() if hasattr(m, "remix_lora_A"))
    assert layer.remix_lora_A["default"].shape == (1, 2, 32)
    sizes = [(32, 48), (32, 48), (48, 32)] * 2
    assert model.base_model.activated_parameters() == sum(
        2 * a + 5 * 2 * b + 5 * a for a, b in sizes
    )


@pytest.mark.parametrize("kind", [*KINDS, "mor_rloo"])
def test_generation_reads_its_cache(kind, make_llama, make_remix, make_batch):
    """Also of one row in fp32, which may decode the short way."""
    for base, rows in ((None, 2), (make_llama(dtype=torch.float32), 1)):
        model = make_remix(base, **router_of(kind, ALL[kind])).eval()
        prompt = make_batch()["input_ids"][:rows, :6]
        with torch.no_grad():
            whole = model(prompt).logits
            cache = model(prompt[:, :5], use_cache=True).past_key_values
            last = model(prompt[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(last[:, 0], whole[:, 5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixlora", "mixlora_block"])
def test_a_sequence_keeps_its_weights_while_decoding(kind, make_remix, make_batch):
    """As if the prompt had forced experts and weights on all that follows."""
    model = make_remix(routing_granularity="sequence", router_type=kind).eval()
    tokens = make_batch()["input_ids"][:2, :7]
    labels = torch.where(torch.arange(7) < 4, -100, tokens)  # the prompt is the first four
    with torch.no_grad():
        whole = model(input_ids=tokens, labels=labels).logits
        cache = model(tokens[:, :4], use_cache=True).past_key_values
        rest = model(tokens[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixlora", "hydralora", "mor"])
def test_one_router_may_weigh_for_a_block(kind, make_remix, make_batch, assert_same, take_grads):
    """The followers take the leader's weights, and its router hears from all of them."""
    model = make_remix(router_sharing="block", **router_of(kind, KINDS[kind])).train()
    forced = {name: torch.arange(site.top_k) for name, site in find_sites(model).items()}
    assert len(forced) == 2
    with force_selection(model, forced), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**make_batch()).loss.backward()
    grads = take_grads(model)
    assert sum("router" in name for name in grads) == 2
    assert all(float(grad.norm()) > 0 for grad in grads.values())


@pytest.mark.parametrize("kind", ALL)
def test_a_trainer_trains_it(kind, make_trainer, make_remix, make_batch):
    model = make_remix(**router_of(kind, ALL[kind]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    options = {"max_steps": 12, "learning_rate": 0.01, "evaluate": examples()}
    trainer = make_trainer(model, ReMixTrainer, **options)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, before[name]), name
    assert trainer._sampling_options().num_selections == (1 if kind in KINDS else 4)


CUSTOM = """
import torch.nn.functional as F
from remix_model import Router, register_router

@register_router("cosine")
class CosineRouter(Router):
    options = {**Router.options, "sharpness": 10.0}

    def logits(self, x, weight):
        x, keys = F.normalize(x, dim=-1), F.normalize(weight, dim=-1)
        return self.kwargs["sharpness"] * F.linear(x, keys)
"""


@pytest.fixture
def cosine():
    exec(CUSTOM, {})  # the block of the documentation
    yield
    del ROUTERS["cosine"]


def test_a_router_of_ones_own(cosine, make_remix, make_llama, make_batch, tmp_path, make_trainer):
    model = make_remix(router_type="cosine", router_kwargs={"sharpness": 4.0})
    make_trainer(model, ReMixTrainer, max_steps=2).train()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(again(**make_batch()).logits, model.eval()(**make_batch()).logits)
    site = next(iter(find_sites(again).values()))
    assert (site.router.name, site.router.kwargs["sharpness"]) == ("cosine", 4.0)
    del ROUTERS["cosine"]
    with pytest.raises(ValueError, match=r"'cosine' is unknown.*register your own before"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
    ROUTERS["cosine"] = type(site.router)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "mixlora", "router_kwargs": {"coef": 1}}, "knows no 'coef'; it has load"),
        ({"router_type": "remix", "router_kwargs": {"coef": 1}}, "it has no options"),
        ({"router_kwargs": {"load_balancing_coef": -1}}, "load_balancing_coef=-1"),
        ({"router_kwargs": {"load_balancing_coef": float("nan")}}, "load_balancing_coef=nan"),
        ({"router_kwargs": {"detach_input": 1}}, "detach_input=1"),
        ({"router_type": "mor", "router_kwargs": {"num_routers": 0}}, "num_routers=0"),
        ({"router_type": "mor", "router_kwargs": {"num_routers": 10**9}}, "num_routers=1000000000"),
        ({"router_type": "mor", "router_kwargs": {"train": "both"}}, "train='both' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ReMixConfig(**{"router_type": "mixlora", **fields})


def test_wrong_uses_are_named(make_remix, make_batch, sampled_loss):
    with pytest.raises(ValueError, match="num_selections=2, but the routers weigh"):
        sampled_loss(make_remix(router_type="mixlora"), make_batch(), num_selections=2)
    with pytest.raises(ValueError, match=r"temperature=2\.0, but the routers weigh"):
        sampled_loss(make_remix(router_type="mor"), make_batch(), num_selections=1, temperature=2.0)
    with pytest.raises(ValueError, match=r"grad_selections=1 of 2.*'mor', which is no linear"):
        policy = make_remix(router_type="mor", router_kwargs={"train": "rloo"})
        sampled_loss(policy, make_batch(), num_selections=2, grad_selections=1)
    with pytest.raises(ValueError, match="mixes whole feed-forward blocks, and this is one"):
        RoutedLoRALinear(nn.Linear(2, 2), num_experts=2, top_k=1, r=1, router_type="mixlora_block")
    with pytest.raises(TypeError, match="must be a subclass of"):
        register_router("mine")(nn.Linear)
    with pytest.raises(ValueError, match="'remix' is ReMixRouter already"):
        register_router("remix")(type("Other", (Router,), {}))
    assert make_router("hydralora", 5, 2).top_k == 5
    assert ReMixConfig(router_type="hydralora").top_k == 8


def test_what_learned_weights_cannot_do_is_said(make_llama, make_remix, make_batch, tmp_path):
    model = make_remix(router_type="mixlora")
    experts = {name: [0, 1] for name in find_sites(model)}
    with pytest.raises(ValueError, match="'mixlora' weighs its experts anew for every token"):
        export_static_lora(model, experts, tmp_path / "lora")
    for expert in ("a", "b"):
        lora = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["up_proj"]))
        lora.save_pretrained(tmp_path / expert)
    config = ReMixConfig(router_type="hydralora", num_experts=2, top_k=1, r=2)
    with pytest.raises(ValueError, match="has one A for all experts, and 2 LoRAs have one each"):
        from_lora_adapters(make_llama(), [tmp_path / "a", tmp_path / "b"], config)
    blocks = make_remix(router_type="mixlora_block")
    with pytest.raises(ValueError, match=r"mixes whole feed-forward blocks: its rows"):
        blocks(**make_batch(), adapter_names=["default"] * 3)
    blocks.add_adapter("other", ReMixConfig(num_experts=2, top_k=1, r=2))
    blocks.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other are active together, and one of them"):
        blocks(**make_batch())

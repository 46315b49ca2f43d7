"""`torch.compile` changes nothing, breaks no graph of a language model, and compiles no step anew.

`fullgraph=True` makes a break an error.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from remix_model import (
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)
from remix_model.compiled import Numbered, choose, is_top_k_only
from remix_model.site import UNTRAINED_ROUTER, find_sites
from tests.remix_model.step_helpers import run
from tests.remix_model.trainer_helpers import logged, parameters

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def make_small(make_llama, make_remix):
    """One block in fp64, two of its linears adapted; in train mode."""
    fields = {"target_modules": ["gate_proj", "down_proj"]}
    return lambda **config: make_remix(make_llama(layers=1), **{**fields, **config}).train()


def graphs():
    return counters["stats"]["unique_graphs"]


def make_layers():
    torch.manual_seed(0)
    options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
    options |= {"router_init_range": 0.7, "router_detach_input": False}
    return nn.Sequential(
        RoutedLoRALinear(nn.Linear(5, 6), **options),
        nn.Tanh(),
        RoutedLoRALinear(nn.Linear(6, 3), **options),
    ).double()


def test_plain_modules(take_grads, assert_same):
    """Two steps, so that the second runs what the first compiled."""
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    grads = []
    for compiled in (False, True):
        model = make_layers().train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in (0, 1):
            with sample_routing(model, num_selections=2, seed=seed) as routing:
                loss = routing.loss(run(routing.expand({"x": x})["x"]).square().sum(-1))
            loss.backward()
            grads.append(take_grads(model))
    for eager, compiled in zip(grads[:2], grads[2:], strict=True):
        assert all(grad.any() for grad in eager.values())
        assert_same(compiled, eager, 1e-12)


def test_numbers_belong_to_the_living():
    class Thing:
        pass

    numbers, thing = Numbered(), Thing()
    first = numbers.number(thing)
    assert numbers.find(first) is thing and torch.equal(numbers.number(thing), first)
    assert numbers.find(numbers.number(None)) is None
    del thing
    assert numbers.find(first) is None
    assert int(numbers.number(Thing())) > int(first)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("state", 1),
        ("router", SimpleNamespace(random=True)),
        ("forced", 1),
        ("records", [1]),
        ("replaying", 1),
        ("last", {True: 1, False: None}),
        ("last_forced", {True: 1, False: None}),
    ],
)
def test_a_graph_of_a_top_k_pass_is_for_nothing_else(what, value):
    nothing = {True: None, False: None}
    site = {"state": None, "forced": None, "records": [], "replaying": None}
    site |= {"last": nothing, "last_forced": nothing, "router": SimpleNamespace(random=False)}
    assert is_top_k_only(SimpleNamespace(**site), training=True)
    assert not is_top_k_only(SimpleNamespace(**{**site, what: value}), training=True)


def test_a_state_keeps_memory_of_its_own():
    """A compiled graph may use the memory of what `choose` returned again."""
    layer = make_layers()[0].train()
    with sample_routing(layer, num_selections=2, seed=0) as routing:
        x = routing.expand({"x": torch.randn(2, 3, 5, dtype=torch.float64)})["x"]
        index, _, state = choose(x, layer.router.detach(), layer.site.number, 4, 2, True)
        (kept,) = routing.selections[layer.site.stream]
        assert torch.equal(index, kept.view_as(index)) and int(state) > 0
        assert index.data_ptr() != kept.data_ptr()


def test_trainer(make_trainer, make_remix, make_llama, assert_same):
    runs = []
    for compiled in (False, True):
        model = make_remix(make_llama(layers=1), target_modules=["down_proj"])
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = make_trainer(model, max_steps=4, optim="sgd", learning_rate=1.0, **options)
        trainer.train()
        runs.append((trainer, parameters(model)))
    (eager, want), (compiled, got) = runs
    assert 0 < graphs() < 4  # until lengths and labels are known to differ, not in every step
    norms = logged(eager, "remix/grad_norm_router")
    assert norms[0] > 0
    assert logged(compiled, "remix/grad_norm_router") == pytest.approx(norms, rel=1e-4)
    assert_same(got, want)


# A language model in training -------------------------------------------------------------------

LENGTHS = ((10, 7, 9), (8, 6, 8), (9, 9, 4), (7, 5, 6))
IN_PARTS = {"grad_selections": 1, "selection_chunk_size": 1, "credit": "causal"}


def assert_steps_agree(
    model, compiled, eager, lengths, make_batch, take_grads, assert_same, **options
):
    """Draws, loss and gradients of several steps; returns how many graphs there were after each."""
    counts = []
    for step, sizes in enumerate(lengths):
        batch = make_batch(sizes, prompt=2 + step % 3, seed=step)
        want, _, drawn = run(eager, batch, seed=step, **options)
        got, _, drawn_compiled = run(compiled, batch, seed=step, **options)
        for index, other in zip(drawn_compiled.values(), drawn.values(), strict=True):
            assert torch.equal(index.long(), other.long())
        assert_same(got.detach(), want.detach(), 1e-12)
        grads = take_grads(eager)
        assert all(grad.any() for grad in grads.values())
        assert_same(take_grads(model), grads, 1e-9)
        counts.append(graphs())
    return counts


def test_training_in_one_graph(make_small, make_batch, take_grads, assert_same):
    """New seeds, labels and lengths: once lengths are known to differ, nothing is compiled.

    One graph with gradients and one without, each compiled for one length and then for all.
    """
    model, eager = make_small(), make_small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counts = assert_steps_agree(
        model, compiled, eager, LENGTHS, make_batch, take_grads, assert_same, **IN_PARTS
    )
    assert counts == [2, 4, 4, 4]


@pytest.mark.parametrize(
    ("config", "breaks"),
    [
        pytest.param(
            {"router_detach_input": False, "router_sharing": "block"}, False, id="undetached-block"
        ),
        pytest.param(
            {"router_type": "mor", "router_kwargs": {"train": "rloo"}}, True, id="mor-policy"
        ),
        pytest.param({"lora_dropout": 1e-12}, True, id="dropout"),
        pytest.param(
            {"routing_granularity": "sequence", "target_modules": ["down_proj"]},
            True,
            id="sequence",
        ),
    ],
)
def test_other_ways_to_train(config, breaks, make_small, make_batch, take_grads, assert_same):
    model, eager = make_small(**config), make_small(**config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not breaks)
    lengths = LENGTHS[:1]
    assert_steps_agree(model, compiled, eager, lengths, make_batch, take_grads, assert_same)
    assert graphs() > 0


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_checkpointing(part, make_small, make_batch, take_grads, assert_same):
    """Inside the graph, or around graphs of blocks: recomputations repeat what was drawn.

    A block's graph is compiled for one length only: what takes time here is not what is looked at.
    """
    models = [make_small(), make_small()]
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().disable_input_require_grads()  # which would break the graph
    model, eager = models
    compiled = model
    if part == "model":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for block in model.get_base_model().model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    lengths = LENGTHS[:2] if part == "model" else LENGTHS[:1] * 2
    assert_steps_agree(model, compiled, eager, lengths, make_batch, take_grads, assert_same)
    assert graphs() > 0


def test_losses_after_a_pass_for_all_logits(make_small, make_batch):
    """The graph of the one is not taken for the other, in either order."""
    model = make_small().eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for prompt in (3, 4):
            batch = make_batch(prompt=prompt)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
            (got, mask), (want, _) = token_losses(compiled, batch), token_losses(model, batch)
            assert mask.any()
            torch.testing.assert_close(got, want)
    assert type(model.get_base_model().lm_head) is nn.Linear


def test_outside_sampling_it_warns_once(make_small, make_batch):
    """The adapters learn, the routers get zeros."""
    model = make_small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(**make_batch()).loss.backward()
    assert [str(w.message) for w in caught].count(UNTRAINED_ROUTER) == 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.any()) == ("router" not in name)


# Inference --------------------------------------------------------------------------------------


def test_recording_goes_on(make_small, make_batch):
    """Also where the graph is older than the recorder."""
    model = make_small().eval()
    compiled = torch.compile(model, backend="eager")
    batch = {name: value for name, value in make_batch((9, 9)).items() if name != "labels"}
    stats = []
    with torch.no_grad():
        compiled(**batch)
        for run_model in (model, compiled):
            with record_routing(model) as record:
                run_model(**batch)
            stats.append([layer.expert_share for layer in record.stats().layers])
    assert stats[0] == stats[1] != []


@pytest.mark.parametrize(
    "config", [{}, {"routing_granularity": "sequence"}], ids=["token", "sequence"]
)
def test_generation_with_a_static_cache(config, make_llama, make_remix):
    model = make_remix(make_llama(layers=1), target_modules=["down_proj"], **config).eval()
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    compiling = CompileConfig(backend="eager", fullgraph=not config)
    compiling._compile_all_devices = True  # transformers compiles decoding on GPUs only
    got = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static",
        compile_config=compiling,
        **options,
    )
    assert torch.equal(got, want)
    assert graphs() > 0


# Learned weights ---------------------------------------------------------------------------------


def weighed_step(model, run, batch, seed, forced):
    """The loss of a step in which routers are pulled to balance, and experts may be forced."""
    selections = {name: forced for name in find_sites(model) if forced is not None}
    options = {"num_selections": 1, "load_balancing_coef": 0.5, "seed": seed}
    with force_selection(model, selections), sample_routing(model, **options) as routing:
        losses, mask = token_losses(run, routing.expand(batch))
        loss = routing.loss(losses, mask)
    loss.backward()  # by now nothing is forced
    return loss.detach()


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *((kind, None) for kind in ("mixlora", "mixlora_block", "mor")),
        *(("mixlora", "model"), ("mixlora", "blocks")),
    ],
)
def test_learned_weights_in_one_graph(
    kind, checkpointing, make_small, make_batch, take_grads, assert_same
):
    """In the second step experts are forced; other lengths and seeds, nothing compiled anew."""
    options = {"router_type": kind, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    models = [make_small(**options), make_small(**options)]
    if checkpointing is not None:
        for model in models:
            how = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
            model.gradient_checkpointing_enable(**how)
            model.get_base_model().disable_input_require_grads()  # which would break the graph
    model, eager = models
    compiled = model
    if checkpointing == "blocks":
        for block in model.get_base_model().model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counts = []
    with record_routing(model) as record, record_routing(eager) as record_eager:
        for step, sizes in enumerate(LENGTHS):
            batch = make_batch(sizes, prompt=2, seed=step)
            forced = torch.tensor([3, 1]) if step == 1 else None
            want = weighed_step(eager, eager, batch, step, forced)
            assert_same(weighed_step(model, compiled, batch, step, forced), want, 1e-12)
            grads = take_grads(eager)
            assert all(grad.any() for grad in grads.values())
            assert_same(take_grads(model), grads, 1e-9)
            counts.append(graphs())
    assert counts[1] == counts[-1] > 0
    for got, want in zip(record.stats().layers, record_eager.stats().layers, strict=True):
        assert got.tokens == want.tokens == sum(map(sum, LENGTHS))
        assert (got.expert_share, got.weight_histogram) == (
            want.expert_share,
            want.weight_histogram,
        )


@pytest.mark.parametrize("kind", ["mixlora", "mor"])
def test_learned_weights_outside_sampling(kind, make_small, make_batch, take_grads, assert_same):
    """A plain backward pass trains the routers; what it leaves out is said once."""
    grads, said = [], []
    for compiled in (False, True):
        model = make_small(router_type=kind)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                run(**make_batch()).loss.backward()
        said.append([str(w.message) for w in caught if "load-balancing" in str(w.message)])
        grads.append(take_grads(model))
    assert_same(grads[1], grads[0], 1e-9)
    assert len(said[0]) == (kind == "mixlora")
    assert said[1] == said[0]

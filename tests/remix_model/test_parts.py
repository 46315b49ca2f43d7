"""The M selections in parts: forward-only, in chunks, run twice: the same gradient, no traces."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from remix_model import (
    RoutedLoRALinear,
    record_routing,
    sample_routing,
    token_losses,
)
from remix_model.parts import plan_parts
from remix_model.site import find_sites
from remix_model.state import RoutingState
from tests.remix_model.step_helpers import CONFIGS, random, run

# The parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("m", "g", "c"), [(4, 4, None), (8, 1, None), (8, 2, 3), (7, 5, 2), (3, 3, 9)]
)
def test_plan(m, g, c, exact):
    plan = plan_parts(m, g, c, exact=exact)
    assert all(1 <= part.count <= (c or (g if part.grad else 8 * g)) for part in plan)
    assert all(
        part.count <= (c or g) for part in plan_parts(m, g, c, exact=exact, checkpointed=True)
    )
    counted = [
        s for part in plan if not part.rerun for s in range(part.first, part.first + part.count)
    ]
    assert sorted(counted) == list(range(m))
    graph = [s for part in plan if part.grad for s in range(part.first, part.first + part.count)]
    assert sorted(graph) == list(range(g))
    assert [part.last for part in plan] == [False] * (len(plan) - 1) + [True]
    collected = [part for part in plan if part.collect]
    assert all(part.first >= g or (part.grad and exact) for part in collected)
    assert plan[-1].grad and not plan[-1].collect


@pytest.mark.parametrize("grad_selections", [1, 2])
@pytest.mark.parametrize("log_prob", ["ordered", "unordered"])
def test_forward_only_changes_no_router_gradient(
    grad_selections, log_prob, make_remix, make_batch, take_grads, assert_same
):
    """Same seeds, so the same selections: eligibilities equal what autograd delivers."""
    model, batch = make_remix().train(), make_batch()
    loss, whole, every = run(model, batch, log_prob=log_prob)
    want = take_grads(model)
    less, part, same = run(model, batch, log_prob=log_prob, grad_selections=grad_selections)
    got = take_grads(model)
    assert all(torch.equal(every[name], same[name]) for name in every)
    torch.testing.assert_close(loss, less)
    torch.testing.assert_close(whole.losses, part.losses)
    routers = [name for name in got if "router" in name]
    assert_same({n: got[n] for n in routers}, {n: want[n] for n in routers}, 1e-5)
    assert any((got[n] - want[n]).abs().max() > 1e-3 for n in got if "lora" in n)


OPTIONS = [
    pytest.param({}, id="paper"),
    pytest.param({"credit": "causal", "log_prob": "unordered"}, id="causal-unordered"),
    pytest.param({"grad_selections": 2}, id="G2"),
    pytest.param({"grad_selections": 3, "credit": "causal"}, id="G3-causal"),
    pytest.param({"advantage_norm": "input", "grad_selections": 2}, id="norm-input-G2"),
    pytest.param({"advantage_norm": "batch", "credit": "causal"}, id="norm-batch-causal"),
    pytest.param(
        {"router_entropy_coef": 0.3, "load_balancing_coef": 0.2, "temperature": 0.7}, id="biased"
    ),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_chunked_equals_unchunked(
    options, kind, size, make_remix, make_batch, take_grads, assert_same, checkpointing
):
    model, batch = checkpointing(make_remix(), kind), make_batch()
    options = {"num_selections": 4, **options}
    loss, whole, every = run(model, batch, num_items=50, scale=8.0, **options)
    want = take_grads(model)
    chunked, part, same = run(
        model, batch, num_items=50, scale=8.0, selection_chunk_size=size, **options
    )
    torch.testing.assert_close(chunked, loss)
    torch.testing.assert_close(part.losses, whole.losses)
    assert all(torch.equal(every[name], same[name]) for name in every)
    assert_same(take_grads(model), want, 1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(
    options, kind, config, make_remix, make_batch, take_grads, assert_same, checkpointing
):
    grads = {}
    for switched in ("off", kind):
        model = checkpointing(make_remix(**config), switched)
        run(model, make_batch(), num_selections=4, selection_chunk_size=2, **options)
        grads[switched] = take_grads(model)
    assert_same(grads[kind], grads["off"], 1e-6)


def test_undetached_routers_are_chunked_exactly(make_remix, make_batch, take_grads, assert_same):
    model, batch = make_remix(router_detach_input=False).train(), make_batch()
    run(model, batch)
    want = take_grads(model)
    run(model, batch, selection_chunk_size=1)
    assert_same(take_grads(model), want, 1e-5)
    with pytest.raises(ValueError, match="router_detach_input=False"):
        run(model, batch, grad_selections=1)


@pytest.mark.parametrize(
    "options",
    [
        {"grad_selections": 1},
        {"selection_chunk_size": 1},
        {"grad_selections": 2, "credit": "causal"},
    ],
    ids=["G1", "C1", "G2-causal"],
)
def test_accumulation(options, make_remix, make_batch, take_grads, assert_same):
    """Micro-batches normalised by all their tokens add up, and held gradients leave .grad alone."""
    model, options = make_remix().train(), {"num_selections": 3, **options}
    batches = [make_batch((8, 6), seed=1), make_batch((9, 5), seed=2)]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = None
    for batch in batches:
        own = int((batch["labels"][:, 1:] != -100).sum())
        run(model, batch, **options)
        alone = {name: grad * own / count for name, grad in take_grads(model).items()}
        total = alone if total is None else {n: total[n] + alone[n] for n in total}
    for batch in batches:
        run(model, batch, num_items=count, **options)
    assert_same(take_grads(model), total, 1e-5)


# What it refuses ----------------------------------------------------------------------------------


def test_parts_refuse(make_remix, make_batch):
    model, batch = make_remix().train(), make_batch()
    cut = r"grad_selections=1.*2 parts.*routing\.parts"
    with (
        sample_routing(model, 4, grad_selections=1, seed=0) as routing,
        pytest.raises(RuntimeError, match=cut),
    ):
        routing.expand(batch)
    lost = r"selections 0 to 0 have no losses.*routing\.add"
    with (
        sample_routing(model, 2, selection_chunk_size=1, seed=0) as routing,
        pytest.raises(RuntimeError, match=lost),
    ):
        for _ in routing.parts(batch):
            pass
    assert torch.is_grad_enabled()
    with sample_routing(model, 2, grad_selections=1, seed=0) as routing:
        with pytest.raises(RuntimeError, match=r"0 of 2 selections have losses"):
            routing.loss()
        with pytest.raises(RuntimeError, match=r"no pass whose losses"):
            routing.add(torch.zeros(3, 9))
        part = next(parts := routing.parts(batch))
        assert not torch.is_grad_enabled()
        routing.add(*token_losses(model, part))
        with pytest.raises(RuntimeError, match=r"1 of 2 selections have losses"):
            routing.loss()
        del parts
    assert torch.is_grad_enabled()


def test_an_error_in_a_part_gives_gradients_back(make_remix, make_batch):
    model = make_remix().train()
    with pytest.raises(KeyError), sample_routing(model, 3, grad_selections=1, seed=0) as routing:
        for _ in routing.parts(make_batch()):
            raise KeyError("the user's own")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("options", [{}, {"grad_selections": 1}, {"selection_chunk_size": 1}])
def test_losses_that_are_not_finite(options, make_remix, make_batch):
    from remix_model.errors import NonFiniteError

    model, batch = make_remix().train(), make_batch()
    last = list(find_sites(model))[3]
    router = dict(model.named_modules())[last].remix_router["default"]
    with torch.no_grad():
        dict(model.named_modules())[list(find_sites(model))[2]].remix_lora_B["default"].fill_(
            float("inf")
        )
    with pytest.raises(NonFiniteError, match=rf"the loss of input 0 .*not finite is {last}"):
        run(model, batch, **options)
    assert all(p.grad is None for p in model.parameters()), router


@pytest.mark.parametrize("options", [{"selection_chunk_size": 1}, {"grad_selections": 1}], ids=str)
def test_parts_without_gradients(options, make_remix, make_batch):
    """Under no_grad, parts are only a way to look at losses."""
    model, batch = make_remix().train(), make_batch()
    with torch.no_grad(), sample_routing(model, 3, seed=5) as routing:
        want = routing.loss(*token_losses(model, routing.expand(batch)))
    with torch.no_grad(), sample_routing(model, 3, seed=5, **options) as routing:
        for part in routing.parts(batch):
            routing.add(*token_losses(model, part))
        got = routing.loss()
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_loss_scale_of_parts_cancels(make_remix, make_batch, take_grads, assert_same):
    """What early parts are scaled by, the loss's own scale notwithstanding."""
    model, batch = make_remix().train(), make_batch()
    run(model, batch, scale=8.0)
    want = take_grads(model)
    run(model, batch, scale=8.0, loss_scale=1024.0, selection_chunk_size=1)
    assert_same(take_grads(model), want, 1e-5)


@pytest.mark.parametrize("options", [{"grad_selections": 1}, {"selection_chunk_size": 1}], ids=str)
def test_a_module_that_runs_twice(options, take_grads, assert_same):
    """Both runs count, and what was collected is delivered once."""
    torch.manual_seed(0)
    layer = RoutedLoRALinear(
        nn.Linear(4, 4), num_experts=5, top_k=2, r=2, init_lora_weights=False, router_init_range=1.0
    ).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = random(2, 6, 4)
    grads = []
    for chosen in ({}, options):
        with sample_routing(model, 4, seed=3, **chosen) as routing:
            for part in routing.parts({"x": x}):
                routing.add(model(part["x"]).square().sum(-1))
            loss = routing.loss()
        loss.backward()
        grads.append(take_grads(model))
    assert_same(grads[1]["0.router"], grads[0]["0.router"], 1e-5)


@pytest.mark.parametrize("options", [{"grad_selections": 1}, {"selection_chunk_size": 1}], ids=str)
def test_backward_twice(options, make_remix, make_batch, take_grads, assert_same):
    """What was collected or held is delivered in each backward pass, by its own scale."""
    model, batch = make_remix().train(), make_batch()
    with sample_routing(model, 3, seed=5, **options) as routing:
        for part in routing.parts(batch):
            routing.add(*token_losses(model, part))
        loss = routing.loss()
    (loss * 4).backward(retain_graph=True)
    first = take_grads(model)
    loss.backward()
    assert_same(take_grads(model), {name: grad / 4 for name, grad in first.items()}, 1e-6)


def test_the_layer_of_a_later_part_is_named(make_remix, make_batch):
    """Each part looks at its own numbers, not at those of parts before it."""
    from remix_model.errors import NonFiniteError

    model = make_remix().train()
    second, third = list(find_sites(model))[1:3]
    layer = dict(model.named_modules())[second]
    with sample_routing(model, 2, selection_chunk_size=1, seed=0) as routing:
        for i, part in enumerate(routing.parts(make_batch())):
            if i == 1:
                with torch.no_grad():
                    layer.remix_lora_B["default"].fill_(float("nan"))
            losses, mask = token_losses(model, part)
            if i == 0:
                routing.add(losses, mask)
                continue
            with pytest.raises(NonFiniteError, match=f"input 0 under selection 1 .* is {third}"):
                routing.add(losses, mask)
            break


# Between and after steps --------------------------------------------------------------------------


def test_chunks_that_run_twice_draw_the_same_dropout(make_llama, make_remix, make_batch):
    """The losses of the first run are those of the second: the same noise, so the same draws."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    model = make_remix(GPT2LMHeadModel(GPT2Config(**sizes)).double()).train()
    drawn = {}
    options = {"credit": "causal", "selection_chunk_size": 1, "seed": 0}
    with sample_routing(model, 3, **options) as routing:
        for part in routing.parts(make_batch()):
            losses, mask = token_losses(model, part)
            routing.add(losses, mask)
            draws = [calls[0] for calls in routing.selections.values()]
            drawn.setdefault(routing.part.first, []).append((losses.detach(), draws))
            torch.rand(1)  # the user's own noise changes nothing
        routing.loss()
    for (first, draws), (second, again) in drawn.values():
        torch.testing.assert_close(second, first)
        assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert not torch.equal(drawn[0][0][0], drawn[1][0][0])


@pytest.mark.parametrize("options", [{"grad_selections": 1}, {"selection_chunk_size": 1}], ids=str)
def test_sums_are_precise_under_autocast(options, make_llama, make_remix, make_batch, assert_same):
    """bf16 activations, fp32 sums: many selections do not round each other away."""
    batch, grads = make_batch(), []
    for chosen in ({}, options):
        model = make_remix(make_llama(dtype=torch.float32)).train()
        with (
            torch.autocast("cpu", torch.bfloat16),
            sample_routing(model, 12, seed=5, **chosen) as routing,
        ):
            for part in routing.parts(batch):
                routing.add(*token_losses(model, part))
            loss = routing.loss()
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "router" in n})
    assert_same(grads[1], grads[0], 1e-4)


def test_a_backward_pass_that_raised_leaves_nothing(
    make_remix, make_batch, take_grads, assert_same
):
    """A loop that skips a failed step (out of memory, say) goes on with right gradients."""
    model, batch = make_remix().train(), make_batch()
    options = {"selection_chunk_size": 1}
    run(model, batch, **options)
    want = take_grads(model)

    def fail(grad):
        raise KeyError("the user's own")

    first = next(p for n, p in model.named_parameters() if "layers.0" in n and "lora_A" in n)
    with sample_routing(model, 3, seed=9, **options) as routing:
        for part in routing.parts(make_batch(seed=8)):
            routing.add(*token_losses(model, part))
        loss = routing.loss()
    hook = first.register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    hook.remove()
    model.zero_grad()
    run(model, batch, **options)
    assert_same(take_grads(model), want, 1e-9)


def test_parts_begin_once(make_remix, make_batch):
    model, batch = make_remix().train(), make_batch()
    with sample_routing(model, 3, grad_selections=1, seed=0) as routing:
        for part in routing.parts(batch):
            routing.add(*token_losses(model, part))
            break
        with pytest.raises(RuntimeError, match="begun in this context before"):
            next(routing.parts(batch))


@pytest.mark.parametrize(
    "options",
    [{}, {"grad_selections": 1}, {"selection_chunk_size": 1, "credit": "causal"}],
    ids=["whole", "G1", "C1-causal"],
)
@pytest.mark.parametrize("backward", [True, False], ids=["trained", "thrown-away"])
def test_nothing_outlives_a_step(backward, options, make_remix, make_batch):
    """No state, and none of its tensors, is alive once the loss is gone."""
    model, batch = make_remix().train(), make_batch()
    for step in range(3):
        with sample_routing(model, 3, seed=step, **options) as routing:
            for part in routing.parts(batch):
                routing.add(*token_losses(model, part))
            loss = routing.loss()
        if backward:
            loss.backward()
        del routing, part, loss
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) is RoutingState]
        assert not alive


def test_statistics_count_a_rerun_once(make_remix, make_batch):
    model, batch = make_remix().train(), make_batch((8, 8))
    counts = []
    for options in ({}, {"selection_chunk_size": 1, "credit": "causal"}):
        with record_routing(model) as record:
            run(model, batch, **options)
        counts.append([layer.tokens for layer in record.stats().layers])
    assert counts[0] == counts[1] == [3 * 16] * 6

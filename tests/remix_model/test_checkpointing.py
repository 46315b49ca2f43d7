"""Activation checkpointing: whatever is recomputed, and when, it repeats the pass's own draw."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from remix_model import (
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)

KINDS = ("off", "reentrant", "non-reentrant")
CHECKPOINTED = KINDS[1:]


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"router_detach_input": False}, {}, id="undetached"),
        pytest.param({"router_temperature": 0.5}, {"logprob_tokens": "response"}, id="response"),
    ],
)
def test_checkpointing_changes_no_gradient(kind, config, options, grads_of, assert_same):
    want = grads_of("off", config=config, **options)
    assert all(float(grad.norm()) > 0 for grad in want.values())
    assert_same(grads_of(kind, config=config, **options), want, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_forced_selection_inside_sampling_is_replayed(
    kind, make_remix, make_batch, sampled_loss, take_grads, checkpointing, random_selections
):
    """The backward pass runs after force_selection has ended; its experts are still recomputed."""
    results = []
    for backward_inside in (True, False):
        model = checkpointing(make_remix(), kind)
        with force_selection(model, random_selections(model, (9, 10))):
            loss, _ = sampled_loss(model, make_batch())
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        results.append(take_grads(model))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_forced_selection_without_sampling_is_replayed(
    kind, make_remix, make_batch, take_grads, checkpointing, random_selections, assert_same
):
    """As above for a plain training pass: forced in the forward pass, so forced when recomputed."""
    results = []
    for when in ("off", kind):
        model = checkpointing(make_remix(), when)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with force_selection(model, random_selections(model)):
                loss = model(**make_batch()).loss
            loss.backward()
        results.append(take_grads(model))
    routerless = [{n: g for n, g in r.items() if "router" not in n} for r in results]
    assert_same(routerless[1], routerless[0], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_the_context(
    kind, grads_of, make_remix, make_batch, take_grads, checkpointing
):
    model = checkpointing(make_remix(), kind)
    with sample_routing(model, num_selections=3, seed=0) as routing:
        losses, mask = token_losses(model, routing.expand(make_batch()))
        routing.loss(losses, mask).backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-second", "second-first"])
def test_two_contexts_then_their_backward_passes(
    kind, order, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """Each backward pass replays its own context's draw, in either order."""
    model = checkpointing(make_remix(), kind)
    losses = [sampled_loss(model, make_batch(), seed=seed)[0] for seed in (0, 1)]
    for which in order:
        losses[which].backward()
        got = take_grads(model)
        for name, want in grads_of(kind, seed=which).items():
            assert torch.equal(got[name], want), (which, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True], ids=["loss-at-once", "losses-last"])
def test_one_backward_pass_for_two_contexts(
    kind, late, grads_of, make_remix, make_batch, take_grads, checkpointing, assert_same
):
    """(first + second).backward(): right, or refused where recomputation cannot tell."""
    model = checkpointing(make_remix(), kind)
    parts = []
    for seed in (0, 1):
        with sample_routing(model, num_selections=3, seed=seed) as routing:
            losses = token_losses(model, routing.expand(make_batch()))
            parts.append((routing, losses) if late else routing.loss(*losses))
    if late:
        parts = [routing.loss(*losses) for routing, losses in parts]
    try:
        sum(parts).backward()
    except RuntimeError as error:
        assert kind != "off"
        assert late  # else the first loss's recomputations are over before the second's begin
        assert "sample_routing" in str(error)
        return
    first, second = grads_of("off", seed=0), grads_of("off", seed=1)
    assert_same(take_grads(model), {n: first[n] + second[n] for n in first}, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsampled_pass_is_not_replayed_as_sampled(
    kind, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """A plain training step after a sampled one: top-k, recomputed too; router gradient zero."""

    def plain(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**make_batch()).loss.backward()
        return take_grads(model)

    want = plain(checkpointing(make_remix(), "off"))
    model = checkpointing(make_remix(), kind)
    sampled_loss(model, make_batch((10, 7, 9) * 3), num_selections=2)[0].backward()
    take_grads(model)
    sampled_loss(model, make_batch(), num_selections=2)  # whose backward pass never comes
    got = plain(model)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
        assert "router" not in name or not grad.any()


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_other_passes_between_forward_and_backward(
    kind, grads_of, make_remix, make_batch, sampled_loss, take_grads, checkpointing
):
    """Generating or evaluating between the loss and its backward pass changes nothing."""
    model = checkpointing(make_remix(), kind)
    batch = make_batch()
    loss, _ = sampled_loss(model, batch)
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
        model.eval()
        model(input_ids=batch["input_ids"][:1])
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**batch)
    loss.backward()
    got = take_grads(model)
    for name, want in grads_of(kind).items():
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_counted_once(
    kind, make_remix, make_batch, sampled_loss, checkpointing, take_grads
):
    model = checkpointing(make_remix(), kind)
    with record_routing(model) as record:
        loss, _ = sampled_loss(model, make_batch())
        loss.backward()
    for layer in record.stats().layers:
        assert layer.tokens == 3 * (10 + 7 + 9)


class Checkpointed(nn.Module):
    """Two routed modules, each call checkpointed; `calls` times over."""

    def __init__(self, kind: str, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
        options |= {"router_init_range": 0.7}
        self.first = RoutedLoRALinear(nn.Linear(5, 5), **options).double()
        self.second = RoutedLoRALinear(nn.Linear(5, 5), **options).double()
        self.kind, self.calls = kind, calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.block(x) if self.kind == "off" else self.checkpointed(x)
        return x

    def checkpointed(self, x):
        return checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")

    def block(self, x):
        return self.second(torch.tanh(self.first(x)))

    def sampled(self, x, seed=0):
        with sample_routing(self, num_selections=2, seed=seed) as routing:
            return routing.loss(self(routing.expand({"x": x})["x"]).square().sum(-1))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()


def test_a_module_run_twice(x, take_grads, assert_same):
    """Each call draws for itself, and its gradient is that of both draws."""
    model = Checkpointed("off", calls=2)
    with sample_routing(model, num_selections=2, seed=0) as routing:
        loss = routing.loss(model(routing.expand({"x": x})["x"]).square().sum(-1))
    loss.backward()
    got = take_grads(model)
    calls = routing.selections[model.first.site.stream]
    assert len(calls) == 2
    assert not torch.equal(calls[0], calls[1])
    # The same draws, replayed by an unrolled copy whose four modules share the parameters.
    parts = [nn.ModuleList([_twin(model.first), _twin(model.second)]) for _ in range(2)]
    unrolled = nn.ModuleList(parts)
    selections = {
        f"{call}.{i}": routing.selections[module.site.stream][call]
        for call in range(2)
        for i, module in enumerate((model.first, model.second))
    }
    with sample_routing(unrolled, num_selections=2, seed=0) as routing:
        h = routing.expand({"x": x})["x"]
        with force_selection(unrolled, selections):
            for first, second in parts:
                h = second(torch.tanh(first(h)))
        routing.loss(h.square().sum(-1)).backward()
    assert_same(got, take_grads(model), 1e-12)


def _twin(module: RoutedLoRALinear) -> RoutedLoRALinear:
    twin = RoutedLoRALinear(
        module.base_layer, num_experts=module.num_experts, top_k=module.top_k, r=module.r
    )
    twin.lora_A, twin.lora_B, twin.router = module.lora_A, module.lora_B, module.router
    return twin


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_module_run_twice_cannot_be_recomputed(kind, x):
    loss = Checkpointed(kind, calls=2).sampled(x)
    with pytest.raises(RuntimeError, match=r"ran 2 times .* one context for each forward pass"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_over_part_of_the_model_leaves_older_draws_alone(kind, x, take_grads):
    """A context on one module numbers modules anew; the whole model's draw is still replayed."""
    results = []
    for other_context in (False, True):
        model = Checkpointed(kind)
        loss = model.sampled(x)
        if other_context:
            with sample_routing(model.second, num_selections=2, seed=9) as routing:
                model.second(routing.expand({"x": x})["x"])
        loss.backward()
        results.append(take_grads(model))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_backward_pass_that_failed(kind, x, take_grads):
    """An exception in the backward pass does not make later plain passes replay its draw."""

    def plain(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.cat([x, x])).square().sum().backward()
        return take_grads(model)

    want = plain(Checkpointed(kind))
    model = Checkpointed(kind)
    loss = model.sampled(x)
    handle = model.first.lora_A.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    got = plain(model)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


# A draw is repeated by its own pass only --------------------------------------------------------

FORCED = {"first": torch.tensor([0, 1]), "second": torch.tensor([3, 1])}


def unsampled(model, x, forced=False):
    """A plain loss, its selections forced or the top k; to be differentiated later."""
    with (
        force_selection(model, FORCED) if forced else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return model(x).square().sum()


def own_loss(model, x):
    """A sampled loss without routing.loss: nothing announces its backward pass."""
    with sample_routing(model, num_selections=2, seed=0) as routing:
        return model(routing.expand({"x": x})["x"]).square().sum()


EARLIER = {
    "sampled": lambda model, x: model.sampled(x),
    "own-loss": own_loss,
    "forced": lambda model, x: unsampled(model, x, forced=True),
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("earlier", EARLIER.values(), ids=EARLIER.keys())
def test_evaluating_with_gradients_after_a_step(kind, earlier, x, take_grads):
    """In eval mode nothing of the finished training step is repeated: of the same size or not."""
    model = Checkpointed(kind)
    earlier(model, x).backward()
    take_grads(model)
    for rows in (x, torch.cat([x, x])):
        plain = Checkpointed("off").eval()
        unsampled(plain, rows).backward()
        want = {n: p.grad for n, p in plain.named_parameters() if "lora" in n}
        unsampled(model.eval(), rows).backward()
        for name, grad in want.items():
            assert torch.equal(model.get_parameter(name).grad, grad), name
        model.zero_grad()


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("forced", [False, True], ids=["top-k", "forced"])
@pytest.mark.parametrize("sampled", [EARLIER["sampled"], own_loss], ids=["sampled", "own-loss"])
@pytest.mark.parametrize("plain_first", [False, True], ids=["plain-last", "plain-first"])
def test_a_plain_pass_then_a_sampled_one(kind, forced, sampled, plain_first, x, take_grads):
    """Both in train mode, neither differentiated before both are there; in either order."""
    want = []
    for loss in (lambda model: unsampled(model, x, forced), lambda model: sampled(model, x)):
        model = Checkpointed("off")
        loss(model).backward()
        want.append(take_grads(model))
    model = Checkpointed(kind)
    losses = [unsampled(model, x, forced), sampled(model, x)]
    for which in (0, 1) if plain_first else (1, 0):
        losses[which].backward()
        got = take_grads(model)
        for name, grad in want[which].items():
            assert torch.equal(got[name], grad), (which, name)


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_plain_pass_of_as_many_rows_as_a_sampled_one(kind, x, take_grads):
    """The rows do not tell them apart; the sampled loss announces its own backward pass."""
    results = []
    for when in ("off", kind):
        model = Checkpointed(when)
        plain, sampled = unsampled(model, torch.cat([x, x])), model.sampled(x)
        plain.backward()
        first = take_grads(model)
        sampled.backward()
        results.append((first, take_grads(model)))
    for want, got in zip(*results, strict=True):
        for name, grad in want.items():
            assert torch.equal(got[name], grad), name


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_one_backward_pass_for_a_plain_and_a_sampled_loss(kind, x, take_grads, assert_same):
    results = []
    for when in ("off", kind):
        model = Checkpointed(when)
        plain = unsampled(model, x)
        (plain + model.sampled(x)).backward()
        results.append(take_grads(model))
    assert_same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_forcing_during_the_backward_pass_changes_nothing(kind, x, take_grads):
    """What was the top k in the forward pass is the top k when recomputed."""
    results = []
    for forced in (False, True):
        model = Checkpointed(kind)
        loss = unsampled(model, x)
        with force_selection(model, FORCED) if forced else contextlib.nullcontext():
            loss.backward()
        results.append(take_grads(model))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_two_forced_passes_of_different_sizes(kind, x):
    """Which of them is recomputed cannot be told: an error, never the other's experts."""
    model = Checkpointed(kind)
    loss = unsampled(model, x, forced=True)
    unsampled(model, x[:1], forced=True)
    with pytest.raises(RuntimeError, match=r"\[2, 3\] rows.*had \[1, 3\]: call backward"):
        loss.backward()

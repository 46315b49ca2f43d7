"""The sampling context: folding, advantages, seeds, independent streams, forced selections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remix_kernels import sample_top_k
from remix_model import (
    RoutedLoRALinear,
    force_selection,
    record_routing,
    sample_routing,
    token_losses,
)
from remix_model.random_state import mix_seed
from remix_model.site import find_sites


def stack(count=3, n=4, k=2, features=5):
    """Routed modules one after the other, without nonlinearity."""
    torch.manual_seed(0)
    options = {"num_experts": n, "top_k": k, "r": 2, "init_lora_weights": False}
    options |= {"router_init_range": 0.7}
    modules = (RoutedLoRALinear(nn.Linear(features, features), **options) for _ in range(count))
    return nn.Sequential(*modules).double().train()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(model, x, num_selections=2, seed=0):
    with sample_routing(model, num_selections=num_selections, seed=seed) as routing:
        model(routing.expand({"x": x})["x"])
    return [calls[0] for calls in routing.selections.values()]


# Folding --------------------------------------------------------------------------------------


def test_expand_is_selection_major():
    with sample_routing(stack(), num_selections=3, seed=0) as routing:
        batch = {
            "input_ids": torch.tensor([[1, 2], [3, 4]]),
            "position_ids": torch.tensor([[0, 1]]),  # one row for all
            "use_cache": False,
            "temperature": torch.tensor(2.0),
            "names": ["a", "b"],
        }
        folded = routing.expand(batch)
    assert folded["input_ids"].tolist() == [[1, 2], [3, 4]] * 3
    assert folded["position_ids"].tolist() == [[0, 1]]
    assert folded["use_cache"] is False
    assert folded["temperature"] is batch["temperature"]
    assert folded["names"] is batch["names"]
    assert batch["input_ids"].shape == (2, 2)
    assert (routing.batch_size, routing.folded_batch_size) == (2, 6)


def test_expand_of_one_row_repeats_everything():
    with sample_routing(stack(), num_selections=3, seed=0) as routing:
        folded = routing.expand(
            {"input_ids": torch.ones(1, 4), "position_ids": torch.arange(4)[None]}
        )
    assert folded["input_ids"].shape == folded["position_ids"].shape == (3, 4)


# The loss and the advantages ------------------------------------------------------------------


def test_loss_and_advantages_by_hand():
    """L[m, b] = sum_t loss / N; advantage (L - mean over m) / (M - 1); loss = sum L / M."""
    with sample_routing(stack(), num_selections=3, seed=0) as routing:
        routing.expand({"x": random(2, 4, 5)})
        losses = random(6, 4, seed=2)
        mask = torch.rand(2, 4, generator=torch.Generator().manual_seed(3)) < 0.6
        mask = torch.cat([mask] * 3)
        loss = routing.loss(losses, mask, num_items=7)
    per_sequence = (losses * mask).sum(1).view(3, 2) / 7
    want = (per_sequence - per_sequence.mean(0)) / 2
    torch.testing.assert_close(routing.losses, per_sequence)
    torch.testing.assert_close(routing.advantages.view(3, 2), want)
    torch.testing.assert_close(loss, per_sequence.sum() / 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [None, 4])
def test_default_normaliser_counts_one_copy_of_the_batch(masked, columns):
    shape = (6,) if columns is None else (6, columns)
    losses = random(*shape)
    mask = torch.cat([random(*(2, *shape[1:]), seed=4) < 0.5] * 3) if masked else None
    count = losses.numel() / 3 if mask is None else int(mask.sum()) / 3
    results = []
    for num_items in (None, count):
        with sample_routing(stack(), num_selections=3, seed=0) as routing:
            routing.expand({"x": random(2, 4, 5)})
            results.append(routing.loss(losses, mask, num_items))
    torch.testing.assert_close(*results)


def test_a_second_loss_of_one_context(take_grads, assert_same):
    """Refused, or both count: never the last one's advantages for the sum of both."""
    model, results = stack(), []
    for parts in ((1.0, 2.0), (3.0,)):
        with sample_routing(model, num_selections=3, seed=0) as routing:
            losses = model(routing.expand({"x": random(2, 4, 5)})["x"]).square().sum(-1)
            try:
                sum(routing.loss(part * losses) for part in parts).backward()
            except RuntimeError as error:
                assert "one loss" in str(error)
                return
        results.append(take_grads(model))
    assert_same(*results)


def test_masked_losses_may_be_anything():
    """A loss that is not counted may be nan: it reaches neither the sum nor the gradient."""
    losses = random(4, 3).requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:, 1] = False
    with torch.no_grad():
        losses[:, 1] = float("nan")
    with sample_routing(stack(), num_selections=2, seed=0) as routing:
        routing.expand({"x": random(2, 3, 5)})
        loss = routing.loss(losses, mask)
    loss.backward()
    assert loss.isfinite()
    assert routing.advantages.isfinite().all()
    assert losses.grad.isfinite().all()
    assert not losses.grad[:, 1].any()


def test_one_selection_with_frozen_routers(take_grads):
    """M = 1 draws and trains the adapters; there is no advantage."""
    model = stack()
    for module in model:
        module.router.requires_grad_(False)
    with sample_routing(model, num_selections=1, seed=0) as routing:
        y = model(routing.expand({"x": random(2, 3, 5)})["x"])
        loss = routing.loss(y.square().sum(-1))
    assert not routing.advantages.any()
    loss.backward()
    assert all(grad.any() for grad in take_grads(model).values())
    assert all(module.router.grad is None for module in model)


# Seeds and streams ----------------------------------------------------------------------------


def test_a_seed_reproduces_and_another_differs():
    model, x = stack(), random(4, 8, 5)
    first, again, other = draws(model, x), draws(model, x), draws(model, x, seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_sampling_leaves_the_global_generator_alone():
    model, x = stack(), random(4, 8, 5)
    state = torch.random.get_rng_state()
    draws(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_are_distinct_experts_in_the_drawn_order():
    """Every row's k experts differ, and both orders of a pair occur."""
    for index in draws(stack(), random(4, 16, 5)):
        assert index.shape == (8, 16, 2)
        assert (index[..., 0] != index[..., 1]).all()
        assert (index[..., 0] < index[..., 1]).any()
        assert (index[..., 0] > index[..., 1]).any()
        assert index.min() == 0
        assert index.max() == 3


def test_each_draw_is_the_documented_one():
    """sample_top_k over the whole folded input with key mix(seed, module, call)."""
    model, x = stack(), random(2, 3, 5)
    (index, *_) = draws(model, x, num_selections=3, seed=17)
    z = torch.cat([x] * 3).float() @ model[0].router.T.float()
    assert torch.equal(index, sample_top_k(z, 2, seed=mix_seed(17, 0, 0)))


def test_modules_do_not_share_random_draws():
    """Equal logits everywhere: the noise alone decides, and it is independent between modules,
    selections, inputs, positions and calls.
    """
    model = stack(count=4)
    for module in model:
        nn.init.zeros_(module.router)
    with sample_routing(model, num_selections=2, seed=0) as routing:
        for _ in range(2):
            model(routing.expand({"x": random(20, 50, 5)})["x"])
    noise = [i.view(2, 20, 50, 2) for calls in routing.selections.values() for i in calls]
    assert len(noise) == 8
    rows = 2 * 20 * 50

    def assert_independent(a, b):
        """Ordered pairs of 4 experts agree with probability 1/12; 5 standard deviations."""
        count = a[..., 0].numel()
        agree = float((a == b).all(-1).double().mean())
        assert abs(agree - 1 / 12) < 5 * (11 / 144 / count) ** 0.5

    for i, a in enumerate(noise):
        counts = torch.bincount(a[..., 0].flatten(), minlength=4).double()
        assert ((counts / rows - 0.25).abs() < 5 * (3 / 16 / rows) ** 0.5).all()
        for b in noise[:i]:
            assert_independent(a, b)
        assert_independent(a[0], a[1])
        assert_independent(a[:, 1:], a[:, :-1])
        assert_independent(a[:, :, 1:], a[:, :, :-1])


def test_mixed_seeds_do_not_collide():
    seeds = {mix_seed(s, a, b) for s in range(20) for a in range(40) for b in range(20)}
    assert len(seeds) == 20 * 40 * 20
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(-1, 0) == mix_seed(2**64 - 1, 0)


# Sampling only where it was asked for ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_top_k_outside_a_context(training, make_remix, make_batch):
    model, batch = make_remix().train(training), make_batch()
    with torch.no_grad(), record_routing(model):
        first, second = model(**batch).logits, model(**batch).logits
        with sample_routing(model, num_selections=2, seed=0) as routing:
            sampled = model(**routing.expand(batch)).logits
        third = model(**batch).logits
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(sampled[:3], first)


def test_a_context_closes_after_an_exception():
    model = stack()
    with pytest.raises(KeyError), sample_routing(model, num_selections=2, seed=0):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(model(random(3, 5)), model(random(3, 5)))
    draws(model, random(2, 3, 5))


def test_response_draws_only_where_labels_are_predicted(make_remix, make_batch):
    """The prompt's positions, and padding, take the top k; the other positions are drawn."""
    model, batch = make_remix().train(), make_batch(prompt=4)
    options = {"num_selections": 4, "seed": 0, "logprob_tokens": "response"}
    x = {}
    modules = dict(model.named_modules())
    for name in find_sites(model):
        modules[name].register_forward_pre_hook(
            lambda m, args, name=name: x.update({name: args[0]})
        )
    with sample_routing(model, **options) as routing, torch.no_grad():
        folded = routing.expand(batch)
        token_losses(model, folded)
    predicts = torch.zeros_like(folded["labels"], dtype=torch.bool)
    predicts[:, :-1] = folded["labels"][:, 1:] != -100
    assert torch.equal(routing.folded.sampled, predicts)
    assert not predicts[:, :3].any()
    assert predicts[:, 3].all()
    for name, site in find_sites(model).items():
        top = (x[name] @ modules[name].remix_router["default"].T).topk(2).indices
        same = (routing.selections[site.stream][0] == top).all(-1)
        assert same[~predicts].all()
        assert not same[predicts].all()


# Forced selections ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (1, 7), (2, 7), (2, 1)], ids=str)
def test_forced_selections_broadcast(shape):
    model, x = stack(), random(2, 7, 5)
    index = random(*shape, 4, seed=3).topk(2, dim=-1).indices
    whole = index.expand(2, 7, 2)
    with torch.no_grad():
        with force_selection(model, {"1": index}):
            got = model(x)
        with force_selection(model, {"1": whole.contiguous()}):
            want = model(x)
    assert torch.equal(got, want)
    rows = torch.cat([whole] * 3)
    with force_selection(model, {"1": index}):
        assert torch.equal(draws(model, x, num_selections=3)[1].long(), rows)


def test_forced_selections_are_scored_like_draws(take_grads):
    """Forcing what would have been drawn changes no gradient."""
    model, x = stack(), random(2, 3, 5)
    results, selections = [], {}
    for _ in range(2):
        with (
            force_selection(model, selections),
            sample_routing(model, num_selections=3, seed=0) as routing,
        ):
            y = model(routing.expand({"x": x})["x"])
            loss = routing.loss(y.square().sum(-1))
        loss.backward()
        results.append(take_grads(model))
        selections = {str(i): routing.selections[i][0] for i in range(3)}
    for name, want in results[0].items():
        assert want.any()
        assert torch.equal(results[1][name], want)


def test_forced_selections_nest_and_end():
    model, x = stack(), random(2, 3, 5)
    one, two = torch.tensor([0, 1]), torch.tensor([3, 2])

    def run(selections):
        with force_selection(model, selections):
            return model(x)

    with torch.no_grad():
        free, first, second = model(x), run({"0": one}), run({"0": two})
        with force_selection(model, {"0": one}):
            assert torch.equal(run({"0": two}), second)
            assert torch.equal(model(x), first)
            assert torch.equal(run({"1": two}), run({"0": one, "1": two}))
        assert torch.equal(model(x), free)
    assert not torch.equal(free, first)
    assert not torch.equal(first, second)


# Padding and order ----------------------------------------------------------------------------


def run_forced(model, batch, index, take_grads, num_selections=2):
    """Logits of the folded batch, loss and gradients; every position's experts [M, B, T, k]."""
    with (
        force_selection(model, {n: i.flatten(0, 1) for n, i in index.items()}),
        sample_routing(model, num_selections=num_selections, seed=0) as routing,
    ):
        folded = routing.expand(batch)
        inputs = {k: v for k, v in folded.items() if k != "labels"}
        logits = model(**inputs, use_cache=False).logits
        targets = folded["labels"][:, 1:]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, reduction="none"
        )
        loss = routing.loss(loss, targets != -100)
    loss.backward()
    return logits.detach(), float(loss.detach()), take_grads(model)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(
    side, make_remix, make_batch, take_grads, random_selections, assert_same
):
    """Other, and more, padding: same outputs at real tokens, same loss, same gradients."""
    model, batch = make_remix().train(), make_batch((10, 10, 10))
    batch["position_ids"] = torch.arange(10).repeat(3, 1)
    index = random_selections(model, (2, 3, 10))
    want = run_forced(model, batch, index, take_grads)

    def pad(tensor, value, dim):
        width = [*tensor.shape]
        width[dim] = 4
        fill = torch.full(width, value, dtype=tensor.dtype)
        return torch.cat((tensor, fill) if side == "right" else (fill, tensor), dim)

    fills = {"input_ids": 9, "attention_mask": 0, "labels": -100, "position_ids": 0}
    padded = {key: pad(value, fills[key], 1) for key, value in batch.items()}
    spare = random_selections(model, (2, 3, 4), seed=11)
    parts = {name: (i, spare[name]) for name, i in index.items()}
    index = {n: torch.cat(p if side == "right" else p[::-1], 2) for n, p in parts.items()}
    got = run_forced(model, padded, index, take_grads)
    real = slice(0, 10) if side == "right" else slice(4, 14)
    assert_same(got[0][:, real], want[0], 1e-12)
    assert got[1] == pytest.approx(want[1], rel=1e-6)
    assert_same(got[2], want[2])


def test_batch_order_changes_nothing(
    make_remix, make_batch, take_grads, random_selections, assert_same
):
    model, batch = make_remix().train(), make_batch((10, 7, 9, 4))
    index = random_selections(model, (2, 4, 10))
    want = run_forced(model, batch, index, take_grads)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {k: v[order] for k, v in batch.items()}
    got = run_forced(model, shuffled, {n: i[:, order] for n, i in index.items()}, take_grads)
    assert_same(got[0].view(2, 4, 10, -1), want[0].view(2, 4, 10, -1)[:, order], 1e-12)
    assert_same(got[2], want[2])


def test_selection_order_changes_nothing(
    make_remix, make_batch, take_grads, random_selections, assert_same
):
    """The M selections are exchangeable."""
    model, batch = make_remix().train(), make_batch()
    index = random_selections(model, (3, 3, 10))
    want = run_forced(model, batch, index, take_grads, 3)
    rolled = {n: i.roll(1, 0) for n, i in index.items()}
    assert_same(run_forced(model, batch, rolled, take_grads, 3)[2], want[2])


def test_one_fold_equals_separate_passes(
    make_remix, make_batch, take_grads, random_selections, assert_same
):
    """The loss of M selections in one pass is the mean of M passes; so is LoRA's gradient."""
    model, batch = make_remix().train(), make_batch()
    index = random_selections(model, (3, 3, 10))
    _, loss, grads = run_forced(model, batch, index, take_grads, 3)
    losses = []
    with pytest.warns(UserWarning, match="outside sample_routing"):
        for m in range(3):
            with force_selection(model, {n: i[m] for n, i in index.items()}):
                part, mask = token_losses(model, batch)
            part = part.sum() / mask.sum()
            (part / 3).backward()
            losses.append(float(part.detach()))
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    separate = take_grads(model)
    lora = [n for n in grads if "lora" in n]
    assert_same({n: separate[n] for n in lora}, {n: grads[n] for n in lora}, 1e-6)

"""`ReMixTrainer`: learning, what is logged, accumulation, resuming."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch

import remix_model.trainer
from remix_model import force_selection, record_routing, sample_routing
from remix_model.site import find_sites
from tests.remix_model.trainer_helpers import collate, examples, logged, parameters, spied_seeds

# Learning and what is logged ------------------------------------------------------------------


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_steps=30, learning_rate=2e-2, logging_steps=5)
    before = parameters(trainer.model)
    trainer.train()
    return trainer, before


def test_it_learns(trained):
    trainer, before = trained
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.3
    for name, parameter in parameters(trainer.model).items():
        assert not torch.equal(parameter, before[name]), name


def test_metrics(trained):
    trainer, _ = trained
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    names = ("loss_spread", "advantage_std", "entropy", "ess", "policy_ess", "share_ess")
    names += ("dead_experts", "grad_norm_router", "grad_norm_lora")
    layers = list(find_sites(trainer.model))
    for entry in entries:
        values = {name: entry[f"remix/{name}"] for name in names}
        assert all(isinstance(v, float) and math.isfinite(v) for v in values.values())
        assert 0 < values["entropy"] <= math.log(4)
        assert values["ess"] == 2.0
        assert 1 <= values["policy_ess"] <= 4
        assert values["loss_spread"] > 0
        assert values["advantage_std"] > 0
        assert list(entry["remix/expert_share"]) == layers
        assert all(sum(share) == pytest.approx(1) for share in entry["remix/expert_share"].values())
    json.dumps(trainer.state.log_history)


def test_metrics_are_those_of_the_window(make_trainer):
    """Spread, norms and shares of exactly the steps since the last log, from the same draws."""
    every = make_trainer(logging_steps=1)
    every.train()
    pairs = make_trainer(logging_steps=2)
    pairs.train()
    for name in ("loss_spread", "advantage_std"):
        single, double = logged(every, f"remix/{name}"), logged(pairs, f"remix/{name}")
        want = [(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)]
        assert double == pytest.approx(want, rel=1e-4)
    assert logged(pairs, "remix/grad_norm_lora") == pytest.approx(
        logged(every, "remix/grad_norm_lora")[1::2], rel=1e-4
    )


def test_recording_around_a_trainer(make_trainer):
    trainer = make_trainer(max_steps=2)
    with record_routing(trainer.model) as record:
        trainer.train()
    assert record.stats().layers


def test_loss_spread_and_norms_by_hand(make_trainer, make_remix, make_llama):
    """The first step's numbers from sample_routing itself."""
    paper = {"remix_credit": "sequence", "remix_log_prob": "ordered"}
    trainer = make_trainer(max_steps=1, max_grad_norm=1e6, **paper)
    batches = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *a: (
        batches.append(copy.deepcopy(dict(inputs))),
        step(model, inputs, *a),
    )[1]
    seeds = []
    with spied_seeds(seeds):
        trainer.train()
    model = make_remix(make_llama(dtype=torch.float32)).train()
    (batch,), ((seed, _),) = batches, seeds
    with sample_routing(model, num_selections=4, seed=seed) as routing:
        losses, mask = remix_model.token_losses(model, routing.expand(batch))
        routing.loss(losses, mask).backward()
    per_token = (losses.sum(1) / mask.sum(1)).view(4, -1).detach()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert entry["loss"] == pytest.approx(float(routing.losses.sum() / 4), rel=1e-4)
    spread = float(per_token.std(0, correction=0).mean())
    assert entry["remix/loss_spread"] == pytest.approx(spread, rel=1e-4)
    deviation = float(routing.advantages.std(correction=0))
    assert entry["remix/advantage_std"] == pytest.approx(deviation, rel=1e-4)
    for kind in ("router", "lora"):
        grads = [p.grad for n, p in model.named_parameters() if f"remix_{kind}" in n]
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        assert entry[f"remix/grad_norm_{kind}"] == pytest.approx(norm, rel=1e-4)


def test_every_micro_step_has_its_own_seed(make_trainer):
    seeds = []
    with spied_seeds(seeds):
        make_trainer(gradient_accumulation_steps=2, remix_num_selections=3).train()
    assert len(seeds) == len(set(seeds)) == 8
    again, other = [], []
    with spied_seeds(again):
        make_trainer(gradient_accumulation_steps=2, remix_num_selections=3).train()
    with spied_seeds(other):
        make_trainer(gradient_accumulation_steps=2, remix_num_selections=3, seed=1).train()
    assert seeds == again
    assert not set(seeds) & set(other)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_trains_alike(reentrant, make_trainer, assert_same):
    plain = make_trainer()
    plain.train()
    options = {"use_reentrant": reentrant}
    saving = make_trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
    saving.train()
    assert_same(parameters(saving.model), parameters(plain.model), 1e-4)


# Gradient accumulation ------------------------------------------------------------------------


def test_accumulation_equals_a_large_batch(make_trainer, make_llama, make_remix, assert_same):
    """Routers frozen, selections forced, different lengths: one step of SGD, in fp64."""
    results = []
    for size, count in ((8, 1), (2, 4), (1, 8)):
        model = make_remix(make_llama())
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.requires_grad_(False)
        trainer = make_trainer(
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            remix_num_selections=2,
        )
        before = parameters(model)
        with force_selection(model, {name: torch.tensor([2, 0]) for name in find_sites(model)}):
            trainer.train()
        moved = {n: p - before[n] for n, p in parameters(model).items()}
        results.append((moved, logged(trainer, "loss")[0]))
    for moved, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-5)
        assert_same(moved, results[0][0], 1e-5)


def test_loss_is_normalised_by_labelled_tokens(make_trainer, make_llama, make_remix):
    """SGD's first step moves by the gradient of the token mean, for any accumulation."""
    model = make_remix(make_llama())
    trainer = make_trainer(
        model,
        train=examples(4),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    reference = make_remix(make_llama())
    before = parameters(model)
    index = {name: torch.tensor([1, 3]) for name in find_sites(model)}
    with force_selection(model, index):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with force_selection(reference, index):
            reference.train()(**collate(examples(4))).loss.backward()
    for name, parameter in reference.named_parameters():
        if "lora" in name:
            moved = before[name] - model.get_parameter(name)
            torch.testing.assert_close(moved, parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("size", "count"), [(4, 1), (2, 2), (1, 4)], ids=["4x1", "2x2", "1x4"])
def test_loss_spread_under_accumulation(size, count, make_trainer, monkeypatch):
    """A token costs m under selection m: the spread is sqrt(5/4), whatever the lengths."""

    def costs(model, batch):
        losses, mask = remix_model.token_losses(model, batch)
        cost = torch.arange(4).repeat_interleave(len(mask) // 4).unsqueeze(1)
        return losses * 0 + cost * mask, mask

    monkeypatch.setattr(remix_model.trainer, "token_losses", costs)
    trainer = make_trainer(
        train=examples(4),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count,
        max_steps=1,
    )
    trainer.train()
    assert logged(trainer, "remix/loss_spread") == pytest.approx([math.sqrt(1.25)], rel=1e-5)
    assert logged(trainer, "loss") == pytest.approx([1.5], rel=1e-5)


# Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_training_is_bit_equal(
    accumulation, dropout, make_trainer, make_llama, make_remix, tmp_path
):
    """Through the middle of an epoch, in a new model whose adapter starts elsewhere."""
    options = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "remix_router_learning_rate": 5e-2,
    }

    def trainer(seed):
        model = make_remix(make_llama(dtype=torch.float32), seed=seed, lora_dropout=dropout)
        return make_trainer(model, **options)

    seeds, resumed_seeds = [], []
    straight = trainer(1)
    with spied_seeds(seeds):
        straight.train()
    resumed = trainer(2)
    with spied_seeds(resumed_seeds):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert resumed_seeds == seeds[2 * accumulation :]
    want, got = parameters(straight.model), parameters(resumed.model)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    want, got = (t.optimizer.state_dict() for t in (straight, resumed))
    assert got["param_groups"] == want["param_groups"]
    for key, state in want["state"].items():
        for field, value in state.items():
            assert torch.equal(torch.as_tensor(got["state"][key][field]), torch.as_tensor(value))


# Training again -------------------------------------------------------------------------------


def test_model_init(make_trainer, make_llama, make_remix):
    """Trainer makes one model when it is made and another for every run: metrics are the run's."""
    made = []

    def model_init():
        made.append(make_remix(make_llama(dtype=torch.float32)))
        return made[-1]

    data = examples(1) * 16  # for model_init changes the order
    plain = make_trainer(train=data, logging_steps=2)
    plain.train()
    trainer = make_trainer(train=data, model_init=model_init, logging_steps=2)
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        for key in ("entropy", "loss_spread", "grad_norm_router", "expert_share"):
            assert logged(trainer, f"remix/{key}") == logged(plain, f"remix/{key}")
            assert logged(trainer, f"remix/{key}")[0]
    assert len(made) == 3


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_second_run_draws_as_a_fresh_trainer(max_steps, make_trainer):
    """Both runs have a step 0: it may be the first one's last."""
    # logging_steps: a metric is still pending when the first run ends.
    options = {"gradient_accumulation_steps": 2, "max_steps": max_steps, "logging_steps": 5}
    trainer = make_trainer(**options)
    runs = []
    for _ in range(2):
        seeds = []
        with spied_seeds(seeds):
            trainer.train()
        runs.append(seeds)
    assert len(runs[0]) == 2 * max_steps
    assert runs[0] == runs[1]


def test_a_run_that_failed_leaves_no_draws_behind(make_trainer, monkeypatch):
    """It stopped in its second micro-step; the next run's first is micro-step 0 all the same."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(**options)
    fresh, failed, again = [], [], []
    with spied_seeds(fresh):
        trainer.train()

    def fail_later(model, batch):
        if len(failed) == 2:
            raise OSError("no more")
        return remix_model.token_losses(model, batch)

    with monkeypatch.context() as patch, spied_seeds(failed):
        patch.setattr(remix_model.trainer, "token_losses", fail_later)
        with pytest.raises(OSError, match="no more"):
            trainer.train()
    with spied_seeds(again):
        trainer.train()
    assert fresh == failed == again

"""`ReMixTrainer`: learning, metrics, accumulation, resuming, clipping, evaluation, nan."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import remix_model.trainer
from remix_model import (
    ReMixTrainer,
    ReMixTrainingArguments,
    force_selection,
    record_routing,
    sample_routing,
)
from remix_model.site import find_sites
from remix_model.trainer import NonFiniteError

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
STEPS = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}


def examples(count=16, seed=0, shortest=4, longest=10):
    """Sequences of different lengths that count up; the first tokens unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        start, step = torch.randint(1, 60, (2,), generator=generator).tolist()
        ids = (start + (step % 3 + 1) * torch.arange(length)) % 60 + 3
        labels = ids.clone()
        labels[: int(torch.randint(0, 3, (1,), generator=generator))] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def collate(features):
    width = max(len(f["input_ids"]) for f in features)

    def pad(key, value):
        rows = [nn.functional.pad(f[key], (0, width - len(f[key])), value=value) for f in features]
        return torch.stack(rows)

    ids, labels = pad("input_ids", 0), pad("labels", -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@pytest.fixture
def make_trainer(make_llama, make_remix, tmp_path):
    """make_trainer(model=None, trainer=ReMixTrainer, train=..., **arguments)."""

    def make(model=None, trainer=ReMixTrainer, train=None, evaluate=None, **arguments):
        model = make_remix(make_llama(dtype=torch.float32)) if model is None else model
        kind = ReMixTrainingArguments if trainer is ReMixTrainer else TrainingArguments
        callbacks = arguments.pop("callbacks", None)
        arguments = {"output_dir": str(tmp_path / "run"), **QUIET, **STEPS, **arguments}
        return trainer(
            model=model,
            args=kind(**arguments),
            data_collator=collate,
            train_dataset=examples() if train is None else train,
            eval_dataset=evaluate,
            callbacks=callbacks,
        )

    return make


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


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
    trainer = make_trainer(max_steps=1, max_grad_norm=1e6)
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


@contextlib.contextmanager
def spied_seeds(seeds):
    """Collect (seed, num_selections) of every context that the trainer opens."""
    original = remix_model.trainer.sample_routing

    def spy(model, num_selections, **options):
        seeds.append((options["seed"], num_selections))
        return original(model, num_selections, **options)

    remix_model.trainer.sample_routing = spy
    try:
        yield
    finally:
        remix_model.trainer.sample_routing = original


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


# Resuming -------------------------------------------------------------------------------------


class Snapshot(TrainerCallback):
    """Keep the trainable parameters after every step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = parameters(model)


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


# Optimizer and clipping -----------------------------------------------------------------------


def groups_of(trainer):
    """(learning rate, weight decay) by parameter name."""
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


def test_router_group(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, weight_decay=0.1, remix_router_learning_rate=7e-3)
    groups = groups_of(trainer)
    assert set(groups) == set(parameters(trainer.model))
    for name, (rate, decay) in groups.items():
        assert (rate, decay) == ((7e-3, 0.0) if "router" in name else (1e-3, 0.1)), name


def test_router_rate_defaults_to_the_learning_rate(make_trainer):
    assert {rate for rate, _ in groups_of(make_trainer(learning_rate=3e-3)).values()} == {3e-3}


def test_frozen_routers_have_no_group(make_trainer, make_llama, make_remix):
    model = make_remix(make_llama(dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.requires_grad_(False)
    trainer = make_trainer(model, remix_num_selections=1)
    assert set(groups_of(trainer)) == set(parameters(model))
    before = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    trainer.train()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def norm_of(model, kind):
    grads = [p.grad.flatten() for n, p in model.named_parameters() if f"remix_{kind}" in n]
    return float(torch.cat(grads).norm())


def test_router_and_lora_are_clipped_apart(make_trainer):
    """A router gradient a million times too large leaves LoRA's step as it was, and the reverse."""
    trainer = make_trainer(max_grad_norm=1.0, remix_router_max_grad_norm=0.25)
    model = trainer.model
    for loud in ("router", "lora"):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-4)
                if f"remix_{loud}" in name:
                    parameter.grad *= 1e6
        quiet = "lora" if loud == "router" else "router"
        before = norm_of(model, quiet)
        total = trainer._clip_grad_norm(model)
        assert norm_of(model, quiet) == pytest.approx(before, rel=1e-5)
        assert norm_of(model, loud) == pytest.approx(0.25 if loud == "router" else 1.0, rel=1e-4)
        assert float(total) > 1e3


def test_router_limit_defaults_to_that_of_lora(make_trainer):
    trainer = make_trainer(max_grad_norm=0.5)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(trainer.model)
    assert norm_of(trainer.model, "router") == pytest.approx(0.5, rel=1e-4)
    assert norm_of(trainer.model, "lora") == pytest.approx(0.5, rel=1e-4)


def test_zero_means_no_clipping(make_trainer):
    """As max_grad_norm=0 does in transformers; the routers must not stand still."""
    trainer = make_trainer(remix_router_max_grad_norm=0.0, learning_rate=1e-2)
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    assert all(not torch.equal(after[n], p) for n, p in before.items() if "router" in n)


def test_router_is_clipped_when_lora_is_not(make_trainer):
    """max_grad_norm=0 switches off LoRA's clipping only; both norms are still logged."""
    limit = 1e-3
    trainer = make_trainer(
        max_grad_norm=0.0,
        remix_router_max_grad_norm=limit,
        optim="sgd",
        learning_rate=1.0,
        max_steps=1,
    )
    before = parameters(trainer.model)
    trainer.train()
    moved = [before[n] - p for n, p in parameters(trainer.model).items() if "router" in n]
    assert logged(trainer, "remix/grad_norm_router")[0] > limit
    assert logged(trainer, "remix/grad_norm_lora")
    assert float(torch.cat([m.flatten() for m in moved]).norm()) <= limit * 1.01


# Evaluation -----------------------------------------------------------------------------------


def token_mean(model, data):
    """Mean loss over all labelled tokens under top-k routing, one example at a time."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for example in data:
            logits = model(input_ids=example["input_ids"][None]).logits[0, :-1].double()
            targets = example["labels"][1:]
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


def test_evaluation_is_top_k_and_weighted_by_tokens(make_trainer):
    data = examples(7, seed=5, shortest=3, longest=20)
    trainer = make_trainer(evaluate=data, per_device_eval_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about an untrained router
        warnings.filterwarnings("ignore", category=FutureWarning)
        metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(token_mean(trainer.model, data), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    batched = [token_mean(trainer.model, data[i : i + 2]) for i in range(0, 7, 2)]
    assert abs(sum(batched) / 4 - metrics["eval_loss"]) > 1e-3  # the weights matter here


def test_evaluation_during_training_changes_nothing(make_trainer):
    data = examples(5, seed=5)
    plain = make_trainer()
    plain.train()
    evaluating = make_trainer(evaluate=data, eval_strategy="steps", eval_steps=1)
    evaluating.train()
    assert len(logged(evaluating, "eval_loss")) == 4
    assert logged(evaluating, "eval_loss")[-1] == pytest.approx(
        token_mean(evaluating.model, data), rel=1e-5
    )
    for name, want in parameters(plain.model).items():
        assert torch.equal(parameters(evaluating.model)[name], want)
    for key in ("remix/loss_spread", "remix/entropy", "loss"):
        assert logged(evaluating, key) == logged(plain, key)


def test_several_evaluation_sets(make_trainer):
    sets = {"short": examples(5, seed=5, longest=5), "long": examples(3, seed=6, shortest=9)}
    trainer = make_trainer(evaluate=sets, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    for name, data in sets.items():
        want = token_mean(trainer.model, data)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(want, rel=1e-5)


def test_prediction(make_trainer):
    """predict() returns logits, as its parent's, and the same loss as evaluate()."""
    data = examples(4, seed=5, shortest=8, longest=8)
    trainer = make_trainer(evaluate=data, per_device_eval_batch_size=2)
    output = trainer.predict(data)
    assert output.metrics["test_loss"] == pytest.approx(token_mean(trainer.model, data), rel=1e-5)
    assert output.predictions.shape == (4, 8, 64)


def test_compute_metrics_gets_all_logits(make_trainer):
    data = examples(4, seed=5, shortest=8, longest=8)
    shapes = []
    trainer = make_trainer(evaluate=data, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda p: (shapes.append(p.predictions.shape), {"seen": 1.0})[1]
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert shapes == [(4, 8, 64)]


# A stock Trainer, and a wrong set-up ----------------------------------------------------------


def test_a_stock_trainer_warns_once_and_trains_lora_only(make_trainer):
    trainer = make_trainer(trainer=Trainer, learning_rate=1e-2, weight_decay=0.0)
    before = parameters(trainer.model)
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(norm_of(model, "router"))

    trainer.add_callback(Norms())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    ours = [w for w in caught if "outside sample_routing" in str(w.message)]
    assert len(ours) == 1
    assert "ReMixTrainer" in str(ours[0].message)
    assert norms == [0.0] * 4
    for name, parameter in parameters(trainer.model).items():
        assert torch.equal(parameter, before[name]) == ("router" in name), name


def test_a_copied_model_warns_once_too(make_remix, make_batch):
    model = copy.deepcopy(make_remix()).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**make_batch())
    assert len([w for w in caught if "outside sample_routing" in str(w.message)]) == 1


def test_wrong_arguments_class(make_remix, tmp_path):
    with pytest.raises(ValueError, match="args is TrainingArguments; use ReMixTrainingArguments"):
        ReMixTrainer(model=make_remix(), args=TrainingArguments(output_dir=str(tmp_path), **QUIET))


def test_model_without_routers(make_llama, make_trainer):
    with pytest.raises(ValueError, match=r"no routed layer; .*ReMixConfig"):
        make_trainer(make_llama())


def test_one_selection_with_trained_routers(make_trainer):
    with pytest.raises(ValueError, match=r"remix_num_selections=1 with trainable routers.*2"):
        make_trainer(remix_num_selections=1)


def test_packed_batches_are_refused(make_trainer):
    packed = {
        "input_ids": torch.ones(1, 6, dtype=torch.long),
        "labels": torch.ones(1, 6, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    trainer = make_trainer()
    trainer.data_collator = lambda features: packed
    with pytest.raises(ValueError, match="packing=False"):
        trainer.train()


# Not a number ---------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Make one frozen weight nan before a step begins."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_output_embeddings().weight[5] = float("nan")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite(accumulation, make_trainer, make_llama, make_remix, tmp_path):
    """Stops at once, names the step; neither the step nor the last checkpoint is lost."""
    from peft import PeftModel

    snapshot = Snapshot()
    trainer = make_trainer(
        callbacks=[snapshot, Poison(3)],
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
    )
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 3, micro-step 0"):
        trainer.train()
    assert set(snapshot.after) == {1, 2}
    for name, parameter in parameters(trainer.model).items():
        assert torch.equal(parameter, snapshot.after[2][name]), name
    saved = PeftModel.from_pretrained(
        make_llama(dtype=torch.float32), tmp_path / "run" / "checkpoint-2", is_trainable=True
    )
    for name, parameter in parameters(saved).items():
        assert torch.equal(parameter, snapshot.after[2][name]), name
    resumed = make_trainer(learning_rate=1e-2, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite(max_grad_norm, make_trainer):
    """The loss is fine, a gradient is not: named, and nothing updated."""
    snapshot = Snapshot()
    trainer = make_trainer(callbacks=[snapshot], max_grad_norm=max_grad_norm)
    name, parameter = next(
        (n, p) for n, p in trainer.model.named_parameters() if "layers.1" in n and "lora_B" in n
    )
    parameter.register_hook(
        lambda grad: grad * (float("inf") if trainer.state.global_step == 1 else 1.0)
    )
    with pytest.raises(
        NonFiniteError, match=r"the gradient of .* is not finite at step 2"
    ) as error:
        trainer.train()
    assert name in str(error.value)
    for key, value in parameters(trainer.model).items():
        assert torch.equal(value, snapshot.after[1][key]), key

"""`ReMixTrainer`: evaluation and prediction under top-k routing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from remix_model import ReMixTrainer, ReMixTrainingArguments
from tests.ranks import run_on_two_ranks
from tests.remix_model.trainer_helpers import QUIET, collate, examples, logged, parameters


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


def test_metrics_change_no_loss(make_trainer):
    """With compute_metrics the parent's path runs; eval_loss is the same mean over tokens."""
    data = examples(7, seed=5, shortest=3, longest=20)
    trainer = make_trainer(evaluate=data, per_device_eval_batch_size=2)
    want = token_mean(trainer.model, data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    trainer.compute_metrics = lambda prediction: {}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    unlabelled = {key: value.clone() for key, value in data[0].items()}
    unlabelled["labels"].fill_(-100)
    more = trainer.evaluate([*data, unlabelled, unlabelled, unlabelled])  # a batch of their own
    assert more["eval_loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("count", [8, 5])  # of 5, the second rank's last batch repeats one
def test_two_ranks_report_the_loss_of_all_data(count, make_llama, make_remix, tmp_path):
    """With compute_metrics or without: each rank sees half, both report the mean over all."""
    model, data = make_remix(make_llama(dtype=torch.float32)), examples(count, seed=5)
    torch.save((model, data), tmp_path / "inputs.pt")
    want = token_mean(model, data)
    run_on_two_ranks(_evaluating_rank, str(tmp_path))
    for rank in range(2):
        for loss in torch.load(tmp_path / f"{rank}.pt"):
            assert loss == pytest.approx(want, rel=1e-5)


def _evaluating_rank(rank, folder):
    model, data = torch.load(f"{folder}/inputs.pt", weights_only=False)
    losses = []
    for compute_metrics in (None, lambda prediction: {}):
        trainer = ReMixTrainer(
            model=model,
            args=ReMixTrainingArguments(
                output_dir=f"{folder}/run", per_device_eval_batch_size=2, **QUIET
            ),
            data_collator=collate,
            eval_dataset=data,
            compute_metrics=compute_metrics,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.accelerator.num_processes == 2
    torch.save(losses, f"{folder}/{rank}.pt")

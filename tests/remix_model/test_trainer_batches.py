"""Which examples a step of the trainers has, and how they are shared among its passes."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from remix_model import ReMixTrainer
from remix_model.adapter_trainer import AdapterTrainer
from tests.remix_model.trainer_helpers import examples, parameters

TRAINERS = (ReMixTrainer, AdapterTrainer)
REBALANCE = {
    "train_sampling_strategy": "batch_rebalance",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
}


def steps_of(trainer, passes=4):
    """The sets of examples (by number) of an epoch's steps, and the real share of the tokens."""
    numbers = {tuple(row["input_ids"].tolist()): i for i, row in enumerate(trainer.train_dataset)}
    batches = list(trainer.get_train_dataloader())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    share = real / sum(batch["input_ids"].numel() for batch in batches)
    rows = [
        [
            numbers[tuple(ids[mask.bool()].tolist())]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        for batch in batches
    ]
    steps = (chain(*rows[start : start + passes]) for start in range(0, len(rows), passes))
    return [sorted(step) for step in steps], share


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rebalanced_steps(make_trainer, trainer):
    """Eight examples in a step as before, each once in an epoch, with less padding."""
    data = examples(32, shortest=3, longest=30)
    random = {**REBALANCE, "train_sampling_strategy": "random"}
    steps, share = steps_of(make_trainer(trainer=trainer, train=data, **REBALANCE))
    assert [len(step) for step in steps] == [8] * 4
    assert sorted(chain(*steps)) == list(range(32))
    assert share > steps_of(make_trainer(trainer=trainer, train=data, **random))[1]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rebalanced_steps_follow_the_seed(make_trainer, trainer):
    data = examples(32, shortest=3, longest=30)

    def order(**seeds):
        return steps_of(make_trainer(trainer=trainer, train=data, **REBALANCE, **seeds))[0]

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5)


def test_rebalanced_epochs_differ(make_trainer, monkeypatch):
    """And a run that is resumed in the second goes on with that one's order."""
    seen = []
    original = ReMixTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ReMixTrainer, "compute_loss", spy)
    options = {**REBALANCE, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2}
    saved = {**options, "save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(train=examples(16), **saved)
    straight.train()
    whole = list(seen)
    assert len(whole) == 16
    first, second = (
        {tuple(row[row != 0].tolist()) for b in step for row in b}
        for step in (whole[:4], whole[8:12])
    )
    assert first != second
    seen.clear()
    resumed = make_trainer(train=examples(16), **saved)
    resumed.train(resume_from_checkpoint=str(straight.args.output_dir + "/checkpoint-3"))
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, whole[12:], strict=True))
    want, got = parameters(straight.model), parameters(resumed.model)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rebalanced_step_is_the_same_step(make_trainer, make_llama, make_remix, trainer):
    """Passes of unlike sizes weigh their tokens alike: one step of SGD as in a single pass."""
    data, found = examples(8, shortest=3, longest=30), []
    for options in (REBALANCE, {"per_device_train_batch_size": 8}):
        # All experts, and routers that do not learn: what is drawn makes no difference.
        model = make_remix(make_llama(dtype=torch.float64), seed=3, num_experts=2, top_k=2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "router" not in name)
        run = make_trainer(model, trainer, data, max_steps=1, optim="sgd", **options)
        run.train()
        found.append(parameters(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)

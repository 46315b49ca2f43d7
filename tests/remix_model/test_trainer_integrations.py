"""`ReMixTrainer` with what transformers' Trainer offers: best model, early stopping, reports."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, default_data_collator

import remix_model.trainer
from remix_model import ReMixTrainer, force_selection, token_losses
from remix_model.site import find_sites
from tests.remix_model.trainer_helpers import (
    QUIET,
    Snapshot,
    collate,
    examples,
    logged,
    parameters,
)

METRICS = ("loss_spread", "advantage_std", "grad_norm_router", "grad_norm_lora", "entropy", "ess")


# The best model ---------------------------------------------------------------------------------


def test_early_stopping_and_the_best_model(make_trainer):
    """A falling loss that should grow: the first checkpoint is the best, patience ends at 3."""
    snapshot = Snapshot()
    trainer = make_trainer(
        evaluate=examples(5, seed=5),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), snapshot],
        max_steps=6,
        learning_rate=2e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = load_file(best / "adapter_model.safetensors")
    now, last = parameters(trainer.model), snapshot.after[3]
    assert len(saved) == len(now)
    assert any("router" in name for name in saved)
    for name, value in now.items():
        assert torch.equal(value, saved[name.replace(".default", "")]), name
        assert torch.equal(value, snapshot.after[1][name]), name
        assert not torch.equal(value, last[name]), name
    assert trainer.evaluate()["eval_loss"] == logged(trainer, "eval_loss")[0]


# Reports ----------------------------------------------------------------------------------------


def test_tensorboard(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to=["tensorboard"], max_steps=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in METRICS:
        values = [point.value for point in events.Scalars(f"train/remix/{name}")]
        assert values == pytest.approx(logged(trainer, f"remix/{name}"), rel=1e-5)


def test_trackio(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio is not installed")
    trainer = make_trainer(report_to=["trackio"], max_steps=2, project="remix", run_name="run")
    trainer.train()
    entries = storage.SQLiteStorage.get_logs("remix", "run")
    for name in METRICS:
        key = f"train/remix/{name}"
        values = [entry[key] for entry in entries if key in entry]
        assert len(values) == 2
        assert values == pytest.approx(logged(trainer, f"remix/{name}"), rel=1e-5)


# Liger's kernels --------------------------------------------------------------------------------

# Without a GPU only the head runs: the interpreter cannot run liger's own layers.
HEAD_ONLY = {
    "rope": False,
    "rms_norm": False,
    "swiglu": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(HEAD_ONLY, id="head"),
        pytest.param(None, id="all", marks=pytest.mark.gpu),
    ],
)
def test_liger(kernels, make_trainer):
    """Its forward would not give logits: we ask for them at labels, and evaluate likewise."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    runs = []
    for options in ({}, {"use_liger_kernel": True, "liger_kernel_config": kernels}):
        trainer = make_trainer(
            evaluate=examples(5, seed=5), max_steps=2, use_cpu=kernels is not None, **options
        )
        trainer.train()
        runs.append((*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]))
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


# Data -------------------------------------------------------------------------------------------


class Sentences(Dataset):
    """Rows of one length, as the Trainer's default collator takes them."""

    def __init__(self, masked):
        self.rows = [
            {"input_ids": row["input_ids"], "labels": row["labels" if masked else "input_ids"]}
            for row in examples(8, shortest=6, longest=6)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {key: value.clone() for key, value in self.rows[index].items()}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_plain_dataset(masked, make_llama, make_remix, tmp_path):
    """No collator, no attention mask; B = 0, so that the first loss is the base's token mean."""
    from remix_model import ReMixTrainingArguments

    base = make_llama(dtype=torch.float32)
    data = Sentences(masked)
    batch = default_data_collator([data[i] for i in range(len(data))])
    assert bool((batch["labels"] == -100).any()) == masked
    with torch.no_grad():
        want = float(base(**batch).loss)
    arguments = {**QUIET, "per_device_train_batch_size": 8, "logging_steps": 1}
    trainer = ReMixTrainer(
        model=make_remix(base, init_lora_weights=True),
        args=ReMixTrainingArguments(
            str(tmp_path), num_train_epochs=8, learning_rate=4e-2, **arguments
        ),
        train_dataset=data,
    )
    trainer.train()
    first, *_, last = logged(trainer, "loss")
    assert first == pytest.approx(want, rel=1e-4)
    assert last < first - 0.3


# Accumulation -----------------------------------------------------------------------------------


def forced_by_content(model, batch):
    """An input's selection depends on it and on m only, not on the batch around it."""
    sites = find_sites(model)
    part = next(iter(sites.values())).state.folded_pass()
    m = part.first + torch.arange(part.count).repeat_interleave(part.batch_size)
    first = (batch["input_ids"][:, 0] + m) % 4
    index = torch.stack((first, (first + 1 + m % 3) % 4), -1).unsqueeze(1)
    with force_selection(model, dict.fromkeys(sites, index)):
        return token_losses(model, batch)


@pytest.mark.parametrize("credit", ["sequence", "causal"])
@pytest.mark.parametrize("grad_selections", [None, 1], ids=["G4", "G1"])
def test_accumulated_router_gradients_are_those_of_the_large_batch(
    credit, grad_selections, make_trainer, make_llama, make_remix, assert_same, monkeypatch
):
    """Sequences of different lengths, and labels; one step of SGD moves by the gradient."""
    monkeypatch.setattr(remix_model.trainer, "token_losses", forced_by_content)
    model = make_remix(make_llama())
    start = copy.deepcopy(model.state_dict())
    # Blocks of positions, which forward-only selections are credited by, count the padding.
    blocks = credit == "causal" and grad_selections is not None
    data = examples(8, shortest=10 if blocks else 4)
    moved = []
    for size, count in ((8, 1), (2, 4)):
        model.load_state_dict(start)
        trainer = make_trainer(
            model,
            train=data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            remix_credit=credit,
            remix_grad_selections=grad_selections,
        )
        before = parameters(model)
        trainer.train()
        moved.append({name: p - before[name] for name, p in parameters(model).items()})
    assert all(float(change.norm()) > 0 for change in moved[0].values())
    assert_same(moved[1], moved[0], 1e-4)


def test_collated_lengths_differ():
    """What the accumulation test rests on."""
    batches = [collate(examples(8)[i : i + 2]) for i in range(0, 8, 2)]
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) > 1

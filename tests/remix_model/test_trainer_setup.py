"""`ReMixTrainer`: what it refuses, and what a stock Trainer makes of a ReMix model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from remix_model import ReMixTrainer, ReMixTrainingArguments
from tests.remix_model.trainer_helpers import QUIET, norm_of, parameters


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


def by_hand(outputs, labels, num_items_in_batch=None):
    raise AssertionError("not called")


def test_other_losses_are_refused(make_trainer):
    """Routers are trained on token_losses; another loss must not be ignored silently."""
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        make_trainer(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"compute_loss_func=<function by_hand"):
        make_trainer(compute_loss_func=by_hand)


def test_data_parallel_threads_are_refused(make_remix, tmp_path):
    args = ReMixTrainingArguments(output_dir=str(tmp_path), **QUIET)
    args._n_gpu = 3
    with pytest.raises(ValueError, match=r"sees 3 GPUs .*nn\.DataParallel.*torchrun"):
        ReMixTrainer(model=make_remix(), args=args)

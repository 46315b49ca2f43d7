"""FSDP2: a sharded model's gradients, its saved adapters, and checkpoints read by other ranks."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from peft import PeftModel
from torch.distributed.fsdp import fully_shard

from remix_model import ReMixTrainer, ReMixTrainingArguments
from remix_model.parallel import make_shardable, selection_mesh, whole_adapters
from tests.distributed.test_selection_parallel import CAUSAL, steps
from tests.ranks import run_on_ranks
from tests.remix_model.trainer_helpers import QUIET, STEPS, collate, examples, parameters

CASES = {
    "whole": {},
    "G2-causal": {"grad_selections": 2, **CAUSAL},
    "chunks-of-1": {"selection_chunk_size": 1},
    "chunks-of-1-causal": {"selection_chunk_size": 1, **CAUSAL},
}
KINDS = {
    "off": tuple(CASES),
    "reentrant": ("G2-causal", "chunks-of-1-causal"),
    "non-reentrant": ("whole", "chunks-of-1"),
}


@pytest.mark.slow
def test_sharded_gradients_are_one_process_s(
    make_remix, make_batch, take_grads, assert_same, tmp_path
):
    """Of a model whose first block is not routed, so that selections share it."""
    model = make_remix(layers_to_transform=[1]).train()
    batches = [make_batch(), make_batch((6, 8), seed=3)]
    torch.save((model, batches), tmp_path / "inputs.pt")
    run_on_ranks(2, _sharded_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, options in CASES.items():
        steps(model, batches, **options)
        grads = take_grads(model)
        for results in ranks:
            for kind in (kind for kind, names in KINDS.items() if name in names):
                assert_same(results[name, kind], grads, 2e-6)


def _sharded_rank(rank, folder):
    torch.distributed.init_process_group("gloo")
    results, group = {}, selection_mesh(2)["selection"]
    for kind, names in KINDS.items():
        model, batches = torch.load(f"{folder}/inputs.pt", weights_only=False)
        if kind != "off":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        make_shardable(model)
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
        kept = sum(p.to_local().numel() for p in model.parameters())
        assert 2 * kept == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.05)
        for name in names:
            options = CASES[name]
            waits = contextlib.nullcontext if "selection_chunk_size" in options else no_sync(model)
            steps(model, batches, group, waits, **options)
            results[name, kind] = {
                n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad
            }
            model.zero_grad()
        if kind == "off":
            with pytest.raises(RuntimeError, match=r"set_requires_gradient_sync\(False\)"):
                steps(model, batches, group, no_sync(model), selection_chunk_size=1)
    torch.save(results, f"{folder}/{rank}.pt")


def no_sync(model):
    """FSDP2's way not to reduce gradients, as a context."""

    @contextlib.contextmanager
    def inside():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return inside


def test_adapters_that_are_frozen_are_gathered_too(make_remix):
    model = make_remix()
    names = {name for name, _ in model.named_parameters() if ".remix_" in name}
    for name in names:
        model.get_parameter(name).requires_grad_("router" not in name)
    assert set(whole_adapters(model)) == names


# The trainer ----------------------------------------------------------------------------------

ARGUMENTS = {
    **QUIET,
    **STEPS,
    "remix_num_selections": 6,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "max_steps": 2,
    "save_steps": 1,
    "seed": 3,
}
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True},
        {
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": True,
            "remix_selection_chunk_size": 1,
        },
    ],
    ids=["full", "sharded-chunks"],
)
def test_checkpoint_of_two_ranks_goes_on_with_three(
    options, make_llama, make_remix, make_trainer, tmp_path
):
    """All ranks share the selections of one batch, so that their number changes nothing."""
    model, data = make_remix(make_llama(dtype=torch.float32)), examples(16)
    torch.save((model, data), tmp_path / "inputs.pt")
    ours = {k: v for k, v in options.items() if k.startswith("remix_")}
    fsdp = {**FSDP, **{k: v for k, v in options.items() if not k.startswith("remix_")}}
    trainer = make_trainer(model, train=data, **{**ARGUMENTS, "save_strategy": "no"}, **ours)
    trainer.train()
    want = parameters(model)
    run_on_ranks(2, _training_rank, str(tmp_path), {**ours, "fsdp_config": fsdp}, None)
    first = tmp_path / "run" / "checkpoint-1"
    run_on_ranks(3, _training_rank, str(tmp_path), {**ours, "fsdp_config": fsdp}, str(first))
    for folder in ("from-start", "resumed"):
        loaded = PeftModel.from_pretrained(
            make_llama(dtype=torch.float32), tmp_path / folder, is_trainable=True
        )
        for name, value in parameters(loaded).items():
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)


def _training_rank(rank, folder, options, checkpoint):
    model, data = torch.load(f"{folder}/inputs.pt", weights_only=False)
    ranks = int(os.environ["WORLD_SIZE"])
    args = ReMixTrainingArguments(
        f"{folder}/run", **ARGUMENTS, **options, fsdp=True, remix_selection_parallel=ranks
    )
    seem_to_have_gpus(args)
    trainer = ReMixTrainer(
        model=model, args=args, data_collator=collate, train_dataset=data, eval_dataset=data
    )
    before = trainer.evaluate()["eval_loss"]  # as `remix train` does
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    assert 0 < abs(trainer.evaluate()["eval_loss"] - before) < 0.05 * before
    trainer.save_model(f"{folder}/{'resumed' if checkpoint else 'from-start'}")


def seem_to_have_gpus(args):
    """accelerate shards only on GPUs: let it take these processors for some."""
    from accelerate.state import DistributedType, PartialState

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

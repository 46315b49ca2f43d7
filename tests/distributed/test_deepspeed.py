"""DeepSpeed's ZeRO-2 and ZeRO-3: gradients, and parameters after steps, are one process's."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from peft import PeftModel

from remix_model import ReMixTrainer, ReMixTrainingArguments
from remix_model.parallel import make_shardable, selection_mesh
from tests.distributed.test_fsdp import ARGUMENTS
from tests.distributed.test_selection_parallel import CAUSAL, steps
from tests.ranks import run_on_ranks
from tests.remix_model.trainer_helpers import collate, examples, parameters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
    ),
]
OPTIONS = {"grad_selections": 2, **CAUSAL}
KINDS = ("off", "reentrant", "non-reentrant")
RATE = 0.1


def zero(stage):
    """Of DeepSpeed's configuration: every parameter sharded, torch's own optimizers."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_is_one_process_s(stage, make_remix, make_batch, take_grads, assert_same, tmp_path):
    """Of a model whose first block is not routed: nothing before its adapters has a gradient."""
    model, batch = make_remix(layers_to_transform=[1]).float().train(), make_batch()
    torch.save((model, batch), tmp_path / "inputs.pt")
    run_on_ranks(2, _zero_rank, str(tmp_path), stage)
    steps(model, [batch], **OPTIONS)
    grads = take_grads(model)
    want = {n: p.detach() - RATE * grads[n] for n, p in model.named_parameters() if n in grads}
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for kind in KINDS:
            assert_same(results[kind]["grads"], grads, 2e-6)
            assert_same(results[kind]["parameters"], want, 2e-6)


def _zero_rank(rank, folder, stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    deepspeed.init_distributed("gloo")
    results, group = {}, selection_mesh(2)["selection"]
    for kind in KINDS:
        model, batch = torch.load(f"{folder}/inputs.pt", weights_only=False)
        if kind != "off":
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
        trained = {n: p for n, p in make_shardable(model).named_parameters() if p.requires_grad}
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained.values(), lr=RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,  # not its default, 1
                **zero(stage),
            },
        )
        steps(engine, [batch], group, backward=engine.backward, **OPTIONS)
        grads = {n: safe_get_full_grad(p).clone() for n, p in trained.items()}
        engine.step()
        stepped = {n: safe_get_full_fp32_param(p).clone() for n, p in trained.items()}
        if stage == 3:
            kept = sum(p.ds_tensor.numel() for p in model.parameters())
            assert 2 * kept == pytest.approx(sum(p.ds_numel for p in model.parameters()), rel=0.05)
        results[kind] = {"grads": grads, "parameters": stepped}
    torch.save(results, f"{folder}/{rank}.pt")


# The trainer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_and_its_checkpoint(stage, make_llama, make_remix, make_trainer, tmp_path):
    """Trained, saved, and resumed from the middle: one process's parameters each time."""
    model, data = make_remix(make_llama(dtype=torch.float32)), examples(16)
    torch.save((model, data), tmp_path / "inputs.pt")
    make_trainer(model, train=data, **{**ARGUMENTS, "save_strategy": "no"}).train()
    want = parameters(model)
    for name, checkpoint in (("whole", None), ("resumed", f"{tmp_path}/run/checkpoint-2")):
        run_on_ranks(2, _training_rank, str(tmp_path), stage, name, checkpoint)
        loaded = PeftModel.from_pretrained(
            make_llama(dtype=torch.float32), tmp_path / name, is_trainable=True
        )
        for parameter, value in parameters(loaded).items():
            torch.testing.assert_close(value, want[parameter], rtol=1e-4, atol=1e-5)


def _training_rank(rank, folder, stage, name, checkpoint):
    os.environ["DS_ACCELERATOR"] = "cpu"
    model, data = torch.load(f"{folder}/inputs.pt", weights_only=False)
    config = {
        **zero(stage),
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    options = {**ARGUMENTS, "use_cpu": False, "max_grad_norm": 1.0}
    args = ReMixTrainingArguments(
        f"{folder}/run", **options, deepspeed=config, remix_selection_parallel=2
    )
    see_each_other(args, rank)
    trainer = ReMixTrainer(model=model, args=args, data_collator=collate, train_dataset=data)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(f"{folder}/{name}")


def see_each_other(args, rank):
    """Without a GPU accelerate takes DeepSpeed's processes for one each: tell it of the other."""
    from accelerate.state import PartialState

    assert args.device.type == "cpu"
    PartialState._shared_state.update(
        backend="gloo", num_processes=2, process_index=rank, local_process_index=rank
    )

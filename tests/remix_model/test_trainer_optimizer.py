"""`ReMixTrainer`: the routers' own rate and clipping, and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from remix_model import RoutedLoRALinear
from remix_model.errors import NonFiniteError
from tests.remix_model.trainer_helpers import Snapshot, logged, norm_of, parameters

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


def test_experts_rate_is_scaled(make_trainer):
    trainer = make_trainer(
        learning_rate=1e-3,
        weight_decay=0.1,
        remix_router_learning_rate=7e-3,
        remix_expert_rate_scale=4.0,
    )
    for name, group in groups_of(trainer).items():
        assert group == ((7e-3, 0.0) if "router" in name else (pytest.approx(4e-3), 0.1)), name


def test_routers_wait(make_trainer):
    """They move with the third step, by as much as Adam's first step is: its rate."""
    trainer = make_trainer(
        learning_rate=1e-2, lr_scheduler_type="constant", max_steps=3, remix_router_wait=2
    )
    start, snapshot = parameters(trainer.model), Snapshot()
    trainer.add_callback(snapshot)
    trainer.train()
    for name, before in start.items():
        moved = [(snapshot.after[step][name] - before).abs().max() for step in (1, 2, 3)]
        if "router" in name:
            assert moved[:2] == [0, 0]
            assert float(moved[2]) == pytest.approx(1e-2, rel=1e-2)
        elif "lora_B" in name:
            assert min(moved) > 0


@pytest.mark.parametrize(
    "option",
    [{"remix_expert_rate_scale": -1.0}, {"remix_router_wait": -1}, {"remix_router_wait": 0.5}],
    ids=str,
)
def test_bad_rate_options(make_trainer, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        make_trainer(**option)


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


# Without PEFT ---------------------------------------------------------------------------------


@pytest.fixture
def plain_model(make_llama):
    """RoutedLoRALinear modules put into a frozen Llama by hand."""
    model = make_llama(dtype=torch.float32).requires_grad_(False)
    for layer in model.model.layers:
        options = {"num_experts": 4, "top_k": 2, "r": 2, "init_lora_weights": False}
        layer.mlp.down_proj = RoutedLoRALinear(layer.mlp.down_proj, **options)
    return model


def test_router_group_of_plain_modules(plain_model, make_trainer):
    trainer = make_trainer(plain_model, learning_rate=1e-3, remix_router_learning_rate=7e-3)
    groups = groups_of(trainer)
    assert set(groups) == set(parameters(plain_model))
    assert sum("router" in name for name in groups) == 2
    for name, (rate, _) in groups.items():
        assert rate == (7e-3 if "router" in name else 1e-3), name


def test_routers_of_plain_modules_are_clipped_apart(plain_model, make_trainer):
    trainer = make_trainer(plain_model, max_grad_norm=1.0, remix_router_max_grad_norm=0.25)
    for parameter in plain_model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(plain_model)
    assert norm_of(plain_model, "router") == pytest.approx(0.25, rel=1e-4)
    assert norm_of(plain_model, "lora") == pytest.approx(1.0, rel=1e-4)
    plain_model.zero_grad()
    trainer.train()
    assert logged(trainer, "remix/grad_norm_router")[0] > 0


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
    with pytest.raises(NonFiniteError, match=r"is nan.*step 3, micro-step 0"):
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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(value, make_trainer, tmp_path):
    """The last step may have broken them; the good checkpoint before it must not be replaced."""
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    trainer.save_model(str(tmp_path / "good"))
    with torch.no_grad():
        parameter[1, 2, 0] = value
    with pytest.raises(NonFiniteError, match=r"is not finite after step 0.*not saved") as error:
        trainer.save_model(str(tmp_path / "bad"))
    assert name in str(error.value)
    assert (tmp_path / "good" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "bad").exists()


def test_frozen_weights_may_be_anything(make_trainer, tmp_path):
    """Only what is trained is saved, so only that is looked at."""
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[5] = float("nan")
    trainer.save_model(str(tmp_path / "good"))
    assert (tmp_path / "good" / "adapter_model.safetensors").exists()

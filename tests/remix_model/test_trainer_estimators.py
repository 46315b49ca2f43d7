"""The trainers' arguments reach the estimators, and train as they should."""

from __future__ import annotations

import pytest
import torch

import remix_model.trainer
from remix_model import ReMixTrainingArguments
from remix_model.state import RoutingState
from tests.remix_model.trainer_helpers import logged, parameters


def trained(make_trainer, make_remix, make_llama, config=None, **arguments):
    """Parameters after four steps of the same model on the same data."""
    model = make_remix(make_llama(dtype=torch.float64), **(config or {}))
    trainer = make_trainer(model, remix_num_selections=4, **arguments)
    trainer.train()
    return parameters(trainer.model), trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remix_credit": "causal", "remix_log_prob": "unordered"},
        {"remix_grad_selections": 2},
        {"gradient_accumulation_steps": 2, "remix_grad_selections": 3},
    ],
    ids=["paper", "causal-unordered", "G2", "accumulated-G3"],
)
def test_chunks_train_alike(options, make_trainer, make_remix, make_llama, assert_same):
    make = make_trainer, make_remix, make_llama
    whole, _ = trained(*make, **options)
    chunked, trainer = trained(*make, remix_selection_chunk_size=1, **options)
    assert_same(chunked, whole, 1e-6)
    assert len(logged(trainer, "loss")) == 4


def test_forward_only_selections_train_routers_alike(
    make_trainer, make_remix, make_llama, assert_same
):
    """After one step routers are where all graphs would have put them, LoRAs are not."""
    make = make_trainer, make_remix, make_llama
    settings = {"max_steps": 1, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0}
    settings["remix_credit"] = "sequence"  # causal credit would take blocks of positions
    all_graphs, _ = trained(*make, **settings)
    one_graph, trainer = trained(*make, remix_grad_selections=1, **settings)
    routers = [name for name in all_graphs if "router" in name]
    assert_same({n: one_graph[n] for n in routers}, {n: all_graphs[n] for n in routers}, 1e-8)
    assert any((one_graph[n] - all_graphs[n]).abs().max() > 1e-7 for n in one_graph if "lora" in n)
    assert logged(trainer, "remix/advantage_std")[0] > 0


@pytest.mark.parametrize(
    "config",
    [{"routing_granularity": "sequence"}, {"router_sharing": "block"}],
    ids=["sequence", "block"],
)
@pytest.mark.parametrize("options", [{}, {"remix_grad_selections": 1}], ids=["all", "G1"])
def test_granularity_and_sharing_learn(config, options, make_trainer, make_remix, make_llama):
    from tests.remix_model.trainer_helpers import examples

    rows = examples()
    for row in rows:
        row["labels"][:1] = -100
    model = make_remix(make_llama(dtype=torch.float32), **config)
    trainer = make_trainer(
        model, train=rows, evaluate=rows, max_steps=12, learning_rate=5e-3, **options
    )
    before = trainer.evaluate()["eval_loss"]
    start = parameters(trainer.model)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    after = parameters(trainer.model)
    assert all((after[n] - start[n]).abs().max() > 0 for n in after)


def test_arguments_reach_the_context(make_trainer, monkeypatch):
    seen, original = [], remix_model.trainer.sample_routing

    def spy(model, **options):
        seen.append(options)
        return original(model, **options)

    monkeypatch.setattr(remix_model.trainer, "sample_routing", spy)
    given = {
        "num_selections": 3,
        "grad_selections": 2,
        "selection_chunk_size": 1,
        "credit": "causal",
        "log_prob": "unordered",
        "logprob_tokens": "response",
        "advantage_norm": "batch",
        "router_entropy_coef": 0.01,
        "load_balancing_coef": 0.02,
    }
    schedule = {"remix_temperature": 2.0, "remix_temperature_end": 0.5}
    make_trainer(**{f"remix_{name}": value for name, value in given.items()}, **schedule).train()
    assert [options.pop("temperature") for options in seen] == [2.0, 1.5, 1.0, 0.5]
    for options in seen:
        options.pop("seed")
        assert options == {**given, "selection_group": None}


def test_loss_scale_reaches_the_parts(make_trainer, monkeypatch):
    """fp16: parts that are backpropagated early are scaled as the loss will be."""
    scales, original = [], RoutingState.parts

    def spy(self, batch, loss_scale=1.0):
        scales.append(loss_scale)
        return original(self, batch, loss_scale)

    class Scaler:
        def get_scale(self):
            return 1024.0

    trainer = make_trainer(max_steps=1)
    monkeypatch.setattr(RoutingState, "parts", spy)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.accelerator.scaler = Scaler()
    trainer.compute_loss(trainer.model, batch)
    assert scales == [1024.0]


def test_defaults():
    options = ReMixTrainingArguments(output_dir="unused").sampling_options()
    assert (options.credit, options.log_prob) == ("causal", "unordered")
    assert options.advantage_norm == "none"
    assert options.router_entropy_coef == options.load_balancing_coef == 0.0
    assert options.temperature == 1.0
    assert options.grad_selections is None and options.selection_chunk_size is None

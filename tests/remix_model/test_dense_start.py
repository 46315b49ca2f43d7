"""A dense start: more experts than k, each with its share of the weight that k have."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import remix_model.trainer
from remix_model import ReMixTrainer, RoutedLoRALinear, force_selection, sample_routing
from remix_model.dense_start import experts_at, take
from remix_model.site import find_sites
from tests.remix_model.trainer_helpers import examples, parameters


def test_schedule():
    """All n first, never fewer than k, k from the last step on."""
    assert [experts_at(step, 6, 8, 2) for step in range(8)] == [8, 7, 6, 5, 4, 3, 2, 2]
    assert [experts_at(step, 4, 4, 2) for step in range(5)] == [4, 4, 3, 3, 2]
    assert [experts_at(step, 3, 4, 4) for step in range(4)] == [4, 4, 4, 4]
    assert experts_at(0, 0, 8, 2) == 2


def random_layer(strategy="auto", use_rslora=True):
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 7).double()
    layer = RoutedLoRALinear(
        base, num_experts=4, top_k=2, r=3, strategy=strategy, use_rslora=use_rslora
    )
    layer.double()
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer, torch.randn(6, 5, dtype=torch.float64)


def mean_over_subsets(layer, x, count):
    """The output, averaged over all subsets of so many experts."""
    outputs = []
    for subset in combinations(range(4), count):
        layer.site.forced = torch.tensor(subset)
        outputs.append(layer(x))
    layer.site.forced = None
    return torch.stack(outputs).mean(0)


@pytest.mark.parametrize("strategy", ["dense", "grouped", "gather"])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_the_mean_over_subsets_stays(strategy, use_rslora):
    """Of all subsets of k experts, of three, and all four at once."""
    layer, x = random_layer(strategy, use_rslora)
    with torch.no_grad():
        wanted = mean_over_subsets(layer, x, 2)
        for step, taken in ((0, 4), (1, 3)):
            take(layer, step, 2)
            assert layer.site.top_k == taken
            torch.testing.assert_close(mean_over_subsets(layer, x, taken), wanted)
        take(layer, 2, 2)
        assert layer.site.top_k == 2
        assert (layer(x) - wanted).abs().max() > 1e-3


def test_all_experts_learn_and_there_is_nothing_to_choose(make_llama, make_remix, make_batch):
    """With t = n every expert has a gradient, and the routers' is zero; with k it is not."""
    model = make_remix(make_llama(dtype=torch.float64), router_sharing="block")
    model.train()
    sizes = []
    for step in (0, 2):
        take(model, step, 2)
        model.zero_grad()
        with sample_routing(model, 3, seed=1, log_prob="unordered") as routing:
            losses, mask = remix_model.trainer.token_losses(model, routing.expand(make_batch()))
            routing.loss(losses, mask).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all((g != 0).flatten(1).any(1).all() for n, g in grads.items() if "lora_B" in n)
        sizes.append(max(float(g.abs().max()) for n, g in grads.items() if "router" in n))
    assert sizes[0] < 1e-12 < 1e-6 < sizes[1]


def spied(monkeypatch):
    """Collects how many experts are taken, in training and in evaluation."""
    seen = {True: [], False: []}
    original = ReMixTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        taken = {site.top_k for site in find_sites(model).values()}
        seen[model.training] += taken
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ReMixTrainer, "compute_loss", spy)
    return seen


OPTIONS = {"remix_dense_start": 4, "max_steps": 6, "gradient_accumulation_steps": 2}


def test_training(make_trainer, monkeypatch):
    """From n to k, both passes of a step alike; evaluations and logs between have their own."""
    seen = spied(monkeypatch)
    trainer = make_trainer(
        evaluate=examples(4, seed=5), eval_strategy="steps", eval_steps=1, **OPTIONS
    )
    trainer.train()
    assert seen[True] == [4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2]
    assert set(seen[False]) == {2}
    assert {site.top_k for site in find_sites(trainer.model).values()} == {2}
    assert [e["remix/ess"] for e in trainer.state.log_history if "remix/ess" in e] == [
        4.0, 4.0, 3.0, 3.0, 2.0, 2.0,
    ]  # fmt: skip


def test_resuming(make_trainer, make_llama, make_remix, tmp_path, monkeypatch):
    """In the midst of it: to the same bits."""
    saved = {**OPTIONS, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    straight = make_trainer(make_remix(make_llama(dtype=torch.float32), seed=1), **saved)
    straight.train()
    seen = spied(monkeypatch)
    resumed = make_trainer(make_remix(make_llama(dtype=torch.float32), seed=2), **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert seen[True] == [3, 3, 3, 3, 2, 2, 2, 2]
    want, got = parameters(straight.model), parameters(resumed.model)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_step_that_raises_leaves_k(make_trainer, monkeypatch):
    trainer = make_trainer(**OPTIONS)

    def fail(*args, **kwargs):
        assert {site.top_k for site in find_sites(trainer.model).values()} == {4}
        raise KeyboardInterrupt

    monkeypatch.setattr(remix_model.trainer, "token_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {site.top_k for site in find_sites(trainer.model).values()} == {2}
    forced = {name: torch.tensor([1, 3]) for name in find_sites(trainer.model)}
    with force_selection(trainer.model, forced):
        trainer.model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("value", [-1, 0.5, True, "2"])
def test_bad_values(make_trainer, value):
    with pytest.raises(ValueError, match=r"remix_dense_start=.* number of steps"):
        make_trainer(remix_dense_start=value)


def test_learned_weights_have_none(make_trainer, make_llama, make_remix):
    model = make_remix(make_llama(dtype=torch.float32), router_type="mixlora")
    with pytest.raises(ValueError, match="remix_dense_start=3: the routers weigh"):
        make_trainer(model, remix_dense_start=3)

"""Numbers that are not finite are caught where they begin, and nobody is routed by them."""

from __future__ import annotations

import pytest
import torch

from remix_model import record_routing
from remix_model.errors import NonFiniteError
from remix_model.nonfinite import watch_outputs
from remix_model.site import find_sites


def spoil(module: torch.nn.Module, value: float = float("nan")) -> None:
    """One of the module's weights is no number any more."""
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = value


def part(model, ending):
    return next(module for name, module in model.named_modules() if name.endswith(ending))


@pytest.mark.parametrize(
    "ending", ["layers.0.self_attn.q_proj", "layers.1.input_layernorm", "lm_head", "embed_tokens"]
)
def test_training_names_the_step_and_the_module(ending, make_trainer):
    trainer = make_trainer(max_steps=3)
    count = trainer.training_step

    def spoil_at_the_third(*args, **kwargs):
        if trainer.state.global_step == 2:
            spoil(part(trainer.model, ending), float("inf"))
        return count(*args, **kwargs)

    trainer.training_step = spoil_at_the_third
    name = rf"\S*{ending.replace('.', '[.]')} \(\w+\), and so are numbers in \S*weight\)"
    message = rf"\(step 3, micro-step 0; the first module whose output is not finite is {name}"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_chunk_of_selections_that_is_not_the_first_is_looked_at_too(make_trainer):
    trainer = make_trainer(max_steps=1, remix_num_selections=4, remix_selection_chunk_size=1)
    spoil(part(trainer.model, "layers.1.mlp.down_proj.base_layer"))
    with pytest.raises(NonFiniteError, match=r"is not finite is .*layers.1.mlp.down_proj"):
        trainer.train()


def test_finite_losses_do_not_hide_a_router_that_is_not(make_remix, make_batch, sampled_loss):
    """Whatever is drawn by nan is finite."""
    model = make_remix().train()
    sites = find_sites(model)
    with torch.no_grad():
        list(sites.values())[3].router_weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=f"losses are finite .* not; .* {list(sites)[3]}"):
        sampled_loss(model, make_batch())


@pytest.mark.parametrize("rows", [1, 5], ids=["decoding", "prefill"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nobody_is_routed_by_logits_that_are_no_numbers(rows, value, make_llama, make_remix):
    model = make_remix(make_llama(dtype=torch.float32)).eval()
    layer = part(model, "layers.1.mlp.up_proj")
    batch = torch.full((1, rows), 5)
    with torch.no_grad():
        model(input_ids=batch)
        layer.remix_router["default"][2] = value
        with pytest.raises(NonFiniteError, match=r"router of \S*layers.1.mlp.up_proj made logits"):
            model(input_ids=batch)
        with record_routing(model), pytest.raises(NonFiniteError):
            model(input_ids=batch)


def test_the_first_module_in_time_is_named(make_llama):
    """Leaves return before what they are in."""
    model = make_llama()
    spoil(part(model, "layers.0.mlp.gate_proj"))
    spoil(part(model, "layers.1.self_attn.v_proj"))
    with watch_outputs(model) as found, torch.no_grad():
        model(input_ids=torch.full((1, 4), 5))
    assert "is model.layers.0.mlp.gate_proj (Linear)" in found[0]
    assert not any(module._forward_hooks for module in model.modules())
    with watch_outputs(make_llama()) as found, torch.no_grad():
        make_llama()(input_ids=torch.full((1, 4), 5))
    assert not found

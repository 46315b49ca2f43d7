"""What the page on several processes plans: formulas against small models, and its tables."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan_scale import PAGE, tables
from remix_cli.throughput import step_flops
from remix_model import sample_routing, token_losses
from tests.remix_cli.test_memory import BATCH, LABELLED, TOKENS, adapted_llama


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("graph", [1, 3])
def test_flops_are_near_what_torch_counts(graph, checkpointing):
    """It counts no addmm_, where adapters join the base; and no gradient enters the first block."""
    model = adapted_llama(torch.float32, num_hidden_layers=6, vocab_size=512)
    model.config._attn_implementation = "eager"
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, 512, (BATCH, TOKENS))
    labels = ids.masked_fill(torch.arange(TOKENS) < TOKENS - LABELLED, -100)
    options = {"num_selections": 3, "grad_selections": graph, "seed": 0}
    with FlopCounterMode(display=False) as counter:
        with sample_routing(model, **options) as routing:
            for part in routing.parts({"input_ids": ids, "labels": labels}):
                routing.add(*token_losses(model, part))
            loss = routing.loss()
        loss.backward()
    planned = BATCH * step_flops(
        model,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        grad_selections=graph,
        forward_only=3 - graph,
        gradient_checkpointing=checkpointing,
    )
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.2)


@pytest.mark.slow
def test_the_page_has_the_tables():
    assert tables() in PAGE.read_text(), "run: python -m benchmarks.plan_scale"

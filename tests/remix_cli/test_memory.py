"""The estimate of memory against what torch allocates for a step, as its profiler counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from remix_cli.memory import ONE_PASS, estimate_memory
from remix_model import ReMixConfig, sample_routing, token_losses
from remix_model.eligibility import CAUSAL_BLOCKS
from remix_model.models import load_model
from remix_model.options import SamplingOptions

NUM_SELECTIONS, BATCH, TOKENS, LABELLED = 2, 4, 128, 64
NUM_EXPERTS, R = 8, 8


def adapted_llama(dtype: torch.dtype, router_type: str = "remix", **shape: int) -> Any:
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        **shape,
    )
    model = LlamaForCausalLM(config).to(dtype)
    adapter = ReMixConfig(
        task_type="CAUSAL_LM", r=R, num_experts=NUM_EXPERTS, top_k=4, router_type=router_type
    )
    return get_peft_model(model, adapter).train()


def step(model: Any, **options: Any) -> None:
    input_ids = torch.randint(0, model.config.vocab_size, (BATCH, TOKENS))
    labels = input_ids.masked_fill(torch.arange(TOKENS) < TOKENS - LABELLED, -100)
    options = {"num_selections": NUM_SELECTIONS, **options}
    with sample_routing(model, seed=0, **options) as routing:
        for part in routing.parts({"input_ids": input_ids, "labels": labels}):
            losses, mask = token_losses(model, part)
            routing.add(losses, mask)
        loss = routing.loss(num_items=float(BATCH * LABELLED))
    loss.backward()


def allocated_at_most(model: Any, **options: Any) -> int:
    """Bytes of tensors that a step adds, at its peak."""
    step(model, **options)
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, **options)
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layers", "vocabulary", "dtype", "checkpointing"),
    [
        (6, 512, torch.float32, False),
        (2, 16384, torch.float32, False),
        (6, 512, torch.bfloat16, False),
        (8, 4096, torch.float32, True),
    ],
    ids=["deep", "wide-vocabulary", "bf16", "checkpointing"],
)
def test_estimate_is_near_what_torch_allocates(
    layers: int, vocabulary: int, dtype: torch.dtype, checkpointing: bool
) -> None:
    model = adapted_llama(dtype, num_hidden_layers=layers, vocab_size=vocabulary)
    if checkpointing:
        model.gradient_checkpointing_enable()
    estimate = estimate_memory(
        model,
        selections_at_once=NUM_SELECTIONS,
        forward_only_at_once=0,
        collected_at_once=0,
        router_blocks=1,
        held_gradients=False,
        batch_size=BATCH,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        experts_width=3 * layers * NUM_EXPERTS * (R + 2),
        gradient_checkpointing=checkpointing,
        activation_bytes=dtype.itemsize,
        on_cpu=True,
    )
    tensors = estimate.activations + estimate.logits + estimate.gradients
    assert allocated_at_most(model) == pytest.approx(tensors, rel=0.25)
    assert estimate.routers == 0
    assert estimate.total == tensors + sum(
        (estimate.weights, estimate.optimizer, estimate.allocator, estimate.process)
    )


def weights_of(model: Any, bits: int) -> float:
    estimate = estimate_memory(
        model,
        **ONE_PASS,
        router_blocks=0,
        batch_size=1,
        tokens=8,
        labelled_tokens=8,
        experts_width=0,
        gradient_checkpointing=False,
        activation_bytes=2,
        on_cpu=True,
        quantised_bits=bits,
    )
    return estimate.weights


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_as_large_as_bitsandbytes_makes_it(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = adapted_llama(torch.float32, num_hidden_layers=2, vocab_size=512)
    adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    estimate = weights_of(model, bits)
    model.unload().save_pretrained(tmp_path)
    base = load_model(str(tmp_path), device="cpu", **{f"load_in_{bits}bit": True})
    kept = base.get_memory_footprint()
    for weight in base.parameters():
        if bits == 4 and hasattr(weight, "quant_state"):
            kept += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
        elif bits == 8 and hasattr(weight, "SCB"):
            kept += weight.SCB.nbytes
    assert estimate == pytest.approx(kept + adapters + 2 * 192 * 512, rel=0.001)


def test_quantising_counts_for_linears_of_the_base_alone() -> None:
    model = adapted_llama(torch.float32, num_hidden_layers=2, vocab_size=512)
    linears = 2 * (3 * 192 * 512 + 2 * 192 * 192 + 2 * 192 * 64)
    rows = 2 * (2 * 512 + 192 + 2 * 192 + 2 * 64)
    whole, largest = weights_of(model, 0), 2 * 192 * 512
    assert weights_of(model, 8) == whole - 3 * linears + 4 * rows + largest
    scales = linears / 64 * (1 + 4 / 256)
    assert weights_of(model, 4) == pytest.approx(whole - 3.5 * linears + scales + largest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_blocks_as_experts(checkpointing: bool) -> None:
    """Hidden values of k blocks a row, in one pass."""
    model = adapted_llama(torch.float32, "mixlora_block", num_hidden_layers=6, vocab_size=512)
    if checkpointing:
        model.gradient_checkpointing_enable()
    estimate = estimate_memory(
        model,
        **ONE_PASS,
        router_blocks=0,
        batch_size=BATCH,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        experts_width=3 * 6 * NUM_EXPERTS * (R + 2),
        gradient_checkpointing=checkpointing,
        activation_bytes=4,
        on_cpu=True,
    )
    tensors = estimate.activations + estimate.logits + estimate.gradients
    assert allocated_at_most(model, num_selections=1) == pytest.approx(tensors, rel=0.25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"num_selections": 6, "grad_selections": 2}, 1),
        ({"num_selections": 4, "selection_chunk_size": 2}, 1),
        ({"num_selections": 6, "grad_selections": 2, "credit": "causal"}, CAUSAL_BLOCKS),
        ({"num_selections": 10, "grad_selections": 2, "credit": "causal"}, CAUSAL_BLOCKS),
    ],
    ids=["G2-of-6", "chunks-of-2", "G2-of-6-causal", "G2-of-10-causal"],
)
def test_estimate_in_parts(options: dict[str, Any], blocks: int) -> None:
    """Selections that are not in memory together do not count, what trains the routers does."""
    model = adapted_llama(torch.float32, num_hidden_layers=6, vocab_size=512)
    plan = SamplingOptions(**options).plan(detached=True, checkpointed=False)
    estimate = estimate_memory(
        model,
        selections_at_once=2,
        forward_only_at_once=max((p.count for p in plan if not p.grad), default=0),
        collected_at_once=max(p.count for p in plan if p.collect),
        router_blocks=blocks,
        held_gradients="selection_chunk_size" in options,
        batch_size=BATCH,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        experts_width=3 * 6 * NUM_EXPERTS * (R + 2),
        gradient_checkpointing=False,
        activation_bytes=4,
        on_cpu=True,
    )
    tensors = estimate.activations + estimate.logits + estimate.gradients + estimate.routers
    assert allocated_at_most(model, **options) == pytest.approx(tensors, rel=0.25)

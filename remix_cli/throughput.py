"""How much arithmetic a training step is, from the model's shapes: plans start from it.

For one sequence of T tokens under one selection, with P the frozen linears' weights in the blocks,
A the adapters' and routers', h the hidden size, V the vocabulary:

    linears     2 T P
    adapters    2 T A           all n experts in one product, as the dense strategy does
    attention   4 T^2 h         a layer; scores and their use, counted in full as without a mask
    head        2 h V           a labelled token

A forward pass is their sum. The backward pass has the linears and the head once more, because what
is frozen takes no gradient, and adapters and attention twice. Gradient checkpointing runs all but
the head forward again. A step has all of this for G selections, and a forward pass for M - G.
Within a fifth of what torch counts for small models: tests/distributed/test_plan.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def step_flops(
    model: Any,
    *,
    tokens: int,
    labelled_tokens: int,
    grad_selections: int,
    forward_only: int,
    gradient_checkpointing: bool,
) -> float:
    """Floating-point operations of a step, for each sequence of the batch.

    Args:
        model: With adapters; its parameters may be on the meta device.
        tokens: T.
        labelled_tokens: Of the sequence.
        grad_selections: G.
        forward_only: M - G.
        gradient_checkpointing: Whether blocks are recomputed.
    """
    config, head = model.config, model.get_output_embeddings()
    frozen = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears, adapters = 2 * tokens * frozen, 2 * tokens * trained
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers
    logits = 2 * labelled_tokens * config.hidden_size * config.vocab_size
    blocks = linears + adapters + attention
    backward = linears + 2 * adapters + 2 * attention + logits
    recomputed = blocks if gradient_checkpointing else 0
    return grad_selections * (blocks + logits + backward + recomputed) + forward_only * (
        blocks + logits
    )

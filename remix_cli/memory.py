"""An estimate of training memory, from the model's shapes; M selections multiply the activations.

    weights       bytes of all parameters
    gradients     trainable parameters x their bytes
    optimizer     trainable parameters x 8 (AdamW's two fp32 moments)
    activations   rows x (layers x c + h) x bytes an element, rows = M x batch x tokens
    logits        M x batch x labelled tokens x vocabulary x 12 (logits, fp32 copy, their gradient)

c counts what one decoder block keeps for its backward pass, in elements a row, with hidden size h,
feed-forward size f and key/value width v. For a Llama block with fused attention: 8 h + 2 v around
attention and norms, 4 f in the gated feed-forward block, and n r + n per adapted linear. With
gradient checkpointing a block keeps h, and one block at a time the rest. An estimate, within about
a third: allocators and kernels keep more or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a training step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    model: Any,
    *,
    num_selections: int,
    batch_size: int,
    tokens: int,
    labelled_tokens: int,
    experts_width: int,
    gradient_checkpointing: bool,
    activation_bytes: int,
) -> MemoryEstimate:
    """Estimate the memory of one training step; the module's docstring has the formula.

    Args:
        model: With adapters; its parameters may be on the meta device.
        num_selections: M.
        batch_size: Sequences in one pass, before M multiplies them.
        tokens: Of the longest sequence.
        labelled_tokens: Of the sequence with the most.
        experts_width: Sum over adapted linears of n r + n.
        gradient_checkpointing: Whether blocks are recomputed.
        activation_bytes: Bytes of an element: 4, or 2 in half precision.
    """
    config = model.config
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv_width = kv_heads * (getattr(config, "head_dim", None) or hidden // heads)
    block = 8 * hidden + 2 * kv_width + 4 * feed_forward + experts_width / layers
    kept = layers * hidden + block if gradient_checkpointing else layers * block
    rows = num_selections * batch_size * tokens
    trainable = [p for p in model.parameters() if p.requires_grad]
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        gradients=sum(p.numel() * p.element_size() for p in trainable),
        optimizer=8 * sum(p.numel() for p in trainable),
        activations=rows * (kept + hidden) * activation_bytes,
        logits=12 * num_selections * batch_size * labelled_tokens * config.vocab_size,
    )

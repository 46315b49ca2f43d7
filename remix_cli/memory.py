"""An estimate of training memory, from the model's shapes; selections multiply the activations.

    weights       bytes of all parameters; of a base that bitsandbytes quantises, 1 byte (int8) or
                  1/2 + 1/64 (NF4) a weight of its linears but the head, and the largest one whole
    gradients     trainable parameters x their bytes, twice where chunks are held (held.py)
    optimizer     trainable parameters x 8 (AdamW's two fp32 moments)
    activations   rows x (layers x c + 2 h) x bytes an element, rows = m x batch x tokens, with m
                  selections at once: M, or as grad_selections and selection_chunk_size say
    logits        m x batch x labelled tokens x vocabulary x 12 (log-softmax, and in the backward
                  pass its gradient and that of the logits, in fp32)
    routers       where selections run in parts: sums of what trains the routers, 4 bytes x batch x
                  blocks x (2 + selections in the largest of these parts) x router parameters
                  (remix_model/eligibility.py)
    allocator     on a CPU, 3/4 x activations
    process       on a CPU, 430 MiB: Python, torch, transformers and PEFT, before any weights

c counts what one decoder block keeps for its backward pass, in elements a row, with hidden size h,
feed-forward size f and key/value width v. For a Llama block with fused attention: 5 h (two norms'
inputs, the feed-forward block's input, queries, attention's output) + 2 v + 4 f (gate, up, silu of
the gate, their product), and n r + 2 n for each adapted linear (H; mask and logits). Where whole
feed-forward blocks are mixed, f counts k times and once more (the weighted sum), and the block
whose backward pass runs has 2 k f of gradients (others' are small beside the rest). With gradient
checkpointing a block keeps h, and one block at a time the rest, when the logits are gone.
A part without a graph holds one block's c, and 8 bytes rather than 12 of its logits; the larger of
the two kinds of part counts.

allocator: glibc takes blocks from a heap that does not shrink (those of any size, as `remix train`
sets it up: allocator.py; below 32 MiB else, for 2 to 9 % less at the peak), and activations of many
sizes leave holes in it. Measured over three steps of SmolLM2-135M's shapes, batch 4, M = 4, as
a share of the activations: 0.65 to 0.85 with 6 layers and 256 tokens, 1.0 with 30 layers and 192;
none with MALLOC_MMAP_THRESHOLD_=1000000, which costs time. Not measured on CUDA, where the estimate
is of tensors only. The estimate of tensors is within a quarter of what torch allocates, see
tests/remix_cli/test_memory.py.

Sharded over s ranks by FSDP2, weights, gradients and optimizer are a part in s each. The unit that
runs stands whole beside them, the one that comes next is on its way, and where a unit is gathered
or its gradients are scattered it is there twice: three of the largest block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remix_model.parts import Part


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a training step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    routers: float
    allocator: float
    process: float

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(asdict(self).values())


# `at_once` of a method without selections.
ONE_PASS = {
    "selections_at_once": 1,
    "forward_only_at_once": 0,
    "collected_at_once": 0,
    "held_gradients": False,
}


def at_once(plan: Sequence[Part]) -> dict[str, Any]:
    """What of a step's parts is in memory together, as `estimate_memory` takes it."""
    return {
        "selections_at_once": max(part.count for part in plan if part.grad),
        "forward_only_at_once": max((part.count for part in plan if not part.grad), default=0),
        "collected_at_once": max((part.count for part in plan if part.collect), default=0),
        "held_gradients": any(part.grad and not part.last for part in plan),
    }


def estimate_memory(
    model: Any,
    *,
    selections_at_once: int,
    forward_only_at_once: int,
    collected_at_once: int,
    router_blocks: int,
    held_gradients: bool,
    batch_size: int,
    tokens: int,
    labelled_tokens: int,
    experts_width: int,
    gradient_checkpointing: bool,
    activation_bytes: int,
    on_cpu: bool,
    shards: int = 1,
    quantised_bits: int = 0,
) -> MemoryEstimate:
    """Estimate the memory of one training step; the module's docstring has the formula.

    Args:
        model: With adapters; its parameters may be on the meta device.
        selections_at_once: Selections whose graph is in memory together.
        forward_only_at_once: Selections of the largest part without a graph; 0: there is none.
        collected_at_once: Of the largest part whose sums train the routers; 0: there is none.
        router_blocks: Blocks of positions for which sums are kept.
        held_gradients: Whether parts are backpropagated before the last: gradients stand twice.
        batch_size: Sequences in one pass, before selections multiply them.
        tokens: Of the longest sequence.
        labelled_tokens: Of the sequence with the most.
        experts_width: Sum over adapted linears of n r + 2 n.
        gradient_checkpointing: Whether blocks are recomputed.
        activation_bytes: Bytes of an element: 4, or 2 in half precision.
        on_cpu: Whether the memory is the process's own.
        shards: s, ranks over which FSDP2 shards the model.
        quantised_bits: 4 or 8, of a base that bitsandbytes quantises; 0: it stays as it is.
    """
    config = model.config
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv_width = kv_heads * (getattr(config, "head_dim", None) or hidden // heads)
    copies = _block_experts(model)
    weighted, running = (feed_forward, 2 * copies * feed_forward) if copies > 1 else (0, 0)
    between = 4 * copies * feed_forward + weighted
    block = 5 * hidden + 2 * kv_width + between + experts_width / layers
    rows = selections_at_once * batch_size * tokens
    logits = 12 * selections_at_once * batch_size * labelled_tokens * config.vocab_size
    activations = rows * (layers * block + 2 * hidden + running) * activation_bytes
    if gradient_checkpointing:
        recomputed = rows * (block + running) * activation_bytes
        activations = rows * (layers + 2) * hidden * activation_bytes + max(recomputed - logits, 0)
    forward_rows = forward_only_at_once * batch_size * tokens
    forward_only = (
        forward_rows * (block + 2 * hidden) * activation_bytes,
        8 * forward_only_at_once * batch_size * labelled_tokens * config.vocab_size,
    )
    activations, logits = max((activations, logits), forward_only, key=sum)
    routers = sum(router.numel() for router in _routers(model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return MemoryEstimate(
        weights=(_bytes(model.parameters()) - _saved_bytes(model, quantised_bits)) / shards
        + (_largest_linear(model) * activation_bytes if quantised_bits else 0)
        + (3 * _largest_block(model) if shards > 1 else 0),
        gradients=(1 + held_gradients) * _bytes(trainable) / shards,
        optimizer=8 * sum(p.numel() for p in trainable) / shards,
        activations=activations,
        logits=logits,
        routers=4 * batch_size * router_blocks * (2 + collected_at_once) * routers
        if collected_at_once
        else 0,
        allocator=0.75 * activations if on_cpu else 0,
        process=430 * 2**20 if on_cpu else 0,
    )


def _bytes(parameters: Iterable[Any]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _saved_bytes(model: Any, bits: int) -> float:
    """What the base's linears take less when they are quantised: values, and scales beside them.

    Scales of int8: 4 bytes a row. Of NF4: a byte for 64 weights, and 4 bytes for 256 such scales.
    """
    if not bits:
        return 0
    weights = _base_linears(model)
    values = sum(weight.numel() for weight in weights)
    scales = 4 * sum(len(weight) for weight in weights) if bits == 8 else values * (1 + 1 / 64) / 64
    return _bytes(weights) - values * bits / 8 - scales


def _largest_linear(model: Any) -> int:
    """Weights of it: a product needs them whole."""
    return max((weight.numel() for weight in _base_linears(model)), default=0)


def _base_linears(model: Any) -> list[Any]:
    """The frozen weights of linears, but for the head, which stays as it is."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    return [linear.weight for linear in linears if not linear.weight.requires_grad]


def _largest_block(model: Any) -> int:
    """Bytes of the largest decoder block; embedding and head are not counted."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max((_bytes(block.parameters()) for blocks in lists for block in blocks), default=0)


def _routers(model: Any) -> list[Any]:
    weights = (site.router_weight for site in _sites(model))
    return [weight for weight in weights if weight is not None]


def _block_experts(model: Any) -> int:
    """How many feed-forward blocks a row goes through: k where experts are whole blocks, else 1."""
    return max((site.top_k for site in _sites(model) if site.whole_blocks), default=1)


def _sites(model: Any) -> list[Any]:
    """Those of a mixture; a model with another adapter has none."""
    from remix_model.site import RoutedModule, find_sites

    if not any(isinstance(module, RoutedModule) for module in model.modules()):
        return []
    return list(find_sites(model).values())

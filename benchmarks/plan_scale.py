"""Plan memory and throughput of Llama 3 on GPUs that are not here: formulas, not measurements.

    python -m benchmarks.plan_scale     # writes the tables into docs/distributed.md

Memory in GiB a GPU is remix_cli/memory.py's, arithmetic remix_cli/throughput.py's; both are held
against small models by tests. Tokens/s a GPU is utilisation x peak FLOP/s over FLOP a token, with
an assumed utilisation; what kernels and links cost beyond that is not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from remix_cli.memory import at_once, estimate_memory
from remix_cli.throughput import step_flops
from remix_model.options import SamplingOptions

PEAK_FLOPS, UTILISATION = 989e12, 0.4  # H100's bf16 without sparsity; the second is an assumption
TOKENS, LABELLED = 1024, 512
NUM_EXPERTS, R = 8, 8
PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS = {"Llama 3 8B": (LLAMA_8B, 1), "Llama 3 70B": (LLAMA_70B, 8)}  # GPUs that share a base
SELECTIONS = (2, 4, 8, 16, 32)


def adapted(shape: dict[str, int]) -> Any:
    """A Llama with adapters on its feed-forward linears, on the meta device, in bf16."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from remix_model import ReMixConfig

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.bfloat16)).to(torch.bfloat16)
        adapter = ReMixConfig(task_type="CAUSAL_LM", r=R, num_experts=NUM_EXPERTS, top_k=4)
        return get_peft_model(base, adapter)


def cell(model: Any, shards: int, options: SamplingOptions, checkpointing: bool) -> tuple[str, str]:
    """(GiB a GPU, tokens/s a GPU) of one sequence at a time."""
    plan = options.plan(detached=True, checkpointed=checkpointing)
    estimate = estimate_memory(
        model,
        **at_once(plan),
        router_blocks=options.credit_blocks,
        batch_size=1,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        experts_width=3 * model.config.num_hidden_layers * NUM_EXPERTS * (R + 2),
        gradient_checkpointing=checkpointing,
        activation_bytes=2,
        on_cpu=False,
        shards=shards,
    )
    with_graph = options.grad_selections or options.num_selections
    flops = step_flops(
        model,
        tokens=TOKENS,
        labelled_tokens=LABELLED,
        grad_selections=with_graph,
        forward_only=options.num_selections - with_graph,
        gradient_checkpointing=checkpointing,
    )
    tokens_per_s = UTILISATION * PEAK_FLOPS * TOKENS / flops
    return f"{estimate.total / 2**30:.0f}", f"{tokens_per_s:.0f}"


def tables() -> str:
    """One table a model, as Markdown."""
    ways = {
        "all with a graph": lambda m: (SamplingOptions(m, "causal"), False),
        "recomputed": lambda m: (SamplingOptions(m, "causal"), True),
        "G = 2, recomputed": lambda m: (SamplingOptions(m, "causal", grad_selections=2), True),
    }
    lines = []
    for name, (shape, shards) in MODELS.items():
        model = adapted(shape)
        where = "one GPU holds the base" if shards == 1 else f"sharded over {shards} GPUs"
        lines += [f"{name}, {where}: GiB a GPU; tokens/s a GPU", ""]
        lines += ["| M | " + " | ".join(ways) + " |", "| --- " * (len(ways) + 1) + "|"]
        for m in SELECTIONS:
            cells = ["; ".join(cell(model, shards, *way(m))) for way in ways.values()]
            lines.append(f"| {m} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the tables between the page's markers."""
    before, rest = PAGE.read_text().split("<!-- plan -->\n")
    after = rest.split("<!-- /plan -->")[1]
    PAGE.write_text(f"{before}<!-- plan -->\n{tables()}<!-- /plan -->{after}")


if __name__ == "__main__":
    main()

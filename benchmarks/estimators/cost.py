"""Time and memory of a SmolLM2-135M step with forward-only selections and a shared prefix.

    step     forward + backward of 2 sequences of 128 tokens under M selections, G with a graph
    prefix   the same with adapters in the last blocks only, with and without the shared prefix
    peak     most bytes that torch holds during a step over what it held before: activations,
             gradients and the sums that train the routers; parameters are added where it says so

M = 1 is a step with frozen routers: the least that any step of this model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.common import interleaved, peak_bytes
from remix_model import ReMixConfig, load_model, sample_routing, token_losses

TARGETS = ["gate_proj", "up_proj", "down_proj"]
BATCH, LENGTH = 2, 128
N, K, R = 8, 2, 8
BEST = {"credit": "causal", "log_prob": "unordered"}


def build(**config: Any) -> nn.Module:
    """With B not zero, as in the middle of training."""
    torch.manual_seed(0)
    base = load_model("smollm2-135m", dtype="float32", device="cpu")
    adapter = ReMixConfig(num_experts=N, top_k=K, r=R, target_modules=TARGETS, **config)
    model = get_peft_model(base, adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def batch_of() -> dict[str, Tensor]:
    """Random tokens, the second half of each row labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: nn.Module, batch: dict[str, Tensor], m: int, **options: Any) -> Callable[[], None]:
    """One step; the gradients are thrown away."""

    def run() -> None:
        with sample_routing(model, m, seed=0, **options) as routing:
            for part in routing.parts(batch):
                routing.add(*token_losses(model, part))
            loss = routing.loss()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def frozen(model: nn.Module, run: Callable[[], None]) -> Callable[[], None]:
    """The step with the routers frozen."""
    routers = [p for name, p in model.named_parameters() if "router" in name]

    def without() -> None:
        for router in routers:
            router.requires_grad_(False)
        run()
        for router in routers:
            router.requires_grad_(True)

    return without


def steps(rounds: int, only: Sequence[str] = ()) -> list[dict[str, object]]:
    """Rows of M, G, credit, seconds, peak MiB, and their ratios; `only` some of the cases."""
    model, batch = build(), batch_of()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    cases: dict[str, tuple[int, int, dict[str, Any]]] = {
        "M1": (1, 1, {}),
        "M2-G2": (2, 2, {}),
        "M4-G4": (4, 4, {}),
        "M8-G8": (8, 8, {}),
        "M8-G8-causal-unordered": (8, 8, BEST),
        "M2-G2-causal-unordered": (2, 2, BEST),
        "M4-G4-causal-unordered": (4, 4, BEST),
        "M8-G8-chunk2": (8, 8, {"selection_chunk_size": 2}),
        "M8-G8-chunk2-causal-unordered": (8, 8, {"selection_chunk_size": 2, **BEST}),
        "M2-G1": (2, 1, {"grad_selections": 1}),
        "M4-G1": (4, 1, {"grad_selections": 1}),
        "M2-G1-causal-unordered": (2, 1, {"grad_selections": 1, **BEST}),
        "M4-G1-causal-unordered": (4, 1, {"grad_selections": 1, **BEST}),
        "M8-G1": (8, 1, {"grad_selections": 1}),
        "M8-G1-causal-unordered": (8, 1, {"grad_selections": 1, **BEST}),
        "M8-G1-chunk7": (8, 1, {"grad_selections": 1, "selection_chunk_size": 7}),
        "M8-G2": (8, 2, {"grad_selections": 2}),
        "M32-G1": (32, 1, {"grad_selections": 1}),
        "M32-G1-causal-unordered": (32, 1, {"grad_selections": 1, **BEST}),
    }
    if only:
        kept = {"M1", *only, *(_base(cases[name][0]) for name in only)}
        cases = {name: case for name, case in cases.items() if name in kept}
    runs = {name: step(model, batch, m, **options) for name, (m, _, options) in cases.items()}
    runs["M1"] = frozen(model, runs["M1"])
    times = interleaved(runs, rounds, warmup=1)
    peaks = {name: peak_bytes(run, warm=True) for name, run in runs.items()}
    rows: list[dict[str, object]] = []
    for name, (m, g, options) in cases.items():
        base = _base(m)
        rows.append(
            {
                "case": name,
                "M": m,
                "G": g,
                "credit": options.get("credit", "sequence"),
                "shape": f"{BATCH}x{LENGTH}-n{N}-k{K}-r{R}",
                "time_s": f"{times[name].median_ms / 1e3:.3f}",
                "p20_s": f"{times[name].quantile_ms(0.2) / 1e3:.3f}",
                "p80_s": f"{times[name].quantile_ms(0.8) / 1e3:.3f}",
                "time_over": f"{times[name].ratio_to(times[base]):.3f}",
                "peak_mib": f"{peaks[name] / 2**20:.0f}",
                "peak_over": f"{peaks[name] / peaks[base]:.3f}",
                "ratio_to": base,
                "with_parameters_over_M1": (
                    f"{(peaks[name] + parameters) / (peaks['M1'] + parameters):.3f}"
                ),
            }
        )
    return rows


def _base(m: int) -> str:
    """What a case is held to: all selections with a graph; M = 2 for M = 32."""
    return {1: "M1", 32: "M2-G2"}.get(m, f"M{m}-G{m}")


def prefixes(rounds: int, m: int = 4) -> list[dict[str, object]]:
    """Rows of the first adapted block and the time with a shared prefix over without."""
    import remix_model.routing

    rows: list[dict[str, object]] = []
    batch = batch_of()
    for first in (0, 8, 15, 22, 29):
        model = build(layers_to_transform=list(range(first, 30)))
        run = step(model, batch, m)

        def unshared(run: Callable[[], None] = run) -> None:
            original = remix_model.routing.shared_prefix
            remix_model.routing.shared_prefix = lambda *_: nullcontext(0)
            try:
                run()
            finally:
                remix_model.routing.shared_prefix = original

        times = interleaved({"unshared": unshared, "shared": run}, rounds, warmup=1)
        peaks = {"unshared": peak_bytes(unshared, True), "shared": peak_bytes(run, True)}
        rows.append(
            {
                "first_block": first,
                "blocks": 30,
                "M": m,
                "unshared_s": f"{times['unshared'].median_ms / 1e3:.3f}",
                "shared_s": f"{times['shared'].median_ms / 1e3:.3f}",
                "time_over": f"{times['shared'].ratio_to(times['unshared']):.3f}",
                "peak_over": f"{peaks['shared'] / peaks['unshared']:.3f}",
            }
        )
    return rows

"""A SmolLM2-135M training step, and greedy generation: ReMix against PEFT LoRA of rank k r.

    step       forward + backward of 8 sequences of 128 tokens, adapters on gate/up/down, fp32,
               logits at the labelled positions only in every variant; also the most that torch
               holds during the step, over what it held before (the gradients included)
    routers    the same step with every type of router, beside ReMix's per selection and the loop;
               `remix_M1` is one selection with frozen routers, which need no second to learn from
    generate   greedy tokens with a KV cache, batch 1, adapters not merged

A ReMix step runs M selections, so its time is divided by M: "per selection". `mixlora_loop` is a
mixture with learned weights and a loop over experts (expert_loop.py): one pass. `folded` runs 8
inputs x M = 4 in one pass of 32 sequences; `separate` the same number of sequences as four passes.
Unit: s a step, tokens/s.

    python -m benchmarks.bench_train_step [--rounds 5] [--parts step fold generate] [--no-save]
    python -m benchmarks.bench_train_step --parts routers
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import remix_model
from benchmarks import expert_loop
from benchmarks.common import Timing, interleaved, peak_bytes, prepare_cpu, write_rows
from remix_model import ReMixConfig, load_model, sample_routing, token_losses
from remix_model.routers import ROUTERS
from remix_model.site import find_sites

TARGETS = ["gate_proj", "up_proj", "down_proj"]
N, K, R = 8, 4, 8
BATCH, LENGTH, NEW_TOKENS = 8, 128, 48


def build(config: Any) -> nn.Module:
    """SmolLM2-135M with an adapter whose B is not zero, as in the middle of training."""
    torch.manual_seed(0)
    model = get_peft_model(load_model("smollm2-135m", dtype="float32", device="cpu"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def pair() -> tuple[nn.Module, nn.Module]:
    """(PEFT LoRA of rank k r, ReMix)."""
    lora = build(LoraConfig(r=K * R, lora_alpha=2, use_rslora=True, target_modules=TARGETS))
    return lora, build(ReMixConfig(num_experts=N, top_k=K, r=R, target_modules=TARGETS))


def routed(router_type: str) -> nn.Module:
    """With a type of router."""
    config = ReMixConfig(
        num_experts=N, top_k=K, r=R, target_modules=TARGETS, router_type=router_type
    )
    return build(config)


def batch_of(size: int, label_share: float) -> dict[str, torch.Tensor]:
    """Random tokens; the last `label_share` of each row has labels."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 49152, (size, LENGTH), generator=generator)
    labels = input_ids.clone()
    labels[:, : int(LENGTH * (1 - label_share))] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def lora_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One step of plain LoRA."""

    def run() -> None:
        losses, mask = token_losses(model, batch)
        (losses.sum() / mask.sum()).backward()
        model.zero_grad(set_to_none=True)

    return run


def remix_step(
    model: nn.Module, batch: dict[str, torch.Tensor], num_selections: int, passes: int = 1
) -> Callable[[], None]:
    """One step of ReMix; with `passes`, each on its share of the batch."""
    size = batch["input_ids"].shape[0] // passes

    def run() -> None:
        for part in range(passes):
            rows = {key: value[part * size : (part + 1) * size] for key, value in batch.items()}
            with sample_routing(model, num_selections, seed=part) as routing:
                losses, mask = token_losses(model, routing.expand(rows))
                loss = routing.loss(losses, mask)
            loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def generation(model: nn.Module) -> Callable[[], None]:
    """Generate NEW_TOKENS greedily from a short prompt."""
    prompt = torch.arange(100, 116).unsqueeze(0)

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        model.train()

    return run


def report(
    rows: list[dict[str, object]],
    case: str,
    times: dict[str, Timing],
    divide: dict[str, int],
    peaks: dict[str, int] | None = None,
) -> None:
    """Print a comparison and collect its rows; the first variant is what the others are held to."""
    first = next(iter(times))
    print(f"\n{case}")
    for name, timing in times.items():
        ratio = timing.ratio_to(times[first]) / divide.get(name, 1) * divide.get(first, 1)
        row = {
            "case": case,
            "variant": name,
            "per": divide.get(name, 1),
            "time_s": f"{timing.median_ms / 1e3:.3f}",
            "p20_s": f"{timing.quantile_ms(0.2) / 1e3:.3f}",
            "p80_s": f"{timing.quantile_ms(0.8) / 1e3:.3f}",
            "ratio": f"{ratio:.3f}",
            "ratio_to": first,
            "peak_mib": "" if peaks is None else f"{peaks[name] / 2**20:.0f}",
        }
        rows.append(row)
        print(
            f"  {name:14s} {row['time_s']:>8} s   x {first} {row['ratio']} (per selection)"
            + (f"   peak {row['peak_mib']} MiB" if peaks else "")
        )


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--label-share", type=float, default=0.5)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["step", "fold", "generate"],
        choices=["step", "fold", "routers", "generate"],
        help="what to measure",
    )
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    prepare_cpu()
    started = time.time()
    lora, remix = pair()
    shape = f"{BATCH}x{LENGTH}-n{N}-k{K}-r{R}-labels{args.label_share:g}"
    rows: list[dict[str, object]] = []
    one = batch_of(BATCH, args.label_share)
    if "step" in args.parts:
        steps = {
            "lora_kr": lora_step(lora, one),
            "mixlora_loop": lora_step(expert_loop.build(TARGETS, N, K, R), one),
            "remix_M2": remix_step(remix, one, 2),
            "remix_M4": remix_step(remix, one, 4),
        }
        peaks = {name: peak_bytes(run, warm=True) for name, run in steps.items()}  # warms up, too
        times = interleaved(steps, args.rounds, warmup=0)
        report(rows, f"step {shape}", times, {"remix_M2": 2, "remix_M4": 4}, peaks)
    if "fold" in args.parts:
        folds = {
            "separate": remix_step(remix, batch_of(2 * BATCH, args.label_share), 2, passes=4),
            "folded": remix_step(remix, one, 4),
        }
        report(rows, f"fold {shape}", interleaved(folds, args.rounds, warmup=1), {})
    if "routers" in args.parts:
        kinds = [kind for kind in ROUTERS if kind != "remix"]
        steps = {"remix_M2": remix_step(remix, one, 2)}
        steps |= {kind: remix_step(routed(kind), one, 1) for kind in kinds}
        frozen = routed("remix")
        for site in find_sites(frozen).values():
            site.router_weight.requires_grad_(False)
        steps["remix_M1"] = remix_step(frozen, one, 1)
        steps["mixlora_loop"] = lora_step(expert_loop.build(TARGETS, N, K, R), one)
        times = interleaved(steps, args.rounds, warmup=1)
        report(rows, f"routers {shape}", times, {"remix_M2": 2})
    if "generate" in args.parts:
        runs = {"lora_kr": generation(lora), "remix": generation(remix)}
        times = interleaved(runs, args.rounds, warmup=1)
        report(rows, f"generate {NEW_TOKENS} tokens-n{N}-k{K}-r{R}", times, {})
        for name, timing in times.items():
            print(f"  {name:14s} {NEW_TOKENS / timing.median_ms * 1e3:8.2f} tokens/s")
    print(f"\nremix_model {remix_model.__version__}, {time.time() - started:.0f} s")
    if not args.no_save:
        print(f"written to {write_rows('train_step', rows)}")


if __name__ == "__main__":
    main()

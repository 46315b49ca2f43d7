"""The plots of the docs, from the committed rows: `python -m benchmarks.plots`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from benchmarks.common import rows_of
from benchmarks.layers.growth import SIZES, Row
from benchmarks.study.rows import read_rows

matplotlib.use("svg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent / "docs" / "plots"
LINES = {
    "remix": ("ReMix, auto", "C3", "-"),
    "grouped": ("ReMix, grouped", "C1", ":"),
    "lora_nr": ("PEFT LoRA, rank n r", "C0", "-"),
    "dense_eager": ("dense, eager", "C2", "--"),
    "expert_loop": ("loop over experts", "C4", "-"),
    "grouped_mm": ("sort + grouped_mm", "C5", "-"),
}
ROUTED = {
    "mixlora": ("MixLoRA", "C0"),
    "mixlora_router30": ("MixLoRA, routers' rate x 30", "C1"),
    "remix": ("ReMix", "C2"),
    "remix_router30": ("ReMix, routers' rate x 30", "C3"),
}
POOL = {"shape": "SmolLM2-135M up", "T": "1024", "k": "2", "M": "1", "routing": "uniform"}


def routed_rows() -> list[Row]:
    """The study's rows of instruction_induction, first seed, that say how training routed."""
    names = {f"main-instruction_induction-{method}-s0" for method in ROUTED}
    rows = [row for row in read_rows().values() if row["name"] in names]
    return [row for row in rows if row["routing"] or row["history"]]


def cost_over_pool(rows: list[Row]) -> plt.Figure:
    """Time over the frozen linear's against n r."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    kept = [r for r in rows if r["passes"] == "train" and r["over_frozen"]]
    kept = [r for r in kept if all(r[size] == value for size, value in POOL.items())]
    squares = {"8x8": 64, "8x16": 128, "16x16": 256, "32x16": 512, "64x64": 4096}  # n x r
    kept = [r for r in kept if f"{r['n']}x{r['r']}" in squares]
    for variant, (label, color, style) in LINES.items():
        points = sorted(
            (int(r["n"]) * int(r["r"]), float(r["over_frozen"]))
            for r in kept
            if r["variant"] == variant
        )
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, marker="o", ms=3, label=label)
    axes.axhline(1.0, color="0.6", lw=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="n r, ranks in the pool (8x8, 8x16, 16x16, 32x16, 64x64)",
        ylabel="time / frozen linear",
    )
    axes.set_title("576 -> 1536, T = 1024, k = 2, forward + backward", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return figure


def step_over_selections(rows: list[Row]) -> plt.Figure:
    """Time and memory of a SmolLM2 step against M, all selections with a graph or one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6))
    kinds = {
        "all with a graph": ("M{m}-G{m}", "C0"),
        "one with a graph": ("M{m}-G1", "C3"),
        "one, causal, unordered": ("M{m}-G1-causal-unordered", "C1"),
    }
    cases = {r["case"]: r for r in rows}
    for label, (pattern, color) in kinds.items():
        found = [(m, cases.get(pattern.format(m=m))) for m in (2, 4, 8, 32)]
        points = [(m, r) for m, r in found if r is not None]
        sizes = [m for m, _ in points]
        left.plot(sizes, [float(r["time_s"]) for _, r in points], "o-", color=color, label=label)
        right.plot(sizes, [float(r["peak_mib"]) for _, r in points], "o-", color=color)
    for axes, name in ((left, "s a step"), (right, "peak MiB over the parameters")):
        axes.set(xscale="log", yscale="log", xlabel="M, selections", ylabel=name)
        axes.set_xticks([2, 4, 8, 32], ["2", "4", "8", "32"])
    left.legend(fontsize=8, frameon=False)
    return figure


def routing_while_training(rows: list[Row]) -> plt.Figure:
    """ESS of a token's weights in training, and the weights at its end, of several methods."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 3.2))
    for row in rows:
        series = json.loads(row["routing"] or row["history"])
        steps = [point["step"] for point in series]
        label, color = ROUTED[row["method"]]
        for axes, key in ((left, "ess"), (middle, "policy_ess")):
            axes.plot(steps, [point[key] for point in series], "o-", ms=3, color=color, label=label)
        if not row["routing"]:
            continue
        counts = series[-1]["weights"]
        bins = [(index + 0.5) / len(counts) for index in range(len(counts))]
        shares = [count / sum(counts) for count in counts]
        right.plot(bins, shares, drawstyle="steps-mid", color=color)
    left.set(xlabel="step", ylabel="ESS of a token's weights", ylim=(1, 2.05))
    middle.set(xlabel="step", ylabel="ESS of softmax(z), of 8", ylim=(1, 8))
    right.set(xlabel="weight, at the end", ylabel="share of weights", yscale="log")
    middle.legend(fontsize=7, frameon=False)
    return figure


def main() -> None:
    """Write every plot whose rows are there."""
    plt.rcParams.update({"svg.hashsalt": "remix", "svg.fonttype": "none", "font.size": 9})
    FOLDER.mkdir(exist_ok=True)
    plots = {
        "cost_over_pool": (cost_over_pool, rows_of("grid", *SIZES, "variant")),
        "step_over_selections": (step_over_selections, rows_of("estimators_steps", "case")),
        "routing_while_training": (routing_while_training, routed_rows()),
    }
    for name, (draw, rows) in plots.items():
        if not rows:
            print(f"{name}: no rows")
            continue
        figure = draw(rows)
        figure.tight_layout()
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(f"written to {FOLDER / name}.svg")


if __name__ == "__main__":
    main()

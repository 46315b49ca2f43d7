"""The figures in README and docs, from the committed rows: `python -m benchmarks.tables`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, rows_of, table
from benchmarks.estimators.tables import estimator_figures
from benchmarks.performance import performance_figures, train_steps

README = Path(__file__).parent.parent / "README.md"
ESTIMATORS = README.parent / "docs" / "estimators.md"
PERFORMANCE = README.parent / "docs" / "performance.md"
START, END = "<!-- figures -->\n", "<!-- /figures -->"


CELLS = (
    "SmolLM2-135M-up-T1024-n8-r8-k4-M1-uniform-train",
    "SmolLM2-135M-up-T4096-n8-r8-k2-M1-uniform-train",
    "SmolLM2-135M-down-T1024-n8-r8-k4-M1-uniform-train",
    "Llama-3.2-1B-up-T512-n32-r16-k2-M1-uniform-train",
    "SmolLM2-135M-up-T1024-n32-r16-k2-M1-uniform-train",
    "SmolLM2-135M-up-T1024-n64-r64-k2-M1-uniform-train",
    "SmolLM2-135M-up-T1-n8-r8-k2-M1-uniform-infer",
)
VARIANTS = {
    "remix": "**ReMix**",
    "lora_kr": "PEFT LoRA, rank k r",
    "lora_nr": "PEFT LoRA, rank n r",
    "expert_loop": "loop over experts",
    "grouped_mm": "sort + grouped_mm",
    "dense_eager": "dense, eager",
}


def figures() -> str:
    """The section of README, in Markdown."""
    grid = {(row["cell"], row["variant"]): row for row in rows_of("grid", "cell", "variant")}
    steps, _ = train_steps()
    where = steps[-1]
    body = []
    for cell in CELLS:
        over = [float(grid[cell, variant]["over_frozen"]) for variant in VARIANTS]
        name = cell.removesuffix("-M1-uniform-train").replace("-M1-uniform-infer", " (forward)")
        body.append([name, *(f"{value:.2f}" for value in over)])
    ratios = []
    for row in steps:
        if row["variant"] != row["ratio_to"]:
            per = " per selection" if row["per"] != "1" else ""
            label = f"{row['case']}: time of {row['variant']}{per} over {row['ratio_to']}"
            ratios.append([label, f"{float(row['ratio']):.2f}"])
    lines = [
        f"{where['date']}, {where['device']}, {where['threads']} threads, torch {where['torch']},",
        "fp32. One adapted linear, forward + backward, time over the frozen linear's:",
        "",
        *table(["", *VARIANTS.values()], body),
        *table(["SmolLM2-135M, side by side", "ratio"], ratios),
        "All cells, peers, profiles and curves: [docs/performance.md](docs/performance.md).",
    ]
    if not rows_of("gpu", "cell", "variant"):
        lines.append("Not measured on a GPU.")
    return "\n".join(lines) + "\n"


def rewrite(path: Path, start: str, end: str, section: str) -> None:
    """Replace what is between two markers."""
    before, rest = path.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    path.write_text(before + start + section + end + after, encoding="utf-8")


def main() -> None:
    """Rewrite README, docs/estimators.md and docs/performance.md between their markers."""
    rewrite(README, START, END, figures())
    section = performance_figures()
    rewrite(PERFORMANCE, "<!-- performance -->\n", "<!-- /performance -->", section)
    if (RESULTS / "estimators_steps.csv").exists():
        rewrite(ESTIMATORS, "<!-- estimators -->\n", "<!-- /estimators -->", estimator_figures())


if __name__ == "__main__":
    main()

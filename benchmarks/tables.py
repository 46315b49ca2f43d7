"""The figures in README and docs, from the committed rows: `python -m benchmarks.tables`."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.estimators.tables import estimator_figures
from benchmarks.performance import performance_figures

README = Path(__file__).parent.parent / "README.md"
ESTIMATORS = README.parent / "docs" / "estimators.md"
PERFORMANCE = README.parent / "docs" / "performance.md"
START, END = "<!-- figures -->\n", "<!-- /figures -->"


def latest(name: str) -> dict[tuple[str, str], dict[str, str]]:
    """The last row of each (case, variant) in results/<name>.csv, all from the last device."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    device = rows[-1]["device"]
    return {(row["case"], row["variant"]): row for row in rows if row["device"] == device}


def figures() -> str:
    """The section between the markers, in Markdown."""
    layer, step = latest("layer"), latest("train_step")
    where = next(iter(step.values()))
    lines = [
        f"{where['date']}, {where['device']}, {where['threads']} threads, torch {where['torch']},",
        "fp32; by `make bench`, all rows in `benchmarks/results`. Not measured on a GPU.",
        "",
        "| one adapted linear, forward + backward | over frozen | over LoRA rank k r | peak MiB |",
        "| --- | --- | --- | --- |",
    ]
    names = {
        "remix": "ReMix (`routed_linear`)",
        "lora_kr": "PEFT LoRA, rank k r",
        "lora_nr": "PEFT LoRA, rank n r",
        "expert_loop": "loop over experts",
        "dense_gemms": "the dense strategy's matrix products alone",
    }
    for case in dict.fromkeys(case for case, _ in layer):
        for variant, label in names.items():
            row = layer[case, variant]
            lines.append(
                f"| {case}: {label} | {float(row['over_frozen']):.2f} "
                f"| {float(row['over_lora_kr']):.2f} | {float(row['peak_mib']):.0f} |"
            )
    lines += ["", "| SmolLM2-135M, side by side | ratio |", "| --- | --- |"]
    for (case, variant), row in step.items():
        if variant == row["ratio_to"]:
            continue
        per = " per selection" if row["per"] != "1" else ""
        lines.append(
            f"| {case}: time of {variant}{per} over {row['ratio_to']} | {float(row['ratio']):.2f} |"
        )
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

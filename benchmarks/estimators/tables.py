"""The section of docs/estimators.md that `python -m benchmarks.tables` writes."""

from __future__ import annotations

from benchmarks.common import rows_of, table

ESTIMATOR = ("credit", "log_prob", "graph")


def estimator_figures() -> str:
    """The section of docs/estimators.md."""
    variance = rows_of("estimators_variance", "model", "batch", "labelled", "M", *ESTIMATOR)
    last = {(row["model"], row["labelled"] == "1.00"): row["batch"] for row in variance}
    variance = [r for r in variance if last[r["model"], r["labelled"] == "1.00"] == r["batch"]]
    steps = {row["case"]: row for row in rows_of("estimators_steps", "case")}
    prefix = rows_of("estimators_prefix", "first_block")
    planted = rows_of("estimators_planted", "estimator", "M", "learning_rate")
    seeds = max((int(row["seeds"]) for row in planted), default=0)
    planted = [row for row in planted if int(row["seeds"]) == seeds]
    where = next(iter(steps.values()))
    lines = [
        f"{where['date']}, {where['device']}, {where['threads']} threads, torch {where['torch']},",
        "fp32.",
        "",
        "**Variance of the routers' gradient** over the paper's estimator's (sequence credit,",
        "ordered) at the same M, on partly trained adapters. G=1: one selection with a graph;",
        "under sequence credit that is the same gradient.",
        "",
    ]
    sizes = sorted({int(row["M"]) for row in variance})
    body = []
    for model, share in dict.fromkeys((row["model"], row["labelled"]) for row in variance):
        ours = [row for row in variance if (row["model"], row["labelled"]) == (model, share)]
        for key in dict.fromkeys(map(_key, ours)):
            if key[0] == "sequence" and key[2] != "all":
                continue
            found = {int(r["M"]): r["over_paper"] for r in ours if _key(r) == key}
            name = f"{key[0]}, {key[1]}" + ("" if key[2] == "all" else ", G=1")
            body.append(
                [model, f"{float(share):.0%}", name, *(f"{float(found[m]):.2f}" for m in sizes)]
            )
    lines += table(["model", "labelled", "estimator", *(f"M={m}" for m in sizes)], body)
    lines += [
        f"**A SmolLM2-135M step** ({where['shape']}; peak: what torch holds during the step over",
        "what it held before; last column: parameters included, over a step with M = 1 and frozen",
        "routers).",
        "",
    ]
    body = [
        [
            row["case"],
            row["time_s"],
            f"{float(row['time_over']):.2f} ({row['ratio_to']})",
            row["peak_mib"],
            f"{float(row['peak_over']):.2f}",
            f"{float(row['with_parameters_over_M1']):.2f}",
        ]
        for row in steps.values()
    ]
    head = ["case", "s", "time over", "peak MiB", "peak over", "with parameters over M1"]
    lines += table(head, body)
    lines += _variance_times_cost(variance, steps)
    lines += [
        "**Shared prefix**: a step with M = 4 and adapters from one block on, over the same",
        "without sharing.",
        "",
    ]
    body = [
        [r["first_block"], r["unshared_s"], r["shared_s"], f"{float(r['time_over']):.2f}",
         f"{float(r['peak_over']):.2f}"]
        for r in prefix
    ]  # fmt: skip
    head = ["first adapted of 30 blocks", "unshared s", "shared s", "time over", "peak over"]
    lines += table(head, body) if prefix else ["Not measured yet.", ""]
    lines += [
        "**Steps until a router alone finds the right experts** for 95 % of 16 types of token",
        f"(n=8, k=2, frozen specialists, Adam): median over {seeds} seeds, each at its better",
        "learning rate (0.003 or 0.01).",
        "",
    ]
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in planted:
        key2 = (row["estimator"], row["M"])
        if key2 not in best or float(row["median_steps"]) < float(best[key2]["median_steps"]):
            best[key2] = row
    counts = sorted({int(m) for _, m in best})
    names = dict.fromkeys(name for name, _ in best)
    body = [
        [name, *(f"{float(best[name, str(m)]['median_steps']):.0f}" for m in counts)]
        for name in names
    ]
    lines += table(["estimator", *(f"M={m}" for m in counts)], body)
    return "\n".join(lines)


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    credit, log_prob, graph = (row[key] for key in ESTIMATOR)
    return credit, log_prob, graph


def _variance_times_cost(
    variance: list[dict[str, str]], steps: dict[str, dict[str, str]]
) -> list[str]:
    """Variance times time, on SmolLM2, over the paper's estimator with M = 2."""
    cases = {
        "sequence, ordered": ("sequence", "ordered", "all", "M{m}-G{m}"),
        "causal, unordered": ("causal", "unordered", "all", "M{m}-G{m}-causal-unordered"),
        "sequence, ordered, G=1": ("sequence", "ordered", "G1", "M{m}-G1"),
        "causal, unordered, G=1": ("causal", "unordered", "G1", "M{m}-G1-causal-unordered"),
    }
    found = {
        (*_key(row), row["M"]): float(row["variance"])
        for row in variance
        if row["model"].startswith("smollm2") and float(row["labelled"]) < 1
    }
    if not found:
        return []
    first = found["sequence", "ordered", "all", "2"] * float(steps["M2-G2"]["time_s"])
    sizes, body = ("2", "4", "8", "32"), []
    for name, (credit, log_prob, graph, case) in cases.items():
        cells = []
        for m in sizes:
            step = steps.get(case.format(m=m))
            value = found[credit, log_prob, graph, m]
            cells.append(f"{value * float(step['time_s']) / first:.2f}" if step else "not measured")
        body.append([name, *cells])
    return [
        "**Variance times time**, SmolLM2-135M, over the paper's with M = 2: less is better.",
        "",
        *table(["estimator", *(f"M={m}" for m in sizes)], body),
    ]

"""What the study runs: tasks, methods and cells. This file is the whole plan.

Equal means: the mixtures of two active LoRAs of rank 8 out of 8 set the number of activated
parameters (their routers included), every method gets the rank that comes nearest, and every run
of a task sees the same examples in the same order. `lora_matched` gets M times as many: ReMix's
compute.

A cell is named by its part, task, method and seed. Its row counts only as long as everything that
decides it (cell, task, method, rate, the data's version) is as it was: `Cell.digest`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.study.data import DEV, VERSION

SEEDS = (0, 1, 2)
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST = (1e-3, 3e-3, 1e-2)  # and outward on the grid, while the best is the outermost
M = 2


@dataclass(frozen=True)
class Task:
    """What is trained on and how much, and what is scored.

    Attributes:
        steps: Optimizer steps.
        batch: Examples a step.
        passes: In which a step's examples run, those of like length together: less padding.
        tokens: Mean length of an example, for estimates of time.
        answers: Held-out prompts that are answered (the first of each group); None: all.
        eval_batch: Held-out examples in one pass.
        longest: New tokens of an answer at most; None: as many as the longest reference has.
    """

    name: str
    steps: int
    batch: int
    tokens: float
    scored: int
    passes: int = 1
    answers: int | None = None
    eval_batch: int = 20
    longest: int | None = None


TASKS = {
    "instruction_induction": Task("instruction_induction", 96, 8, 19, 240, passes=2),
    "trec": Task("trec", 96, 8, 18, 500, eval_batch=50),
    "gsm8k": Task("gsm8k", 48, 4, 185, 64, passes=2, answers=32, eval_batch=8, longest=160),
}

# Options of `remix train`. Activated parameters of the feed-forward linears are in the comments, in
# thousands a block of SmolLM2-135M.
POOL = {"num_experts": 8, "top_k": 2, "r": 8}
DRAWN = {**POOL, "num_selections": M}
PAPER = {"credit": "sequence", "log_prob": "ordered"}
# What may help, ours. Routers' rates, as multiples of the experts', of both kinds of mixture.
ROUTER_RATES: dict[str, dict[str, Any]] = {
    "remix_router01": {**DRAWN, "router_rate": 0.1},
    **{f"remix_router{x}": {**DRAWN, "router_rate": float(x)} for x in (10, 30, 100, 300)},
    **{
        f"mixlora_router{x}": {"method": "mixlora", **POOL, "router_rate": float(x)}
        for x in (10, 30, 100)
    },
}
# And experts' rate apart, routers that wait, copies of a LoRA, a dense start, a policy that ends
# near its top k.
HELP: dict[str, dict[str, Any]] = {
    **ROUTER_RATES,
    "remix_experts4": {**DRAWN, "expert_rate_scale": 4.0},  # n / k
    "remix_wait": {**DRAWN, "router_wait": 24},
    "remix_copies": {**DRAWN, "copied_steps": 24},
    "remix_dense": {**DRAWN, "dense_start": 24},
    "remix_anneal": {**DRAWN, "temperature_end": 0.1},
    "remix_router10_dense": {**DRAWN, "router_rate": 10.0, "dense_start": 24},
    "remix_router10_anneal": {**DRAWN, "router_rate": 10.0, "temperature_end": 0.1},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 19},  # 120
    "lora_matched": {"method": "lora", "rank": 19},  # M times the steps
    "rslora": {"method": "rslora", "rank": 19},  # 120
    "dora": {"method": "dora", "rank": 19},  # 124
    "vblora": {"method": "vblora", "rank": 14},  # 118, and a bank of 49 for all blocks
    "ia3": {"method": "ia3"},  # 2: cannot be made equal
    "mixlora": {"method": "mixlora", **POOL},  # 123
    "hydralora": {"method": "hydralora", **POOL, "num_experts": 3, "top_k": 3},  # 117
    "mor": {"method": "mor", **POOL, "r": 6},  # 124, with two sub-routers
    "remix_paper": {**DRAWN, **PAPER},  # 123
    "remix": {**DRAWN},  # 123; causal credit, unordered probability
    "remix_lora_type": {**DRAWN, "use_rslora": False},
    # No learning of routers: drawn evenly, or the router as it was initialised.
    "uniform": {"method": "uniform", **DRAWN},
    "remix_frozen": {**DRAWN, "router_learning_rate": 0.0},
    # One LoRA of rank k r, and k of rank r: the same weight of an expert, without the routers.
    **{f"rslora_r{8 * k}": {"method": "rslora", "rank": 8 * k} for k in (1, 2, 4)},
    **{f"remix_k{k}": {**DRAWN, "top_k": k} for k in (1, 3, 4)},
    # More selections.
    **{f"remix_m{m}": {**DRAWN, "num_selections": m} for m in (4, 8)},
    **{f"remix_m{m}_matched": {**DRAWN, "num_selections": m} for m in (4, 8)},
    "remix_m4_g1": {**DRAWN, "num_selections": 4, "grad_selections": 1},  # a fifth above M = 2
    **HELP,
}
# The same for longer: once through the training data instead of a quarter of it.
LONG = {
    f"{name}_long": name
    for name in ("lora", "rslora", "mixlora_router30", "remix_router30", "remix")
}
METHODS |= {name: METHODS[source] for name, source in LONG.items()}
# Times the task's steps, so that all of a comparison take the same compute.
STEPS_OF = {
    "lora_matched": M,
    "remix_m4_matched": M / 4,
    "remix_m8_matched": M / 8,
    **dict.fromkeys(LONG, 4),
}
# Which method's learning rate these take; every other method has a search of its own.
RATE_OF = {
    "lora_matched": "lora",
    "uniform": "remix",
    "remix_frozen": "remix",
    **{name: "rslora" for name in METHODS if name.startswith("rslora_r")},
    **{name: "remix" for name in METHODS if name.startswith(("remix_k", "remix_m"))},
    **{name: name.split("_")[0] for name in HELP},
    **{name: source.removesuffix("_router30") for name, source in LONG.items()},
}

MAIN = ("lora", "mixlora", "remix", "remix_paper", "rslora", "lora_matched")
HELPED = (
    "remix_router30",
    "mixlora_router30",
)  # what has helped there, on what nothing was tuned on
REST = ("hydralora", "mor", "dora", "vblora", "ia3")
SELECTIONS = ("remix_m4", "remix_m8", "remix_m4_matched", "remix_m8_matched", "remix_m4_g1")
LONGER = tuple(name for name in LONG if name != "remix_long")
# (part of the study, task, methods, seeds), the most informative first.
PARTS: tuple[tuple[str, str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("main", "instruction_induction", ("base",), (0,)),
    ("main", "trec", ("base",), (0,)),
    ("main", "instruction_induction", MAIN, (0,)),
    ("ablation", "instruction_induction", ("uniform", "remix_frozen"), (0,)),
    ("main", "instruction_induction", MAIN, (1, 2)),
    ("ablation", "instruction_induction", ("uniform", "remix_frozen"), (1, 2)),
    ("main", "trec", MAIN, SEEDS),
    ("help", "trec", ("remix", "mixlora", *ROUTER_RATES), (0, 1)),  # on the search's data
    ("main", "instruction_induction", HELPED, SEEDS),
    ("help", "trec", ("remix", "mixlora", *ROUTER_RATES), (2,)),
    ("longer", "instruction_induction", LONGER, (0,)),
    ("main", "instruction_induction", REST, SEEDS),
    ("help", "trec", tuple(name for name in HELP if name not in ROUTER_RATES), (0,)),
    ("help", "trec", ("remix_experts4", "remix_wait", "remix_copies"), (1,)),
    ("help", "trec", ("remix_dense", "remix_anneal"), (1,)),
    ("longer", "instruction_induction", ("remix_long",), (0,)),
    ("omega", "instruction_induction", ("remix_lora_type",), SEEDS),
    ("selections", "instruction_induction", ("remix_m4_g1", "remix_m4_matched", "remix_m4"), (0,)),
    ("experts", "instruction_induction", ("rslora_r8", "rslora_r16", "rslora_r32"), SEEDS),
    ("experts", "instruction_induction", ("remix_k1", "remix_k4", "remix_k3"), SEEDS),
    ("main", "gsm8k", ("base",), (0,)),
    ("main", "gsm8k", ("lora", "mixlora", "remix", *HELPED), (0,)),
    ("main", "trec", HELPED, SEEDS),
    ("longer", "instruction_induction", LONGER, (1, 2)),
    ("selections", "instruction_induction", ("remix_m8_matched", "remix_m8"), (0,)),
    ("main", "gsm8k", ("lora", *HELPED), (1, 2)),
    ("main", "trec", REST, SEEDS),
    ("main", "gsm8k", ("mixlora", "remix"), (1, 2)),
    ("selections", "instruction_induction", SELECTIONS, (1, 2)),
    ("longer", "instruction_induction", ("remix_long",), (1, 2)),
)
# Scored six times while they train, with the first seed: how the kinds of routing come apart.
WATCHED = ("mixlora", "remix", "remix_paper")
CHECKPOINTS = 6


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        learning_rate: None without training.
        checkpoints: States that are scored while it trains.
        split: What is scored: the test data, or in the search held-out training data.
        model: As in `remix train`.
        steps: Optimizer steps; 0 is the base model.
    """

    part: str
    task: Task
    method: str
    seed: int
    learning_rate: float | None
    options: Mapping[str, Any]
    steps: int
    checkpoints: int = 0
    split: str = "test"
    model: str = "smollm2-135m"

    @property
    def name(self) -> str:
        """Of its row and its folder."""
        rate = f"-lr{self.learning_rate:g}" if self.part == "search" else ""
        return f"{self.part}-{self.task.name}-{self.method}{rate}-s{self.seed}"

    @property
    def digest(self) -> str:
        """Changes with everything that decides the row."""
        task = {
            key: value for key, value in asdict(self.task).items() if (key, value) != ("passes", 1)
        }
        text = json.dumps([VERSION, {**asdict(self), "task": task}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def seconds(self) -> float:
        """A rough guess on two cores: 320 tokens a second in training, 3 times that without."""
        if not self.steps:
            passes = 0.0
        elif self.options.get("method", "remix") in ("remix", "uniform"):
            drawn = self.options.get("num_selections", 1)
            graphs = self.options.get("grad_selections", drawn)
            passes = 1.15 * (graphs + (drawn - graphs) / 3)
        else:
            passes = {"mixlora": 1.2, "mor": 1.3, "dora": 1.5, "vblora": 1.5}.get(self.method, 1.0)
        padded = (1.36 if self.task.passes > 1 else 1.5) * self.task.tokens
        training = self.steps * (0.07 * self.task.passes + self.task.batch * padded / 320) * passes
        draws = self.method.startswith(("remix", "uniform")) and self.split == "test"
        scored = self.task.scored if self.split == "test" else DEV
        scoring = scored * self.task.tokens / 1000 * (5 if draws else 2)
        answering = 0 if self.split == "dev" else 40 + (self.task.longest or 0)
        return 10 + training + scoring * (1 + self.checkpoints / 2) + answering


def train_options(options: Mapping[str, Any], rate: float | None) -> dict[str, Any]:
    """The options of `remix train`: a router's rate is given as a multiple of the experts'.

    `copied_steps` is left out: it is the cell's, see `benchmarks.study.cell.train`.
    """
    given = {key: value for key, value in options.items() if key != "copied_steps"}
    scale = given.pop("router_rate", None)
    return given if scale is None else {**given, "router_learning_rate": scale * (rate or 0.0)}


Rows = Mapping[str, Mapping[str, str]]  # by digest


def wanted(rows: Rows, model: str = "smollm2-135m", guess: float | None = None) -> Iterator[Cell]:
    """Every cell that can be named so far, in order; more can be once searches have rows.

    A method's learning rate is searched where it is first needed; until it is found, the cells that
    need it are left out, or are named with a guess.
    """
    rates: dict[str | None, float | None] = {None: None}  # the base model's
    for part, task, methods, seeds in PARTS:
        for source in dict.fromkeys(map(rate_source, methods)):
            if source not in rates:
                rates[source] = yield from _search(source, rows, model, guess)
        for seed in seeds:
            for method in methods:
                rate = rates[rate_source(method)]
                if rate is not None or method == "base":
                    yield _cell(part, TASKS[task], method, seed, rate, model)


def rate_source(method: str) -> str | None:
    """The method whose search decides the learning rate of this one; None without training."""
    return None if method == "base" else RATE_OF.get(method, method)


def _search(
    method: str, rows: Rows, model: str, guess: float | None
) -> Generator[Cell, None, float | None]:
    """The search's cells of a method; returns the best rate once all of them have rows."""
    task = TASKS["trec"]
    tried: dict[float, float] = {}
    pending = list(FIRST)
    while pending:
        cells = [
            Cell("search", task, method, 0, rate, METHODS[method], task.steps, 0, "dev", model)
            for rate in pending
        ]
        yield from cells
        if any(cell.digest not in rows for cell in cells):
            return guess
        tried |= {cell.learning_rate: loss_of(rows[cell.digest]) for cell in cells}
        pending = next_rates(tried)
    return best_rate(tried)


def next_rates(tried: Mapping[float, float]) -> list[float]:
    """The rate beyond the best one, if that is the outermost tried and the grid goes on."""
    best, place = best_rate(tried), GRID.index(best_rate(tried))
    beyond = place - 1 if best == min(tried) else place + 1
    inside = 0 <= beyond < len(GRID) and GRID[beyond] not in tried
    return [GRID[beyond]] if inside else []


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the least loss; the smaller of two."""
    return min(sorted(tried), key=lambda rate: tried[rate])


def loss_of(row: Mapping[str, str]) -> float:
    """The held-out loss of a row; infinite where training broke down."""
    return float(row["loss"]) if row["loss"] else math.inf


def _cell(part: str, task: Task, method: str, seed: int, rate: float | None, model: str) -> Cell:
    if rate is None:
        return Cell(part, task, method, seed, None, {}, 0, model=model)
    steps = round(task.steps * STEPS_OF.get(method, 1))
    watched = (part, task.name, seed) == ("main", "instruction_induction", 0) and method in WATCHED
    checkpoints = CHECKPOINTS if watched else 0
    split = "dev" if part == "help" else "test"
    return Cell(
        part, task, method, seed, rate, METHODS[method], steps, checkpoints, split, model=model
    )


def missing(
    rows: Rows,
    parts: Sequence[str] = (),
    model: str = "smollm2-135m",
    guess: float | None = None,
) -> list[Cell]:
    """The cells without a row, of some parts or of all; the search counts to all of them."""
    chosen = {*parts, "search"} if parts else set()
    return [
        cell
        for cell in wanted(rows, model, guess)
        if cell.digest not in rows and (not chosen or cell.part in chosen)
    ]

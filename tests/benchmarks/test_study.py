"""The study: what is right, what is run and with which rate, rows that survive, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study import tables
from benchmarks.study.data import INSTRUCTIONS, READERS, read_items, without_leaks, write_splits
from benchmarks.study.metrics import score
from benchmarks.study.plan import (
    FIRST,
    GRID,
    LONG,
    METHODS,
    PARTS,
    TASKS,
    missing,
    next_rates,
    rate_source,
    train_options,
    wanted,
)
from benchmarks.study.rows import COLUMNS, add_row, read_rows
from benchmarks.study.run import main
from remix_cli.run_folder import resolve_config
from tests.benchmarks.study_fakes import (
    CELLS,
    PAIRED,
    RUNNER,
    STOPPABLE,
    run_fakes,
    write_trec,
)


@pytest.mark.parametrize(
    ("metric", "text", "answers", "expected"),
    [
        ("exact", " Cat.\nand more", ["dog", "cat"], 1),
        ("exact", "a cat", ["cat"], 0),
        ("exact", "ninety-four", ["ninety four"], 0),
        ("contains", "perhaps process", ["process"], 1),
        ("contains", "processes", ["process"], 0),
        ("word_set", "bear, dog", ["dog bear"], 1),
        ("word_set", "bear, dog, dog", ["dog bear"], 0),
        ("f1", "the red cat", ["the cat"], 0.8),
        ("f1", "", ["the cat"], 0),
        ("final_number", "2+2=4\n#### 1,004.", ["1004"], 1),
        ("final_number", "1004", ["1004"], 0),
    ],
)
def test_scores(metric, text, answers, expected):
    assert score(metric, text, answers) == pytest.approx(expected)


def rows_with(losses: dict[float, float]) -> dict[str, dict[str, str]]:
    """Rows of every cell that can be named, whose loss depends on the rate."""
    rows: dict[str, dict[str, str]] = {}
    while new := missing(rows):
        rows |= {c.digest: {"loss": str(losses.get(c.learning_rate, 1.0))} for c in new}
    return rows


def test_cells_have_names_of_their_own_and_valid_methods():
    cells = list(wanted({}, guess=1e-3))
    assert len({cell.name for cell in cells}) == len(cells) > 100
    assert len({cell.digest for cell in cells}) == len(cells)
    named = {method for _, _, methods, _ in PARTS for method in methods}
    assert named == {"base", *METHODS}
    longer = replace(cells[0], task=replace(cells[0].task, steps=1))
    assert longer.digest != cells[0].digest


@pytest.mark.parametrize("method", METHODS)
def test_options_are_those_of_remix_train(method):
    # Which refuses what a method does not have.
    config = resolve_config(None, train_options(METHODS[method], 1e-3))
    if method == "remix_router10":
        assert config.router_learning_rate == pytest.approx(1e-2)


def test_search_goes_outward_while_the_best_is_outermost():
    assert next_rates({1e-3: 3.0, 3e-3: 2.0, 1e-2: 2.5}) == []
    assert next_rates({1e-3: 2.0, 3e-3: 3.0, 1e-2: 4.0}) == [3e-4]
    assert next_rates({1e-3: 4.0, 3e-3: 3.0, 1e-2: 2.0}) == [3e-2]
    assert next_rates({3e-2: 4.0, GRID[-1]: 3.0}) == []
    assert next_rates(dict.fromkeys(FIRST, float("inf"))) == [3e-4]


def test_cells_take_the_rate_that_the_search_found():
    assert {cell.part for cell in missing({})} == {"search", "main"}  # of which: base models
    assert all(cell.method == "base" for cell in missing({}) if cell.part == "main")
    cells = list(wanted(rows_with({1e-3: 0.9, 3e-4: 0.8, 1e-4: 0.85})))
    rates = {cell.learning_rate for cell in cells if cell.part != "search"}
    assert rates == {None, 3e-4}
    takes_that_of_remix = ("uniform", "remix_frozen", "remix_k4", "remix_m4_g1")
    assert {rate_source(method) for method in takes_that_of_remix} == {"remix"}
    assert (rate_source("rslora_r8"), rate_source("lora_matched")) == ("rslora", "lora")
    tried = {cell.learning_rate for cell in cells if (cell.part, cell.method) == ("search", "lora")}
    assert tried == {*FIRST, 3e-4, 1e-4}


def test_longer_training_differs_in_its_steps_alone():
    task = TASKS["instruction_induction"]
    cells = {(c.method, c.seed): c for c in wanted({}, guess=1e-3) if c.task == task}
    for name, source in LONG.items():
        assert (rate_source(name), METHODS[name]) == (rate_source(source), METHODS[source])
        assert cells[name, 0].steps == 4 * cells[source, 0].steps


def test_a_half_written_line_is_survived(tmp_path):
    table = tmp_path / "study.csv"
    for cell in CELLS[:2]:
        add_row({"name": cell.name, "digest": cell.digest, "options": '{"a": "1,2"}'}, table)
    whole = table.read_text()
    table.write_text(whole[: len(whole) - 40])
    assert list(read_rows(table)) == [CELLS[0].digest]
    add_row({"name": CELLS[1].name, "digest": CELLS[1].digest, "options": '{"a": "1,2"}'}, table)
    assert table.read_text() == whole
    older = table.with_name("older.csv")
    older.write_text("name,digest\na,1\n")
    assert read_rows(older)["1"]["python"] == ""
    with pytest.raises(ValueError, match=r"'lost' is not in rows\.COLUMNS"):
        add_row({"digest": "x", "lost": 1}, table)


def test_a_killed_run_loses_only_the_running_cell(tmp_path):
    write_trec(tmp_path / "data")
    killed = subprocess.run([sys.executable, "-c", RUNNER, str(tmp_path)], capture_output=True)
    assert killed.returncode == -9
    assert list(read_rows(tmp_path / "study.csv")) == [CELLS[0].digest]
    assert run_fakes(tmp_path) == [CELLS[2].name]  # c fails, is tried once, and has no row
    assert (tmp_path / "done").read_text() == "abbc"
    assert list(read_rows(tmp_path / "study.csv")) == [cell.digest for cell in CELLS[:2]]
    assert "broken" in (tmp_path / "cells" / CELLS[2].name / "log.txt").read_text()


def test_workers_run_cells_side_by_side(tmp_path):
    write_trec(tmp_path / "data")
    assert run_fakes(tmp_path, PAIRED, workers=2) == []
    assert sorted(read_rows(tmp_path / "study.csv")) == sorted(cell.digest for cell in CELLS)


def test_a_stopped_run_stops_its_cells(tmp_path):
    write_trec(tmp_path / "data")
    with subprocess.Popen([sys.executable, "-c", STOPPABLE, str(tmp_path)]) as runner:
        until = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert runner.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        runner.terminate()
    assert runner.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_data_stays_out_of_the_project(capsys):
    with pytest.raises(SystemExit):
        main(["--work", str(Path(tables.__file__).parent / "work")])
    assert "inside the project" in capsys.readouterr().err


def test_what_is_held_out_is_not_trained_on(tmp_path):
    write_trec(tmp_path)
    splits = without_leaks(READERS["trec"](tmp_path / "trec"))
    assert len(splits["test"]) == 4
    prompts = [item.prompt for items in splits.values() for item in items]
    assert len(set(prompts)) == len(prompts) == 230 + 2
    folder = write_splits("trec", tmp_path, tmp_path / "written")
    assert read_items(folder / "train.jsonl") == splits["train"]
    assert splits["test"][-1].response == " entity"


@pytest.mark.parametrize("task", TASKS)
def test_real_data(task, data_folder):
    splits = without_leaks(READERS[task](data_folder(task)))
    assert len(splits["train"]) > 2500 > len(splits["test"]) >= 64
    assert len(splits["dev"]) == (200 if task == "trec" else 0)
    right = [score(i.metric, i.response + "\nmore", i.answers) for i in splits["test"]]
    assert set(right) == {1.0}
    if task == "instruction_induction":
        assert {item.group for item in splits["test"]} == set(INSTRUCTIONS)


def test_tables_say_what_is_not_run():
    text = tables.study_section({})
    assert text.count(tables.NOT_RUN) > 100
    assert text.startswith("0 of ")
    assert "0.0001" in tables.theorem1_section()


def test_means_errors_and_pairs():
    assert tables.spread([1.0, 2.0, 3.0]) == "2.000 ± 0.577"
    assert tables.spread([1.0]) == "1.000 (one seed)"
    assert tables.spread([1.0, float("inf")]) == "diverged"
    ours = {0: {"loss": "1.0"}, 1: {"loss": "2.5"}, 2: {"loss": "9"}}
    reference = {0: {"loss": "1.5"}, 1: {"loss": "2.8"}}
    assert tables.paired(ours, reference) == "-0.400 ± 0.100"
    assert tables.paired(reference, ours) == "+0.400 ± 0.100"
    assert tables.paired(ours, {}) == tables.NOT_RUN
    broken = {0: {"loss": ""}, 1: {"loss": "1.0"}}
    for pair in ((broken, reference), (reference, broken), (broken, broken)):
        assert tables.paired(*pair) == "diverged"


def test_a_seed_that_diverged_is_not_left_out_of_a_mean():
    blank = dict.fromkeys(COLUMNS, "")
    broken = blank | {"status": "diverged", "learning_rate": "0.1"}
    whole = broken | {"loss": "1.0", "accuracy": "0.9", "tokens": "500"}
    found = {("trec", "remix"): {0: broken, 1: whole}, ("trec", "lora"): {1: whole}}
    text = tables.comparison(found, "trec", ["remix", "lora"], "lora")
    assert text[2] == "| remix | — | 500 | 0.1 | diverged | 0.000 (one seed) | diverged |"
    assert "| 0.900 (one seed) |" in text[3]
    line = tables._routings(found)[2]
    assert line.count("diverged") == 8


def test_every_method_is_held_to_every_rival():
    found = {
        ("trec", "lora"): {0: {"loss": "1.5"}, 1: {"loss": "2.8"}},
        ("trec", "remix"): {0: {"loss": "1.0"}, 1: {"loss": "2.5"}},
        ("trec", "mixlora"): {},
    }
    lines = tables._differences(found, "trec", ("lora", "mixlora", "remix"), ("remix", "mixlora"))
    assert lines[2:4] == ["| lora | +0.400 ± 0.100 | not run |", "| remix |  | not run |"]
    assert tables._differences(found, "trec", ("mixlora",), ("remix",)) == ["not run", ""]


def test_kinds_of_routing_are_held_to_top_k():
    kinds = {"loss": "1.0", "loss_sampled": "1.25", "loss_random": "1.5", "loss_fixed": "1.75"}
    rows = {seed: {**kinds, "policy_ess": "2"} for seed in (0, 1)}
    line = tables._routings({("trec", "remix"): rows})[2]
    assert "| 0.250 ± 0.000 | 0.500 ± 0.000 | 0.750 ± 0.000 | 2.00 ± 0.00 |" in line


def test_tables_read_rows():
    blank = dict.fromkeys(COLUMNS, "")
    rows, drawn = {}, ("loss_sampled", "loss_random", "loss_fixed")
    for cell in wanted(rows_with({})):
        history = [{"step": 3, "loss": 1.25, "ess": 2.0}] if cell.checkpoints else []
        rows[cell.digest] = blank | {
            "learning_rate": str(cell.learning_rate or ""),
            "loss": str(1.0 + cell.seed),
            **dict.fromkeys(drawn, "1.5" if cell.method == "remix" else ""),
            "history": json.dumps(history),
            "tokens": "123456",
            "policy_ess": str(2.5 + 0.75 * cell.seed),
        }
    text = tables.study_section(rows)
    assert "| remix | — | 123.5k |" in text
    assert "2.000 ± 0.577" in text
    assert "| mixlora | 3 | 1.250 |" in text
    assert (
        "| remix_router10 | — | 123.5k | 0.0001 | 2.000 ± 0.577 | 0.000 ± 0.000 | 3.250 ± 0.433 |"
        in text
    )

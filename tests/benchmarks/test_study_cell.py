"""A cell of the study from end to end on stories260k, and what is scored."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study import scoring
from benchmarks.study.cell import run_cell, train, train_one_lora
from benchmarks.study.data import Item, write_splits
from benchmarks.study.plan import METHODS, POOL, TASKS, Cell
from benchmarks.study.rows import read_rows
from benchmarks.study.run import run_study
from remix_cli.answers import answer
from remix_model import ReMixConfig
from remix_model.from_lora import from_lora_adapters
from tests.benchmarks.study_fakes import write_trec
from tests.remix_cli.helpers import make_model

TINY = replace(TASKS["trec"], steps=2, batch=2, scored=4, answers=3, eval_batch=2, longest=2)
N, K = 4, 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, stories260k: Path) -> Path:
    """stories260k with a tokenizer of bytes."""
    folder = make_model(tmp_path_factory.mktemp("model"))
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(stories260k / name)
    return folder


def test_a_cell_from_end_to_end(model_folder, tmp_path):
    write_trec(tmp_path / "sets")
    options = {**METHODS["remix"], "num_experts": N, "r": 2}
    cell = Cell("main", TINY, "remix", 0, 1e-2, options, 2, checkpoints=2, model=str(model_folder))
    table = tmp_path / "study.csv"
    find = lambda rows: [] if cell.digest in rows else [cell]  # noqa: E731
    assert run_study(find, tmp_path, tmp_path / "sets", table) == []
    row = read_rows(table)[cell.digest]
    assert row["status"] == "finished"
    assert len({row[f"loss{kind}"] for kind in ("", "_sampled", "_random", "_fixed")}) == 4
    assert (float(row["ess"]), json.loads(row["weights"])) == (K, [0.5, 0.5])
    assert int(row["tokens"]) > 0 and int(row["activated_parameters"]) > 0
    assert row["answered"] == "3"
    assert [point["step"] for point in json.loads(row["history"])] == [1, 2]
    series = json.loads(row["routing"])
    assert [(point["step"], point["ess"], point["ess_min"]) for point in series] == [
        (1, K, K),
        (2, K, K),
    ]
    assert all(1 < point["policy_ess"] < N for point in series)
    halves = [sum(point["weights"][10:11]) for point in series]  # of all, in the bin of 0.5
    assert halves == [sum(point["weights"]) for point in series] and min(halves) > 0
    assert float(row["train_loss"]) > 0
    left = {path.name for path in (tmp_path / "cells" / cell.name).iterdir()}
    assert left == {"spec.json", "log.txt", "row.json", "metrics.json"}


def test_experts_that_begin_as_copies_of_a_lora(model_folder, tmp_path):
    write_trec(tmp_path / "sets")
    data = write_splits("trec", tmp_path / "sets", tmp_path)
    options = METHODS["remix_copies"] | {"copied_steps": 3}
    cell = Cell("help", TINY, "x", 0, 1e-2, options, 5, split="dev", model=str(model_folder))
    lora = train_one_lora(cell, tmp_path / "lora", data, 3)
    assert json.loads((lora / "adapter_config.json").read_text())["lora_alpha"] == 2.0 / K
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.randint(1, 200, (2, 12))
    before = base(ids).logits
    alone = PeftModel.from_pretrained(copy.deepcopy(base), lora)
    for module in alone.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(K)
    expected = alone.eval()(ids).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    copied = from_lora_adapters(base, [lora] * POOL["num_experts"], ReMixConfig(**POOL)).eval()
    torch.testing.assert_close(copied(ids).logits, expected)
    metrics = train(cell, tmp_path / "run", data)
    assert metrics["train_steps"] == 2 and metrics["config"]["from_lora"] == [str(lora)] * 8
    assert [entry["step"] for entry in metrics["loss_history"]] == [1, 2, 3, 4, 5]
    seen = [entry["num_input_tokens_seen"] for entry in metrics["loss_history"]]
    assert seen == sorted(set(seen))  # of both trainings: the table compares tokens
    assert not lora.exists()


def test_the_base_model_and_a_run_that_breaks_down(model_folder, tmp_path, monkeypatch):
    write_trec(tmp_path / "sets")
    data = write_splits("trec", tmp_path / "sets", tmp_path)
    cell = Cell("main", TINY, "base", 0, None, {}, 0, model=str(model_folder))
    row = run_cell(cell, tmp_path, data)
    assert float(row["loss"]) > 0 and "loss_sampled" not in row and "ess" not in row

    def break_down(*_):
        raise FloatingPointError("nan")

    monkeypatch.setattr("benchmarks.study.cell.train", break_down)
    row = run_cell(replace(cell, steps=2), tmp_path, data)
    assert row["status"] == "diverged" and "loss" not in row


@pytest.fixture
def routed_model(tmp_path):
    folder = make_model(tmp_path / "tiny")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, ReMixConfig(r=2, num_experts=N, top_k=K)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "remix_" in name:
            torch.nn.init.normal_(parameter, std=300.0 if "router" in name else 0.5)
    return model, AutoTokenizer.from_pretrained(folder)


def test_kinds_of_routing(routed_model):
    model, _ = routed_model
    ids = torch.randint(1, 200, (3, 12))
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids}
    loss = {kind: scoring.held_out_loss(model, [batch], kind) for kind in scoring.ROUTINGS}
    assert loss["sampled"] == pytest.approx(loss["top_k"], abs=1e-4)  # so sure are the routers
    assert abs(loss["random"] - loss["top_k"]) > 1e-2
    assert len({round(value, 4) for value in loss.values()}) == 3
    assert scoring.held_out_loss(model, [batch], "random") == loss["random"]
    with scoring.routed(model, "random", 0) as expand, scoring.record_routing(model) as recorder:
        scoring.token_losses(model, expand(batch))
    assert recorder.stats().summary()["share_ess"] > 0.9 * N
    with pytest.raises(ValueError, match="choose one of top_k, sampled"):
        scoring.held_out_loss(model, [batch], "best")


def test_weights_are_those_of_real_tokens():
    class Recorder:
        valid = torch.tensor([[True, False], [True, True]])

    class Selection:
        weights = torch.tensor([[[3.0, 1.0], [1.0, 0.0]], [[0.5, 0.5], [2.0, 2.0]]])

    record = scoring.WeightRecord(2, Recorder())
    record.add(Selection())
    shares = record.sorted_sum / record.tokens
    torch.testing.assert_close(shares, torch.tensor([1.75, 1.25]).double() / 3)


def test_answers_in_a_batch_are_those_one_by_one(routed_model):
    model, tokenizer = routed_model
    items = [Item(prompt, " x", "g", ("x",)) for prompt in ("abc", "a longer one: ")]
    together = scoring.answers(model, tokenizer, items, 6)
    alone = [
        answer(model, tokenizer, tokenizer(item.prompt).input_ids, max_new_tokens=6)
        for item in items
    ]
    assert together == alone
    right = [replace(items[0], answers=(alone[0],)), replace(items[1], group="h")]
    found = scoring.accuracy(model, tokenizer, right, 2, longest=6)
    assert found == {"g": 1.0, "h": 0.0}

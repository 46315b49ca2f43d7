"""lm-eval on a model in memory, without a network: ReMix, plain PEFT and base models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from remix_cli import main
from remix_model import ReMixConfig, evaluate_tasks
from remix_model.tasks import find_tasks
from tests.remix_cli.helpers import make_model

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-eval: pip install 'remix-lora[eval]'",
)
SUMS = [(a, b) for a in range(3) for b in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a task of two answers each."""
    folder = tmp_path_factory.mktemp("task folder")
    make_model(folder / "model")
    rows = [{"q": f"{a}+{b}=", "choices": [str(a + b), str(a * b + 5)], "gold": 0} for a, b in SUMS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {folder / 'sums.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        'target_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any) -> float:
    """The share of sums whose first answer is likelier, without lm-eval."""

    def score(prompt: str, answer: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(log_probs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))

    right = [score(f"{a}+{b}=", str(a + b)) > score(f"{a}+{b}=", str(a * b + 5)) for a, b in SUMS]
    return sum(right) / len(right)


@pytest.fixture
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip for all packages after every run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@needs_lm_eval
@pytest.mark.usefixtures("no_environment_report")
@pytest.mark.parametrize("kind", ["base", "lora", "remix"])
def test_agrees_with_a_count_by_hand(place: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    base: Any = AutoModelForCausalLM.from_pretrained(place / "model")
    plain = accuracy(base, tokenizer)
    mixture = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 32.0}
    configs = {
        "lora": LoraConfig(r=8, lora_alpha=64, init_lora_weights=False),
        "remix": ReMixConfig(**mixture, init_lora_weights=False),
    }
    torch.manual_seed(0)
    model = get_peft_model(base, configs[kind]) if kind in configs else base
    want = accuracy(model.eval(), tokenizer)
    assert (want == plain) == (kind == "base"), "an adapter that changes nothing would not be seen"
    result = evaluate_tasks(model, tokenizer, ["tiny_sums"], include_path=place)
    assert result["tiny_sums"]["acc,none"] == pytest.approx(want)
    if kind == "base":
        result = evaluate_tasks(model, tokenizer, [str(place / "sums.yaml")], limit=3)
        assert result["tiny_sums"]["sample_len"] == 3


@needs_lm_eval
def test_own_tasks_are_found_without_indexing_all(place: Path) -> None:
    assert find_tasks(["tiny_sums"], place).all_tasks == ["tiny_sums"]
    with pytest.raises(ValueError, match="there is no folder of tasks"):
        find_tasks(["tiny_sums"], place / "missing")


@needs_lm_eval
def test_unknown_tasks_are_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks here: indexing them takes most of a minute."""
    from lm_eval.tasks import TaskManager

    def without_its_own(include_path: str | None, **_: Any) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_its_own)
    with pytest.raises(ValueError, match="lm-eval has no task 'tiny_products'"):
        find_tasks(["tiny_sums", "tiny_products"], place)


@needs_lm_eval
@pytest.mark.usefixtures("no_environment_report")
def test_command(place: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    config = ReMixConfig(r=4, num_experts=4, top_k=2, lora_alpha=32.0, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    argv = ["eval", "--adapter", str(tmp_path / "adapter"), "--tasks", "tiny_sums,tiny_sums"]
    argv += ["--include-path", str(place), "--json", str(tmp_path / "out.json")]
    assert main([*argv, "--model", str(place / "model"), "--device", "cpu"]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["adapter"]["tiny_sums"]["acc,none"] == pytest.approx(accuracy(model, tokenizer))
    with model.disable_adapter():
        want = accuracy(model, tokenizer)
    assert out["base_model"]["tiny_sums"]["acc,none"] == pytest.approx(want)


def test_without_lm_eval_the_command_is_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'remix-lora\[eval\]'"):
        evaluate_tasks(None, None, ["tiny_sums"], include_path=place)

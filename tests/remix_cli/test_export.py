"""`remix export`: a plain LoRA and what it loses; `remix train --from-lora`: the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from remix_cli import main
from remix_cli.evaluate import held_out_rows, mean_loss
from remix_cli.prepare import adapter_config
from remix_model.models import load_tokenizer
from remix_model.tokens import DataCollator
from tests.remix_cli.helpers import contents, fails, run


def exported(workspace: Path, output: Path, *argv: str) -> int:
    adapter = str(workspace / "run")
    return main(["export", "--adapter", adapter, "--output", str(output), *argv])


def test_most_frequent_experts(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the run's own record of the same data has; and every loss is its model's."""
    before = contents(workspace / "run")
    assert exported(workspace, tmp_path / "lora") == 0
    out = capsys.readouterr().out
    assert contents(workspace / "run") == before
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    card = (tmp_path / "lora" / "README.md").read_text()
    for layer in metrics["routing"]["layers"]:
        shares = layer["expert_share"]
        best = sorted(sorted(range(4), key=lambda i: -shares[i])[:2])
        assert f"{layer['name'].removeprefix('base_model.model.')}`: {best}" in card
    run_config = adapter_config(workspace / "run", {})
    base = AutoModelForCausalLM.from_pretrained(workspace / "model")
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    collator = DataCollator.for_tokenizer(load_tokenizer(run_config.model))
    rows = held_out_rows(run_config, {})
    want = {
        "base model": metrics["eval_loss_before"],
        "adapter": metrics["eval_loss_after"],
        "exported LoRA": mean_loss(lora, rows, collator, run_config, "")[0],
    }
    lines = {
        cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("│")) > 4
    }
    assert {name: float(lines[name][2]) for name in want} == pytest.approx(want, abs=6e-5)
    assert abs(want["adapter"] - want["exported LoRA"]) > 2e-4, "the two could be mixed up"


def test_selection_from_a_file(workspace: Path, tmp_path: Path) -> None:
    """And no data are read for it."""
    metrics = json.loads((workspace / "run" / "metrics.json").read_text())
    chosen = {layer["name"]: [3, 1] for layer in metrics["routing"]["layers"]}
    (tmp_path / "experts.json").write_text(json.dumps(chosen))
    assert (
        exported(workspace, tmp_path / "lora", "--selection", str(tmp_path / "experts.json")) == 0
    )
    assert "mlp.up_proj`: [1, 3]" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no file: give JSON"),
        ("{", "is not JSON"),
        ("[1]", "must hold an object"),
        ("{}", "the selection lacks"),
        ('{"x": [0, 1]}', "the selection lacks"),
    ],
    ids=str,
)
def test_bad_selections(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    message: str,
) -> None:
    file = tmp_path / "experts.json"
    if text is not None:
        file.write_text(text)
    code = exported(workspace, tmp_path / "lora", "--selection", str(file))
    assert message in fails(capsys, code)
    assert not (tmp_path / "lora").exists()


def test_bad_outputs(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above all the adapter's own folder."""
    code = exported(workspace, workspace / "run")
    assert "holds an adapter already" in fails(capsys, code)
    assert "is a file" in fails(capsys, exported(workspace, workspace / "c.yaml"))


# From LoRAs --------------------------------------------------------------------------------------


@pytest.fixture
def loras(workspace: Path, tmp_path: Path) -> list[str]:
    """Four LoRAs of rank 2 on all of q_proj."""
    for i in range(4):
        torch.manual_seed(i)
        base = AutoModelForCausalLM.from_pretrained(workspace / "model")
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / str(i))
    return [str(tmp_path / str(i)) for i in range(4)]


def test_training_starts_from_loras(workspace: Path, tmp_path: Path, loras: list[str]) -> None:
    """On the linears that they adapt; and goes on after a checkpoint."""
    folder = tmp_path / "run"
    start = ["--output-dir", str(folder), "--save-steps", "1", "--learning-rate", "0"]
    argv = [*start, "--max-steps", "1", "--from-lora", *loras]
    assert run(workspace, "train", *argv) == 0
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    model = PeftModel.from_pretrained(model, folder)
    pool = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    for i, lora in enumerate(loras):
        base = AutoModelForCausalLM.from_pretrained(workspace / "model")
        one = PeftModel.from_pretrained(base, lora)
        want = one.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        delta = want.get_delta_weight("default")
        ours = pool.remix_lora_B["default"][i] @ pool.remix_lora_A["default"][i]
        torch.testing.assert_close(pool.scaling["default"] * ours, delta)
    assert run(workspace, "train", *start, "--max-steps", "2", "--resume") == 0
    assert json.loads((folder / "metrics.json").read_text())["train_steps"] == 2


def test_loras_that_do_not_fit_are_named_before_the_run(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loras: list[str]
) -> None:
    argv = ["--output-dir", str(tmp_path / "run"), "--from-lora"]
    code = run(workspace, "train", *argv, *loras[:3])
    assert "num_experts=4, and 3 LoRAs" in fails(capsys, code)
    code = run(workspace, "validate", *argv, *loras[:3], str(workspace / "run"))
    assert "the pool is made of LoRAs" in fails(capsys, code)
    assert not (tmp_path / "run").exists()

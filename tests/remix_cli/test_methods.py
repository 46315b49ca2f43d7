"""`--method`: one word switches, what a method does not have is an error, runs are comparable."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from remix_cli import main
from remix_cli.config import RunConfig, build_config, has_option, read_yaml, write_yaml
from remix_cli.options import PEFT_METHODS, ROUTED_METHODS
from remix_model.baselines import METHODS
from tests.remix_cli.helpers import fails, run

SHORT = ["--max-steps", "2", "--num-samples", "0", "--learning-rate", "0.05"]


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_the_names_are_those_of_the_tables() -> None:
    from remix_model.routers import ROUTERS

    assert set(PEFT_METHODS) == set(METHODS)
    ours = {name for name, kind in ROUTERS.items() if kind.__module__.startswith("remix_model.")}
    assert set(ROUTED_METHODS) == ours  # other tests may have registered routers of their own


@pytest.mark.parametrize(
    ("flags", "in_file", "method"),
    [
        ({}, "", "remix"),
        ({}, "method: mor", "mor"),
        ({}, "router_type: mor", "mor"),
        ({"method": "lora"}, "router_type: mor\nnum_selections: 8", "lora"),
        ({"method": "lora"}, "method: ptuning\nnum_virtual_tokens: 3", "lora"),
        ({"method": "mixlora"}, "router_type: mor\nnum_experts: 3", "mixlora"),
        ({"router_type": "mixlora"}, "method: mor", "mixlora"),
        ({"method": "remix"}, "method: dora\nuse_rslora: false", "remix"),
    ],
    ids=str,
)
def test_one_word_switches(
    tmp_path: Path, flags: dict[str, Any], in_file: str, method: str
) -> None:
    (tmp_path / "c.yaml").write_text(in_file)
    config = build_config(flags, tmp_path / "c.yaml")
    assert config.method == method
    assert config.router_type == (method if method in ROUTED_METHODS else "remix")
    write_yaml(config, tmp_path / "again.yaml")  # which says only what the method has
    assert build_config({}, tmp_path / "again.yaml") == config
    if not config.is_routed:
        assert not {"num_selections", "router_type"} & read_yaml(tmp_path / "again.yaml").keys()


@pytest.mark.parametrize(
    ("flags", "in_file", "message"),
    [
        ({"method": "lor"}, "", r"^method must be one of remix, .* xlora, got 'lor'; did you mean"),
        ({"method": "lora", "num_selections": 8}, "", "method=lora has no option num_selections: "),
        ({"method": "lora", "use_rslora": True}, "", "method=lora has no option use_rslora"),
        ({"method": "prefix", "gradient_checkpointing": True}, "", "no option gradient_checkp"),
        ({"method": "ia3", "lora_alpha": 2.0}, "", "or choose remix, .*, mor, lora, rslora, dora$"),
        (
            {"method": "uniform", "router_learning_rate": 0.1},
            "",
            "choose remix, mixlora, mix.*, mor$",
        ),
        ({"method": "uniform", "credit": "causal"}, "", "no option credit: .* choose remix, mor$"),
        ({"rank": 8}, "", "method=remix has no option rank: .* choose lora, rslora, dora, vblora"),
        ({}, "method: lora\ncredit: causal", r"c\.yaml: method=lora has no option credit"),
        ({"method": "lora"}, "method: lora\ncredit: causal", r"c\.yaml: method=lora has no"),
        ({"method": "lora", "credit": "causal"}, "num_selections: 2", "=lora has no option credit"),
        ({"method": "mor", "router_type": "uniform"}, "", "router_type=uniform differ: leave one"),
        ({"method": "dora", "rank": 8, "r": 4}, "", "rank, and r or top_k, .* give one of them"),
    ],
    ids=str,
)
def test_what_a_method_does_not_have_is_named(
    tmp_path: Path, flags: dict[str, Any], in_file: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(in_file)
    with pytest.raises(ValueError, match=message):
        build_config(flags, tmp_path / "c.yaml")


def test_every_method_has_what_all_runs_have() -> None:
    """And what it does not have is not another group's by mistake."""
    for method in (*ROUTED_METHODS, *PEFT_METHODS):
        for item in fields(RunConfig):
            group = item.metadata["group"]
            if group in ("model", "data", "output") or item.name in ("method", "learning_rate"):
                assert has_option(method, item.name)
            assert has_option("remix", item.name) == (group != "peft")


def test_lora_of_a_mixtures_configuration(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: rank k r, the same data and parameters a token passes, files, commands."""
    folder = tmp_path / "run"
    out = ["--method", "lora", "--output-dir", str(folder)]
    assert run(workspace, "validate", *out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "method=lora has no num_experts, num_selections: not taken from" in printed
    assert "6 (down_proj, gate_proj, up_proj)" in printed
    assert "activated parameters │ 1,920" in printed
    assert "Estimated memory of a step (MiB)" in printed

    assert run(workspace, "train", *out) == 0
    metrics, mixture = metrics_of(folder), metrics_of(workspace / "run")
    assert metrics["method"] == "lora"
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert metrics["eval_loss_before"] == pytest.approx(mixture["eval_loss_before"], rel=1e-6)
    routers = 2 * 4 * (32 + 32 + 48)
    assert metrics["activated_parameters"] == mixture["activated_parameters"] - routers
    assert metrics["trainable_parameters"] == metrics["activated_parameters"]
    beside = {"routing", "config", "device", "versions"}
    assert metrics.keys() - beside == mixture.keys() - beside
    assert "num_selections" not in metrics["config"]
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 2.0, False)
    card = (folder / "README.md").read_text()
    assert "adapter of PEFT's own, of type LORA" in card and "| method | lora |" in card
    assert "[More Information Needed]" not in card

    adapter = ["--adapter", str(folder)]
    assert main(["eval", *adapter, "--json", str(tmp_path / "e.json")]) == 0
    measured = json.loads((tmp_path / "e.json").read_text())
    assert measured["loss_adapter"] == pytest.approx(metrics["eval_loss_after"], rel=1e-5)
    assert main(["generate", *adapter, "--prompt", "1+1?", "--compare"]) == 0
    capsys.readouterr()
    code = main(["export", *adapter, "--output", str(tmp_path / "x")])
    assert "of type 'LORA': this command needs a mixture" in fails(capsys, code)
    code = main(["eval", *adapter, "--backend", "torch"])
    assert "method=lora has no option backend" in fails(capsys, code)


@pytest.mark.parametrize("method", ["ptuning", "xlora", "hydralora"])
def test_runs_resume_to_the_bit_and_reload(
    workspace: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    out = ["--method", method, "--output-dir", str(folder), "--save-steps", "1", *SHORT]
    if method == "xlora":
        for name in ("one", "two"):
            _lora(workspace, tmp_path / name)
        out += ["--xlora-adapters", str(tmp_path / "one"), str(tmp_path / "two")]
    if method == "ptuning":
        out += ["--num-virtual-tokens", "5"]
    assert run(workspace, "validate", *out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ("memory is not estimated for method=xlora" in text) == (method == "xlora")
    assert run(workspace, "train", *out) == 0
    after = metrics_of(folder)["eval_loss_after"]
    straight = load_file(folder / "adapter_model.safetensors")
    shutil.rmtree(folder / "checkpoint-2")
    for name in ("adapter_model.safetensors", "metrics.json"):
        (folder / name).unlink()
    # What a run's file leaves out is not asked for again; the method comes from the run.
    assert main(["train", "--output-dir", str(folder), "--resume"]) == 0
    resumed = load_file(folder / "adapter_model.safetensors")
    assert all(bool((straight[name] == resumed[name]).all()) for name in straight)
    assert metrics_of(folder)["eval_loss_after"] == after
    assert main(["eval", "--adapter", str(folder), "--json", str(tmp_path / "e.json")]) == 0
    measured = json.loads((tmp_path / "e.json").read_text())
    assert measured["loss_adapter"] == pytest.approx(after, rel=1e-5)
    assert main(["generate", "--adapter", str(folder), "--prompt", "1+1?", "--compare"]) == 0
    code = main(["train", "--output-dir", str(folder), "--resume", "--method", "lora"])
    assert f"has method='{method}' and cannot go on with 'lora'" in fails(capsys, code)


def _lora(workspace: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    lora = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "xlora"], "xlora_adapters names 0: give the folders of two or more"),
        (["--method", "xlora", "--xlora-adapters", "a", "b"], "a holds no adapter_config.json"),
        (["--method", "lora", "--target-modules", "up_prj"], "target_modules names 'up_prj'"),
        (["--method", "vblora", "--vector-length", "7"], "divisible by `vector_length` 7"),
        (["--method", "prompt", "--num-virtual-tokens", "63"], "leaves no room in the model's 64"),
        (["--method", "prompt", "--num-virtual-tokens", "60"], "and the model takes 4"),
        (["--method", "ia3", "--target-modules", "all-linear"], "(IA)3 takes names"),
        (
            ["--method", "mor", "--router-kwargs", "{train: rloo}", "--grad-selections", "1"],
            "routers of type 'mor' needs a graph of every selection",
        ),
        (["--method", "mor", "--dense-start", "2"], "type 'mor' weigh their experts and nothing"),
        (["--method", "mor", "--temperature", "2"], "type 'mor' weigh their experts and nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_method_that_does_not_fit_leaves_no_trace(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    argv: list[str],
    message: str,
) -> None:
    code = run(workspace, command, *argv, "--output-dir", str(tmp_path / "run"))
    assert message in fails(capsys, code)
    assert not list(tmp_path.iterdir())


def test_a_router_of_ones_own(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Registered in the process, it is a method like any other; else every command says so."""
    from remix_model.routers import ROUTERS, Router

    monkeypatch.setitem(ROUTERS, "mine", type("Mine", (Router,), {"name": "mine"}))
    folder, adapter = tmp_path / "run", ["--adapter", str(tmp_path / "run")]
    assert run(workspace, "train", "--method", "mine", *SHORT, "--output-dir", str(folder)) == 0
    assert metrics_of(folder)["method"] == "mine"
    assert metrics_of(folder)["eval_loss_after"] < metrics_of(folder)["eval_loss_before"]
    answer = ["generate", *adapter, "--prompt", "1 + 1", "--max-new-tokens", "2"]
    commands = (["eval", *adapter], answer, ["validate", *adapter])
    for command in commands:
        assert main(command) == 0
    capsys.readouterr()
    monkeypatch.delitem(ROUTERS, "mine")
    for command in commands:
        said = fails(capsys, main(command))
        assert "mine" in said and "register" in said
    code = run(workspace, "train", "--method", "mine", *SHORT, "--output-dir", str(tmp_path / "x"))
    assert "method must be one of remix, " in fails(capsys, code)


@pytest.mark.parametrize("method", ["remix", "lora", "ia3"])
def test_a_name_to_leave_out_must_be_there(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    argv = ["--method", method, "--exclude-modules", "up_prj", "--output-dir", str(tmp_path / "x")]
    error = fails(capsys, main(["train", "--config", str(workspace / "c.yaml"), *argv]))
    assert "exclude_modules names 'up_prj', which is not there" in error


def test_a_flag_is_not_lost_beside_a_files_rank(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("method: lora\nrank: 16\n")
    with pytest.raises(ValueError, match="rank, and r or top_k"):
        build_config({"r": 4}, file)
    assert build_config({"rank": 4}, file).rank == 4
    assert build_config({"method": "remix", "r": 4}, file).r == 4

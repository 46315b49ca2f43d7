"""Configuration: file, flags and defaults; unknown keys and wrong types say what would be right."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from remix_cli.config import RunConfig, build_config, option_fields, read_yaml, write_yaml
from remix_cli.parser import GROUP_TITLES, parse_arguments


def parse(*argv: str) -> dict[str, object]:
    return parse_arguments(["train", *argv])[1]


def test_every_field_is_a_flag_with_help() -> None:
    assert option_fields(*GROUP_TITLES) == list(fields(RunConfig))
    for item in fields(RunConfig):
        assert item.metadata["help"]
        value = "3" if "int" in str(item.type) or "float" in str(item.type) else "true"
        if "Mapping" in str(item.type):
            value = "{name: 1}"
        if item.metadata["choices"]:
            value = item.metadata["choices"][-1]
        flag = "--" + item.name.replace("_", "-")
        assert item.name in parse(flag, value), flag
        assert parse(flag.replace("-", "_").replace("__", "--"), value) == parse(f"{flag}={value}")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bf16"], {"bf16": True}),
        (["--no-use-rslora"], {"use_rslora": False}),
        (["--use-rslora", "false"], {"use_rslora": False}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (
            ["--target-modules", "up_proj", "down_proj"],
            {"target_modules": ["up_proj", "down_proj"]},
        ),
        (["--target-modules", "up_proj,down_proj"], {"target_modules": ["up_proj", "down_proj"]}),
        (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--layers-to-transform", "0", "2"], {"layers_to_transform": [0, 2]}),
        (["--max-length", "none"], {"max_length": None}),
        (["--prompt-template", r"{q}\n"], {"prompt_template": "{q}\n"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_become_values(argv: list[str], expected: dict[str, object]) -> None:
    assert parse(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--lerning-rate", "1"],
            "unknown argument '--lerning-rate'; did you mean '--learning-rate'",
        ),
        (
            ["--batch-size", "1"],
            "unknown argument '--batch-size'; did you mean '--per-device-train-batch-size'",
        ),
        (["--top-k", "two"], "top_k must be a whole number, got 'two'"),
        (["--top-k", "none"], "top_k must be a whole number, got None"),
        (["--learning-rate", "fast"], "learning_rate must be a number, got 'fast'"),
        (["--bf16", "perhaps"], "bf16 must be true or false, got 'perhaps'"),
        (["--layers-to-transform", "a"], "layers_to_transform must be a list of whole numbers"),
        (
            ["--train-on", "al"],
            "train_on must be one of response, all, got 'al'; did you mean 'all'",
        ),
        (
            ["--lr-scheduler-type", "warmup_stable_decay"],
            "lr_scheduler_type must be one of cosine, linear,",
        ),
        (["--lora-alpha", "nan"], "lora_alpha must be a finite number, got nan"),
        (["--router-temperature", "inf"], "router_temperature must be a finite number, got inf"),
        (["--eval-size", "nan"], "eval_size must be a finite number, got nan"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--seed", "99999999999"], "seed must be at most 4294967295, got 99999999999"),
        (["--backend", "vulkan"], "backend must be one of auto, torch,"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["train", "validate"])
def test_bad_flag_exits_with_one_line(
    argv: list[str], message: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments([command, *argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("r: 4\ntop_k: 1\nlearning_rate: 1e-4\n")  # without a point YAML reads text
    config = build_config({"r": 2}, file)
    assert (config.r, config.top_k, config.learning_rate) == (2, 1, 1e-4)
    assert config.num_experts == RunConfig().num_experts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_expert: 8", r"c\.yaml: unknown key 'num_expert'; did you mean 'num_experts'"),
        ("num-experts: 8", r"unknown key 'num-experts'; did you mean 'num_experts'"),
        ("num_experts: 8.5", r"c\.yaml: num_experts must be a whole number, got 8\.5"),
        ("num_experts: true", r"num_experts must be a whole number, got True"),
        ("model: 3", r"model must be text, got 3"),
        ("max_length: long", r"max_length must be a whole number or null, got 'long'"),
        ("target_modules: []", r"target_modules must be a list of names or text or null, got \[\]"),
        ("long_examples: ignore", r"must be one of error, drop, truncate, got 'ignore'"),
        ("logging_steps: 0", r"c\.yaml: logging_steps must be at least 1, got 0"),
        ("device: gpu", r"device must be one of cpu, cuda, got 'gpu'"),
        ("- r", r"must hold `key: value` lines, got list"),
        ("r: [", r"c\.yaml is not YAML: .* at line 1, column 5"),
        ("r: 4\nr: 8", r"c\.yaml sets 'r' more than once: keep one of the lines"),
        ("r: 4\n'r': 8", r"c\.yaml sets 'r' more than once: keep one of the lines"),
        ("lora_alpha: .nan", r"c\.yaml: lora_alpha must be a finite number, got nan"),
        pytest.param("model: " + "[" * 5000, r"c\.yaml is not YAML", id="nested-5000-deep"),
    ],
)
def test_bad_file_names_key_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        build_config({}, tmp_path / "c.yaml")
    assert "<unicode string>" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


def test_written_config_reads_back(tmp_path: Path) -> None:
    config = RunConfig(prompt_template='{a}: "x"\n', target_modules=["q"], overwrite=True)
    write_yaml(config, tmp_path / "c.yaml")
    assert r'prompt_template: "{a}: \"x\"\n"' in (tmp_path / "c.yaml").read_text()
    again = build_config({}, tmp_path / "c.yaml")
    assert asdict(again) == {**asdict(config), "overwrite": False}


def test_written_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no path here, a hub id say, is left alone; a link keeps its name and suffix."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "0123abcd").write_text("{}")
    (tmp_path / "data.jsonl").symlink_to("0123abcd")
    config = RunConfig(
        model="../" + tmp_path.name + "/model", dataset="./data.jsonl", eval_dataset="org/name"
    )
    write_yaml(config, tmp_path / "c.yaml")
    written = read_yaml(tmp_path / "c.yaml")
    assert written["model"] == str(tmp_path / "model")
    assert written["dataset"] == str(tmp_path / "data.jsonl")
    assert written["eval_dataset"] == "org/name"


@pytest.mark.parametrize("name", ["demo", "own_data", "gsm8k"])
def test_examples_are_valid(name: str) -> None:
    file = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    assert build_config({}, file).num_selections >= 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, remix_cli\n"
        "try: remix_cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'remix_model', 'yaml', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
